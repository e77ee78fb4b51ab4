"""The one queue: a request runs, some wait, and more are told when to come back."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from http import HTTPStatus

from edgesafe.errors import BusyError
from edgesafe.serve.wire import Refused

WAITING = 8
MOST_RETRY_S = 60
# The bodies of all requests that are read or wait: five of the largest, or hundreds with a phone's picture made smaller.
MOST_BODIES = 128 << 20
# The share of the newest answer in the time that the next one is expected to take.
_NEWEST = 0.3


class Line:
    """Counts the requests that run or wait for the session; the session itself keeps their order.

    Args:
        waiting: How many may wait beside the one that runs.
    """

    def __init__(self, waiting: int = WAITING) -> None:
        self.room, self.held = 1 + waiting, 0
        self._lock = threading.Lock()
        self._typical_s, self._bodies = 1.0, 0

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place in the line for as long as the block runs.

        Raises:
            Refused: It is full: 429, with ``Retry-After`` from what answers took lately.
        """
        with self._lock:
            if self.held >= self.room:
                error = BusyError("the queue is full", expected=f"at most {self.room} requests at once", todo="ask again later")
                raise Refused(HTTPStatus.TOO_MANY_REQUESTS, error, Retry_After=str(self._retry_s()))
            self.held += 1
        try:
            yield
        finally:
            with self._lock:
                self.held -= 1

    @contextlib.contextmanager
    def body(self, size: int) -> Iterator[None]:
        """Memory for a body of so many bytes, for as long as the block runs.

        Raises:
            Refused: Others hold too much of it: 429.
        """
        with self._lock:
            if self._bodies + size > MOST_BODIES:
                error = BusyError("too many large requests at once", todo="ask again later")
                raise Refused(HTTPStatus.TOO_MANY_REQUESTS, error, Retry_After=str(self._retry_s()))
            self._bodies += size
        try:
            yield
        finally:
            with self._lock:
                self._bodies -= size

    def took(self, seconds: float) -> None:
        """Learn how long an answer took, the waiting left out."""
        with self._lock:
            self._typical_s += _NEWEST * (seconds - self._typical_s)

    def _retry_s(self) -> int:
        return min(MOST_RETRY_S, max(1, math.ceil(self._typical_s * self.held)))
