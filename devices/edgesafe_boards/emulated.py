"""A board that QEMU emulates on this machine: its processor, its page size and what Linux says of it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgesafe.errors import DeviceError
from edgesafe_boards.arm64_root import KEYRING, USER, USER_ID
from edgesafe_boards.shell import Shell

ROOT = Path(__file__).resolve().parents[2]
MARK = "*emulated: never a speed*"
QEMU = Path("/usr/bin/qemu-aarch64-static")
PACKAGES = {"debootstrap": Path("/usr/sbin/debootstrap"), "qemu-user-static": QEMU, "debian-archive-keyring": KEYRING}
_BINFMT = "/proc/sys/fs/binfmt_misc"
# A program of 64-bit Arm by its first bytes, as Linux's binfmt_misc takes them. Source: QEMU's scripts/qemu-binfmt-conf.sh.
_MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
_MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
# In a namespace of its own, so that nothing stays mounted or runs on, whatever ends the run. The shell stays its first
# process: whoever changes the user loses the signal that ends it with its parent.
_ALONE = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child")
_ENTER = f"""
mount -t proc proc "$1/proc"
mount --bind "$2/cpuinfo" "$1/proc/cpuinfo"
mount --bind "$2/sys" "$1/sys"
mount --rbind /dev "$1/dev"
code=0
chroot --userspec={USER_ID}:{USER_ID} "$1" /usr/bin/env -i HOME=/home/{USER} USER={USER} LANG=C.UTF-8 \
    PATH=/usr/local/bin:/usr/bin:/bin QEMU_CPU="$3" QEMU_PAGESIZE="$4" /bin/sh -c 'cd && eval "$0"' "$5" || code=$?
exit $code
"""


@dataclass(frozen=True)
class Board:
    """What is emulated of a device: QEMU's name of its cores, bytes of a page, how many cores, and its /proc/cpuinfo."""

    cpu: str
    page: int
    cores: int
    cpuinfo: Path


# A device whose cores QEMU can't be told to be, exactly, is missing here.
BOARDS = {"rpi5": Board("cortex-a76", 16384, 4, ROOT / "tests" / "runtime" / "cpuinfo" / "pi5")}


def board_of(device: str) -> Board:
    """What is emulated for a device.

    Raises:
        DeviceError: It can't be.
    """
    if device in BOARDS:
        return BOARDS[device]
    raise DeviceError(
        f"{device} can't be emulated here, because QEMU has no core that computes as its cores do",
        expected=f"one of {', '.join(BOARDS)}, or the device itself",
        todo=f"let the device answer: make smoke DEVICE={device} HOST=user@address, or `edgesafe smoke` on it; "
        f"or let this machine: edgesafe smoke BUNDLE",
    )


def check_host() -> None:
    """Refuse, before any work, a machine that can't emulate.

    Raises:
        DeviceError: It is no Linux, an Arm itself, lacks packages or rights; all that is missing is named.
    """
    if sys.platform != "linux" or platform.machine() == "aarch64":
        raise DeviceError(
            "a board is emulated on Linux of another processor alone",
            where=f"{sys.platform}, {platform.machine()}",
            todo="name a board: HOST=user@address, or let this machine answer: edgesafe smoke BUNDLE",
        )
    missing = [name for name, file in PACKAGES.items() if not file.exists()]
    root = os.geteuid() == 0
    if missing or not root:
        wrong = ([f"the Debian packages {' and '.join(missing)} are missing"] if missing else []) + (
            [] if root else ["root's rights are missing, without which nothing can be mounted"]
        )
        todo = [f"apt-get install {' '.join(missing)}"] if missing else []
        todo += [] if root else ["run it as root: sudo make smoke"]
        raise DeviceError("; ".join(wrong), where="emulating a board here", todo="; ".join(todo))
    tried = subprocess.run(_binfmt("test -w register"), capture_output=True, text=True, check=False)
    if tried.returncode:
        raise DeviceError(
            f"Linux's binfmt_misc can't be used: {(tried.stderr or 'no message').strip()}",
            where=_BINFMT,
            expected="a machine or a privileged container where root may mount it",
            todo="modprobe binfmt_misc, or name a board: HOST=user@address",
        )


@contextmanager
def emulated(board: Board, root: Path, machine: Path, cpu: str | None = None) -> Iterator[Shell]:
    """The shell of an emulated board.

    Args:
        board: What is emulated.
        root: The system that it runs, of `arm64_root`.
        machine: A folder for what Linux says of the board.
        cpu: Another of QEMU's processors than the board's.
    """
    cpu = cpu or board.cpu
    name = write_machine(board, machine, cpu)
    words = (*_ALONE, "sh", "-euc", _ENTER, "sh", *map(str, (root.absolute(), machine.absolute(), cpu, board.page)))
    with registered():
        yield Shell(name, words)


def write_machine(board: Board, machine: Path, cpu: str) -> str:
    """Write what Linux says of the board; the name there, which no real board has, so that nothing of it counts for one."""
    text = board.cpuinfo.read_text(encoding="ascii")
    (model,) = (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("Model"))
    name = f"{model}, emulated by QEMU {_version()} as {cpu}"
    cpus = machine / "sys" / "devices" / "system" / "cpu"
    cpus.mkdir(parents=True, exist_ok=True)
    (machine / "cpuinfo").write_text(text.replace(model, name), encoding="ascii")
    for file in ("possible", "present", "online"):
        (cpus / file).write_text(f"0-{board.cores - 1}\n", encoding="ascii")
    return name


@contextmanager
def registered() -> Iterator[None]:
    """Programs of 64-bit Arm run by QEMU meanwhile, also those that other programs start.

    A process of its own holds the registration, and takes it back when this one ends, however it ends.
    """
    entry = f":{(name := f'edgesafe-{os.getpid()}')}:M::{_MAGIC}:{_MASK}:{QEMU}:F"
    script = f"""trap '' INT; printf %s '{entry}' > register && echo held && read -r _; echo -1 > {name}"""
    with subprocess.Popen(_binfmt(script), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
        assert holder.stdin is not None and holder.stdout is not None and holder.stderr is not None
        try:
            if not holder.stdout.readline():
                raise DeviceError(f"QEMU can't be registered: {holder.stderr.read().decode().strip()}", where=_BINFMT)
            yield
        finally:
            holder.stdin.close()


def _binfmt(script: str) -> list[str]:
    """The command of a script in binfmt_misc's folder; where it isn't mounted, it is for this script alone."""
    text = f"cd {_BINFMT} && {{ [ -e register ] || mount -t binfmt_misc none .; }} && cd {_BINFMT} && {script}"
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", text]


def _version() -> str:
    """QEMU's version, such as 7.2.22."""
    shown = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=False).stdout.split()
    return shown[shown.index("version") + 1] if "version" in shown else "of an unknown version"


def lanes() -> list[tuple[str, ...]]:
    """One prefix for each of the commands that may run at the same time: a core each, where there are two."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    return [("taskset", "-c", str(core)) for core in cores] if shutil.which("taskset") else [()]
