"""A board at the end of a network without a network: sshd on this machine, rooted in the emulated board's system."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgesafe_boards.emulated import BOARDS, QEMU, registered, write_machine

# Accounts that this machine has in the server's own view alone: a clean one, and one whose home has little room.
USERS, PASSWORD, SMALL = {"guest": 4001, "small": 4002}, "right", "60m"
# sshd wants a root that nobody else can write, from / on: /mnt, which in this view is the board's system.
_SERVE = """
mount --bind "$1" /mnt && mount -t proc proc /mnt/proc && mount --rbind /dev /mnt/dev
mount --bind "$2/machine/cpuinfo" /mnt/proc/cpuinfo && mount --bind "$2/machine/sys" /mnt/sys
mount --bind "$2/fakes" /mnt/usr/local/bin && mount --bind "$2/homes" /mnt/home
mount -t tmpfs -o size=$3,mode=0755,uid=$4,gid=$4 small /mnt/home/small
mount --bind "$2/passwd" /etc/passwd && mount --bind "$2/shadow" /etc/shadow
mount -t tmpfs run /run && mkdir /run/sshd
exec /usr/sbin/sshd -D -e -f "$2/sshd_config"
"""


@dataclass(frozen=True)
class Loopback:
    """The server: ``ssh`` is the command that reaches it by key, ``by_password`` the one that knows a password only."""

    port: int
    work: Path
    process: subprocess.Popen[bytes]

    @property
    def ssh(self) -> str:
        known = f"-o UserKnownHostsFile={self.work}/known -o StrictHostKeyChecking=accept-new"
        return f"ssh -F none -p {self.port} {known} -i {self.work}/key -o IdentitiesOnly=yes"

    def by_password(self, password: str) -> str:
        return f"sshpass -p {password} {self.ssh} -o PubkeyAuthentication=no"

    def home(self, user: str = "guest") -> Path:
        return self.work / "homes" / user

    def fake(self, name: str, script: str | None) -> None:
        """A program in front of the board's own; None takes it away."""
        file = self.work / "fakes" / name
        if script is None:
            file.unlink(missing_ok=True)
            return
        file.write_text(f"#!/bin/sh\n{script}\n", encoding="ascii")
        file.chmod(0o755)

    def cut(self) -> int:
        """Break every connection: the number of processes that were ended."""
        server = _children(self.process.pid)[0]
        sessions = _children(server)
        for session in sessions:
            for process in (*_children(session), session):
                subprocess.run(["kill", "-9", str(process)], check=False)
        return len(sessions)


@contextmanager
def loopback(root: Path, work: Path) -> Iterator[Loopback]:
    """Serve as long as the block runs."""
    shutil.rmtree(work, ignore_errors=True)
    for folder in ("fakes", "homes"):
        (work / folder).mkdir(parents=True)
    write_machine(BOARDS["rpi5"], work / "machine", BOARDS["rpi5"].cpu)
    for name in ("key", "hostkey"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(work / name)], check=True)
    for user, number in USERS.items():
        home = work / "homes" / user
        home.mkdir()
        shutil.chown(home, number, number)
    _accounts(work)
    port = _config(work)
    words = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "sh", "-euc", _SERVE, "sh"]
    words += [str(root.absolute()), str(work.absolute()), SMALL, str(USERS["small"])]
    with registered(), (work / "sshd.log").open("wb") as log, subprocess.Popen(words, stderr=log) as process:
        try:
            _wait(port, process, work / "sshd.log")
            yield Loopback(port, work.absolute(), process)
        finally:
            process.kill()


def _accounts(work: Path) -> None:
    hashed = subprocess.run(["openssl", "passwd", "-6", PASSWORD], capture_output=True, text=True, check=True).stdout.strip()
    passwd, shadow = Path("/etc/passwd").read_text(), "root:*:19000:0:99999:7:::\nsshd:*:19000:0:99999:7:::\n"
    for user, number in USERS.items():
        passwd += f"{user}:x:{number}:{number}::/home/{user}:/bin/sh\n"
        shadow += f"{user}:{hashed}:19000:0:99999:7:::\n"
    (work / "passwd").write_text(passwd)
    (work / "shadow").write_text(shadow)
    (work / "shadow").chmod(0o600)


def _config(work: Path) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    keys = work.absolute()
    board = BOARDS["rpi5"]
    # The keys lie where only root can write, or sshd wouldn't take them; a scratch folder's parents may be anyone's.
    text = f"""
Port {port}
ListenAddress 127.0.0.1
HostKey {keys}/hostkey
AuthorizedKeysFile {keys}/key.pub
StrictModes no
UsePAM no
PasswordAuthentication yes
ChrootDirectory /mnt
SetEnv QEMU_CPU={board.cpu} QEMU_PAGESIZE={board.page} LANG=C.UTF-8
"""
    (work / "sshd_config").write_text(text)
    assert QEMU.exists()
    return port


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(100):
        if process.poll() is not None:
            raise SystemExit(f"sshd doesn't start: {log.read_text()}")
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit(f"sshd doesn't answer: {log.read_text()}")


def _children(process: int) -> list[int]:
    return [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True).stdout.split()]
