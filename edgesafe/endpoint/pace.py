"""When the next request may go: so many a minute, and none while the server asks to wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Stopped(Exception):
    """The run ends: nothing more is asked."""


class Pace:
    """Turns for the threads of one run.

    Args:
        per_minute: The most requests that begin in a minute; None for no limit.
        clock: Seconds of a clock that never goes back.
    """

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = 60 / per_minute if per_minute else 0.0
        self._clock = clock
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._next = self._closed_until = clock()

    def turn(self) -> None:
        """Wait until this thread may send a request.

        Raises:
            Stopped: The run ends.
        """
        with self._lock:
            at = max(self._next, self._clock())
            self._next = at + self._every
        while (left := max(at, self._closed_until) - self._clock()) > 0:
            self.wait(left)
        if self._stop.is_set():
            raise Stopped

    def pause(self, seconds: float) -> None:
        """No thread begins a request for so long: a server that is too busy for one is so for all."""
        self._closed_until = max(self._closed_until, self._clock() + seconds)

    def wait(self, seconds: float) -> None:
        """Sleep, until the run ends.

        Raises:
            Stopped: It does.
        """
        if self._stop.wait(seconds):
            raise Stopped

    def stop(self) -> None:
        """Begin no more requests."""
        self._stop.set()
