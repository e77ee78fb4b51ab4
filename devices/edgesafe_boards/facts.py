"""What a board is, asked before anything is copied, and whether the bundle can run on it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgesafe.errors import DeviceError
from edgesafe_boards.shell import Shell

FOLDER = "edgesafe-board"  # in the home folder of the board's user
MACHINES = ("aarch64", "x86_64")
OLDEST = (3, 11)
_GLIBC = (2, 28)
_APT = "sudo apt install python3 python3-venv"
# Plain sh and one Python, which may be missing or old. Nothing is written but an empty folder, where the home can be.
_ASK = f"""
echo "system=$(uname -s)"
echo "machine=$(uname -m)"
echo "bits=$(getconf LONG_BIT 2>/dev/null)"
echo "disk=$(df -Pk . | tail -n 1)"
echo "memory=$(grep MemAvailable /proc/meminfo 2>/dev/null)"
echo "python=$(python3 -c 'import platform, struct, sys
try:
    import ensurepip, venv
    able = "venv"
except ImportError:
    able = "none"
print(sys.version_info[0], sys.version_info[1], 8 * struct.calcsize("P"), able, *platform.libc_ver())' 2>/dev/null)"
for tool in tar sha256sum find; do command -v $tool >/dev/null || echo "lacks=$tool"; done
mkdir -p {FOLDER} && touch {FOLDER}/tried && rm {FOLDER}/tried && echo "writable=yes"
echo "installed=$(cat {FOLDER}/ready 2>/dev/null)"
echo "bundle=$(cd {FOLDER}/bundle 2>/dev/null && cat manifest.json certificate.json | sha256sum)"
"""


@dataclass(frozen=True)
class Facts:
    """What a board said. ``python`` is its version, () where there is none; sizes are bytes, None where it doesn't tell.

    ``installed`` is the key of the wheels that are installed there, ``bundle`` that of the bundle.
    """

    system: str
    machine: str
    bits: int
    python: tuple[int, ...]
    venv: bool
    libc: str
    disk: int | None
    memory: int | None
    writable: bool
    lacks: tuple[str, ...] = ()
    installed: str = ""
    bundle: str = ""

    @property
    def python_text(self) -> str:
        """Such as ``3.11``."""
        return ".".join(map(str, self.python))


@dataclass(frozen=True)
class Needs:
    """Bytes of disk and of memory that a bundle takes on a board."""

    disk: int
    memory: int


def ask(shell: Shell) -> Facts:
    """Ask a board.

    Raises:
        DeviceError: It can't be reached, or has no ``sh``.
    """
    return read(shell.run(_ASK, "asking what the board is").text)


def read(text: str) -> Facts:
    """The facts in the answer of a board."""
    lines = [line.partition("=") for line in text.splitlines()]
    told = {key: value.strip() for key, _, value in lines}
    python = told.get("python", "").split() or ["0", "0", "0", "none"]
    whole = python[0] != "0"
    df = told.get("disk", "").split()
    memory = re.search(r"\d+", told.get("memory", ""))
    # A 32-bit system may run on a 64-bit kernel; then its programs are 32-bit ones.
    bits = int(python[2]) if whole else int(told.get("bits") or 0)
    return Facts(
        system=told.get("system", ""),
        machine=told.get("machine", ""),
        bits=bits,
        python=(int(python[0]), int(python[1])) if whole else (),
        venv=python[3] == "venv",
        libc=" ".join(python[4:]),
        disk=1024 * int(df[3]) if len(df) > 3 and df[3].isdecimal() else None,
        memory=1024 * int(memory[0]) if memory else None,
        writable="writable" in told,
        lacks=tuple(value for key, _, value in lines if key == "lacks"),
        installed=told.get("installed", ""),
        bundle=told.get("bundle", "").split(" ")[0],
    )


def check_system(facts: Facts, where: str) -> None:
    """Refuse a board that can't run edgesafe at all.

    Raises:
        DeviceError: Its architecture, its system, its Python or its home folder doesn't fit.
    """

    def refusal(what: str, expected: str, todo: str) -> DeviceError:
        return DeviceError(what, where=where, expected=expected, todo=todo)

    if facts.system != "Linux" or facts.machine not in MACHINES or facts.bits == 32:
        bits = " with 32-bit programs" if facts.bits == 32 else ""
        raise refusal(
            f"the board is {facts.system or 'an unknown system'} on {facts.machine or 'an unknown processor'}{bits}",
            f"64-bit Linux on {' or '.join(MACHINES)}: onnxruntime has no wheels for others",
            "write a 64-bit system to its card, such as Raspberry Pi OS (64-bit)",
        )
    if not facts.python:
        raise refusal("the board has no Python", f"Python {_dotted(OLDEST)} or newer as python3", f"on the board: {_APT}")
    if facts.python < OLDEST:
        raise refusal(
            f"the board's Python is {facts.python_text}", f"{_dotted(OLDEST)} or newer", "install a newer system on it"
        )
    if not facts.venv:
        raise refusal("the board's Python can't make environments", "its modules venv and ensurepip", f"on the board: {_APT}")
    if not _new_enough(facts.libc):
        raise refusal(
            f"the board's C library is {facts.libc or 'unknown'}",
            f"glibc {_dotted(_GLIBC)} or newer: onnxruntime has no wheels for others",
            "install a system such as Debian or Raspberry Pi OS on it",
        )
    if facts.lacks:
        raise refusal(
            f"the board has no {' and no '.join(facts.lacks)}", "tar, coreutils and findutils", "install them on the board"
        )


def check_room(facts: Facts, needs: Needs, where: str) -> None:
    """Refuse a board with too little room.

    Raises:
        DeviceError: Its disk or its memory is too small, or its home folder can't be written.
    """
    if facts.disk is not None and facts.disk < needs.disk:
        raise DeviceError(
            f"the board's disk has {_mb(facts.disk)} free",
            where=where,
            expected=f"{_mb(needs.disk)} for the bundle and its Python environment",
            todo="make room on the board: nothing was copied",
        )
    if not facts.writable:
        raise DeviceError(
            "the home folder on the board can't be written",
            where=where,
            expected=f"room for a folder {FOLDER}",
            todo="look at `df -h ~` and `ls -ld ~` there: nothing was copied",
        )
    if facts.memory is not None and facts.memory < needs.memory:
        raise DeviceError(
            f"the board has {_mb(facts.memory)} of free memory",
            where=where,
            expected=f"{_mb(needs.memory)} to open the bundle",
            todo="end other programs on the board, or export a smaller model: nothing was copied",
        )


def _new_enough(libc: str) -> bool:
    found = re.fullmatch(r"glibc (\d+)\.(\d+).*", libc)
    return bool(found) and (int(found[1]), int(found[2])) >= _GLIBC if found else False


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
