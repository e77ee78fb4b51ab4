"""What an ask hands back: a stream of text, or a pending answer for threads and asyncio alike."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from edgesafe.errors import InputError
from edgesafe.machine import on_cores
from edgesafe.runtime.turns import Cancel, Turn

A = TypeVar("A")


class AnswerStream(Generic[A]):
    """Yields the answer's text piece by piece; ``answer`` is there once it has ended.

    It holds the session's turn until it has ended, is closed, or is garbage: asks of other threads wait for that. Its work is
    done in the reader's thread, which is kept on ``cores`` meanwhile (None = any).
    """

    def __init__(self, pieces: Generator[str | A, None, None], turn: Turn, cores: Sequence[int] | None = None) -> None:
        self._pieces = pieces
        self._turn = turn
        self._cores = cores
        self._answer: A | None = None
        self._lock = threading.Lock()
        self._driver: int | None = None
        here = weakref.ref(self)
        turn.abandon = lambda: _close(here)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        with self._driving():
            try:
                with on_cores(self._cores):
                    piece = next(self._pieces)
            except BaseException:
                self._turn.leave()
                raise
            if isinstance(piece, str):
                return piece
            self._answer = piece
            self._end()
            raise StopIteration

    @property
    def answer(self) -> A:
        """The whole answer; what is left of the stream is read first.

        Raises:
            CancelledError, ClosedError: The ask was cancelled or the session closed before the answer had ended.
            InputError: The stream was closed before its answer had ended.
        """
        for _ in self:
            pass
        if self._answer is None:
            raise InputError("the stream was closed before its answer ended", todo="read it to its end")
        return self._answer

    def cancel(self) -> None:
        """End it from any thread, before its next step; its reader gets ``CancelledError``."""
        self._turn.cancel.cancel()

    def close(self) -> None:
        """Give the rest up. From another thread it waits for the step that is running."""
        if self._driver == threading.get_ident():
            self._turn.cancel.cancel()  # called from the stream's own callback: it ends when that returns
            return
        with self._driving():
            self._end()

    def __enter__(self) -> AnswerStream[A]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        self._pieces.close()
        self._turn.leave()

    @contextlib.contextmanager
    def _driving(self) -> Iterator[None]:
        me = threading.get_ident()
        if self._driver == me:
            raise InputError("a stream's own callback can't read it", todo="read it where it was opened")
        with self._lock:
            self._driver = self._turn.thread = me
            try:
                yield
            finally:
                self._driver = None


def _close(here: weakref.ref[AnswerStream[A]]) -> None:
    stream = here()
    if stream is not None:
        stream.close()


class PendingAnswer(Generic[A]):
    """An answer that is being made in another thread: ``result()`` waits for it, and so does ``await``."""

    def __init__(self, work: Callable[[], A], cancel: Cancel) -> None:
        self._work = work
        self._cancel = cancel
        self._future: Future[A] = Future()
        # Running from the start: a pending future could be cancelled behind the back of the line of asks.
        self._future.set_running_or_notify_cancel()

    def run(self) -> None:
        """Make the answer; the session's worker calls it once."""
        try:
            self._future.set_result(self._work())
        except BaseException as error:
            self._future.set_exception(error)
        finally:
            del self._work

    def result(self, timeout_s: float | None = None) -> A:
        """Wait for the answer.

        Raises:
            TimeoutError: It took longer; the ask goes on.
            EdgesafeError: What ``ask`` raises.
        """
        return self._future.result(timeout_s)

    def done(self) -> bool:
        """Whether there is an answer or an error."""
        return self._future.done()

    def cancel(self) -> None:
        """End it from any thread, waiting in line or running; ``result()`` then raises ``CancelledError``."""
        self._cancel.cancel()

    def __await__(self) -> Generator[object, None, A]:
        return self._wait().__await__()

    async def _wait(self) -> A:
        import asyncio  # here alone: it takes as long to import as the rest of the runtime

        try:
            return await asyncio.wrap_future(self._future)
        except asyncio.CancelledError:
            self.cancel()
            raise
