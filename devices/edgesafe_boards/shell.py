"""A board's shell: all that the steps need of a board, whether it is emulated here or stands at the end of a network."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import IO

from edgesafe.errors import DeviceError, EdgesafeError

FULL, _NO_SPACE = "the board's disk is full", "No space left on device"
_LAST = 12  # lines of a command's errors that are worth repeating
_running: set[subprocess.Popen[bytes]] = set()


def stop() -> None:
    """End every script that still runs, in whatever thread."""
    for process in list(_running):
        process.kill()


@dataclass(frozen=True)
class Done:
    """How a script ended: its exit code, its standard output, and its errors."""

    code: int
    out: bytes
    errors: str

    @property
    def text(self) -> str:
        """The standard output as text."""
        return self.out.decode(errors="replace")


@dataclass(frozen=True)
class Shell:
    """Runs scripts of ``sh`` in the home folder of a board's user.

    Args:
        name: The board in words.
        words: The command on this machine that a script is added to.
        quote: How a script becomes a word of it; ssh hands its words to another shell.
        begins: What the script's output begins with; a shell that greets whoever logs in writes before it.
        broken: The error that an exit code and the errors mean where not the script failed, but the way to the board.
    """

    name: str
    words: tuple[str, ...]
    quote: Callable[[str], str] = str
    begins: bytes = b""
    broken: Callable[[int, str], EdgesafeError | None] = lambda code, errors: None

    def run(
        self,
        script: str,
        what: str,
        *,
        feed: Callable[[IO[bytes]], None] | None = None,
        may_end: tuple[int, ...] = (0,),
        show: bool = False,
        todo: str = "",
        prefix: tuple[str, ...] = (),
    ) -> Done:
        """Run a script there to its end.

        Args:
            script: For ``sh``.
            what: What it does, for the error: "unpacking the bundle".
            feed: Writes the script's standard input.
            may_end: The exit codes that are results.
            show: Whether its errors, which are progress too, appear here as they come.
            todo: What a reader can do about a failure.
            prefix: Words before the command on this machine.

        Raises:
            DeviceError: The script ended with another code, or the board can't be reached.
        """
        done = _drive([*prefix, *self.words, self.quote(script)], feed, show)
        if done.code in may_end:
            return replace(done, out=done.out.partition(self.begins)[2]) if self.begins else done
        broken = self.broken(done.code, done.errors)
        if broken is not None:
            raise broken
        if _NO_SPACE in done.errors:
            raise DeviceError(f"{what}: {FULL}", where=self.name, todo="make room on it, then run it again")
        last = "\n".join((done.errors.strip() or done.text.strip()).splitlines()[-_LAST:])
        raise DeviceError(f"{what} ended with code {done.code}: {last or 'no message'}", where=self.name, todo=todo)


def _drive(words: list[str], feed: Callable[[IO[bytes]], None] | None, show: bool) -> Done:
    """Run a command while its input is written and its outputs are read; it ends with this function, however that ends."""
    stdin = subprocess.PIPE if feed else subprocess.DEVNULL
    with subprocess.Popen(words, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        out, errors = bytearray(), bytearray()
        readers = [
            threading.Thread(target=_read, args=(process.stdout, out, False)),
            threading.Thread(target=_read, args=(process.stderr, errors, show)),
        ]
        for reader in readers:
            reader.start()
        _running.add(process)
        try:
            if feed and process.stdin is not None:
                # Where the other side stops reading, its exit code and its message say why.
                with contextlib.suppress(BrokenPipeError), process.stdin as stdin_file:
                    feed(stdin_file)
            process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            _running.discard(process)
            for reader in readers:
                reader.join()
    return Done(process.returncode, bytes(out), errors.decode(errors="replace"))


def _read(file: IO[bytes], kept: bytearray, show: bool) -> None:
    for line in file:
        kept += line
        if show:
            sys.stderr.write(line.decode(errors="replace"))
            sys.stderr.flush()
