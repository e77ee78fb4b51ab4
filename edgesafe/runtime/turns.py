"""Who may run when: a session answers one request at a time, in the order in which they were asked."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from edgesafe.errors import BusyError, CancelledError, ClosedError, InputError

WAIT, REFUSE = "wait", "refuse"


@dataclass(frozen=True)
class Progress:
    """How far a request is: ``done`` of at most ``total`` steps of a stage, ``vision`` (graphs) or ``decode`` (tokens)."""

    stage: str
    done: int
    total: int


class Cancel:
    """Ends a request from any thread, waiting or running, before its next step; once and for good."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._wakes: list[Callable[[], None]] = []
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """The request raises ``CancelledError`` at its next step: after the graph that is running, so within one token."""
        with self._lock:
            self._cancelled = True
            wakes = list(self._wakes)
        for wake in wakes:
            wake()

    def add(self, wake: Callable[[], None]) -> None:
        """Call this on ``cancel``."""
        with self._lock:
            self._wakes.append(wake)

    def remove(self, wake: Callable[[], None]) -> None:
        """Don't call it any more."""
        with self._lock:
            self._wakes.remove(wake)


class Turns:
    """The line of requests; the first in it runs.

    Args:
        when_busy: ``wait`` lets a request stand in line, ``refuse`` raises ``BusyError`` where another one is there.
    """

    def __init__(self, when_busy: str) -> None:
        if when_busy not in (WAIT, REFUSE):
            raise InputError(f"when_busy is {when_busy!r}", expected=f"{WAIT!r} or {REFUSE!r}")
        self._refuse = when_busy == REFUSE
        self._process = os.getpid()
        # Re-entrant (Condition's default), because a stream that is garbage leaves the line from wherever it is collected.
        self._changed = threading.Condition()
        self._line: deque[Turn] = deque()
        self._closed = False

    @property
    def forked(self) -> bool:
        """Whether this copy is in a fork of the process that made it. Its locks may be held by threads that aren't here."""
        return os.getpid() != self._process

    def enter(self, cancel: Cancel | None = None, tell: Callable[[Progress], None] | None = None) -> Turn:
        """Stand in line; ``Turn.wait`` is the waiting.

        Raises:
            BusyError: Another request is in the line, and this one is not to wait.
            ClosedError: The session is closed, or of another process.
        """
        self.check_open()  # before any lock: a fork may have copied it while it was held
        turn = Turn(self, cancel or Cancel(), tell)
        with self._changed:
            self.check_open()
            if self._line and self._refuse:
                raise BusyError("another answer is being made", expected="one request at a time", todo="ask again later")
            self._line.append(turn)
        turn.cancel.add(self.wake)
        return turn

    def wait(self, turn: Turn) -> None:
        """Block until the turn is first in the line; it leaves the line where it raises."""
        check_process(self._process)
        me = threading.get_ident()
        try:
            with self._changed:
                first = self._line[0]
                if first is not turn and first.thread == me:
                    raise BusyError(
                        "this thread has an answer that hasn't ended, and would wait for itself",
                        expected="a stream that was read to its end or closed",
                        todo="read or close it before asking again",
                    )
                self._changed.wait_for(lambda: self._closed or turn.cancel.cancelled or self._line[0] is turn)
                turn.thread = me
                turn.check()
        except BaseException:
            turn.leave()
            raise

    def remove(self, turn: Turn) -> None:
        """Out of the line, wherever in it; twice does nothing, and so it does in a fork."""
        if self.forked:
            return
        with self._changed:
            if turn not in self._line:
                return
            self._line.remove(turn)
            self._changed.notify_all()
        turn.cancel.remove(self.wake)

    def wake(self) -> None:
        """Let every waiting request look again."""
        if self.forked:
            return
        with self._changed:
            self._changed.notify_all()

    def check_open(self) -> None:
        """Raise ``ClosedError`` where the session is closed, or of another process."""
        check_process(self._process)
        if self._closed:
            raise ClosedError("the session was closed", todo="open the bundle again")

    def close(self) -> None:
        """Let nothing in any more, end what runs at its next step and wait for that; what waits in line ends by itself.

        A request whose own callback closes the session ends after the callback has returned, so it is not waited for. In a fork
        there is nobody to wait for.
        """
        if self.forked:
            self._closed = True
            return
        me = threading.get_ident()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            line = list(self._line)
        for turn in line:
            turn.abandon()
        with self._changed:
            self._changed.wait_for(lambda: all(turn.thread in (None, me) for turn in self._line))


def check_process(process: int) -> None:
    """Refuse to continue in a fork: the engine's threads live in the process that opened the session, and there alone.

    Args:
        process: The number of that process.

    Raises:
        ClosedError: This is another one.
    """
    if os.getpid() != process:
        raise ClosedError(
            f"the session was opened in process {process}, and this is a fork of it, process {os.getpid()}",
            expected="a session that this process opened",
            todo="open the bundle in the child, after the fork, or start processes with 'spawn'",
        )


class Turn:
    """One request's place in the line, its cancel switch and its progress callback."""

    def __init__(self, turns: Turns, cancel: Cancel, tell: Callable[[Progress], None] | None) -> None:
        self.cancel = cancel
        self.thread: int | None = None
        # What ends the request where nobody drives it: a stream that was left unread.
        self.abandon: Callable[[], None] = lambda: None
        self._turns, self._tell = turns, tell

    @property
    def forked(self) -> bool:
        """See ``Turns``."""
        return self._turns.forked

    def wait(self) -> None:
        """Block until it is this request's turn.

        Raises:
            CancelledError, ClosedError: That happened meanwhile.
            BusyError: The request ahead is this thread's own unread stream.
        """
        self._turns.wait(self)

    def leave(self) -> None:
        """Let the next one run."""
        self._turns.remove(self)

    def step(self, stage: str, done: int, total: int) -> None:
        """Between two graphs: tell how far it is, then continue or raise.

        Raises:
            CancelledError, ClosedError: That happened meanwhile.
        """
        if self._tell is not None:
            self._tell(Progress(stage, done, total))
        self.check()

    def check(self) -> None:
        """Raise where the request was cancelled or the session closed."""
        self._turns.check_open()
        if self.cancel.cancelled:
            raise CancelledError("the request was cancelled", todo="ask again")

    def __enter__(self) -> Turn:
        self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
