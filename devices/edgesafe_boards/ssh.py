"""A board at the end of a network: one connection of OpenSSH, which asks for a password once, if at all."""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgesafe.errors import ConfigError, DeviceError, EdgesafeError
from edgesafe_boards.shell import Shell

_ADDRESS = re.compile(r"(ssh://)?([\w.+-]+@)?(\[[0-9A-Fa-f:.%\w]+\]|[\w.:-]+)(:\d+)?")
# A board that is silent for so long is gone: 15 s to connect, three unanswered questions 10 s apart later on.
_PATIENCE = ("ConnectTimeout=15", "ServerAliveInterval=10", "ServerAliveCountMax=3")
_LOOK_S = 0.2
_LOST = 255  # what ssh itself ends with; a script's own code comes through
_BEGINS = "edgesafe begins here\n"
_MEANT = (
    ("permission denied", "the board refuses the login", "check user, password and key: ssh {address}"),
    ("too many authentication", "the board refuses the login", "check user, password and key: ssh {address}"),
    ("host key", "the board's key is not known here, or is another one", "connect once by hand and look at it: ssh {address}"),
    ("could not resolve", "there is no such address", "check HOST=user@address"),
)


@contextmanager
def connected(address: str, ssh: str = "ssh") -> Iterator[Shell]:
    """The shell of a board.

    Args:
        address: As ssh takes it: ``user@address``, or ``ssh://user@address:port``.
        ssh: The command, with options of your own.

    Raises:
        ConfigError: The address or the command is none.
        DeviceError: The board can't be reached, or refuses the login.
    """
    check_address(address)
    with tempfile.TemporaryDirectory(prefix="edgesafe-") as folder:
        options = [word for option in (*_PATIENCE, f"ControlPath={folder}/s") for word in ("-o", option)]
        base = [*shlex.split(ssh), *options]
        with _held(base, address, Path(folder) / "errors"):
            # Without the held connection these must fail: nobody is there to be asked for a password any more.
            words = [*base, "-o", "ControlMaster=no", "-o", "BatchMode=yes", "-T", address]
            yield Shell(
                address,
                tuple(words),
                lambda script: "exec sh -c " + shlex.quote(f"printf %s '{_BEGINS}'\n{script}"),
                _BEGINS.encode(),
                lambda code, errors: broken(address, errors) if code == _LOST else None,
            )


@contextmanager
def _held(base: list[str], address: str, log: Path) -> Iterator[None]:
    """The one connection that the others use; whoever logs in may be asked for a password meanwhile."""
    try:
        with log.open("wb") as errors:
            held = subprocess.Popen([*base, "-o", "ControlMaster=yes", "-N", address], stdout=subprocess.DEVNULL, stderr=errors)
    except OSError as error:
        what, todo = f"{base[0]} can't be run: {error.strerror}", "apt-get install openssh-client"
        raise ConfigError(what, where="SSH", expected="OpenSSH's client", todo=todo) from error
    try:
        while subprocess.run([*base, "-O", "check", address], capture_output=True, check=False).returncode:
            if held.poll() is not None:
                raise broken(address, log.read_text(errors="replace"))
            time.sleep(_LOOK_S)
        yield
    finally:
        subprocess.run([*base, "-O", "exit", address], capture_output=True, check=False)
        held.terminate()
        held.wait()


def check_address(address: str) -> None:
    """Refuse what ssh would take for an option, or what is no address.

    Raises:
        ConfigError: It is refused.

    >>> check_address("pi@raspberrypi.local"), check_address("ssh://pi@192.168.1.7:2222")
    (None, None)
    >>> check_address("-oProxyCommand=x")
    Traceback (most recent call last):
    edgesafe.errors.ConfigError: '-oProxyCommand=x' is not a board's address (HOST). Expected: ... To do: ...
    """
    found = _ADDRESS.fullmatch(address)
    if not found or address.startswith("-") or found[3].startswith("-"):
        raise ConfigError(
            f"{address!r} is not a board's address",
            where="HOST",
            expected="user@address, or ssh://user@address:port",
            todo="name one that `ssh` takes, or leave it out to emulate the board here",
        )


def broken(address: str, errors: str) -> EdgesafeError:
    """What ssh's errors mean."""
    lines = [line.strip() for line in errors.splitlines() if line.strip() and not line.startswith("@")]
    last = lines[-1] if lines else "no message"
    for mark, what, todo in _MEANT:
        if any(mark in line.lower() for line in lines):
            return DeviceError(f"{what}: {last}", where=address, todo=todo.format(address=address))
    return DeviceError(
        f"the board can't be reached, or the connection broke: {last}",
        where=address,
        todo="check that it is on and reachable, then run it again: it continues",
    )
