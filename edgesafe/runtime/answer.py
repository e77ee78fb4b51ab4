"""An answer, all that is known about how it came about, and the ways to wait for it: a stream of text, or a pending answer."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from edgesafe.errors import InputError
from edgesafe.format.exits import Exit
from edgesafe.format.latency import ESTIMATED
from edgesafe.machine import on_cores
from edgesafe.runtime.forecast import MEASURE
from edgesafe.runtime.turns import Cancel, Turn, check_process

A = TypeVar("A")


@dataclass(frozen=True)
class Answer:
    """The answer's text and how it came about.

    ``certified`` is whether the exit has a passed verdict and the answer is one of those that it speaks for
    (`edgesafe.runtime.scope`), which is known at its end; ``note`` says why not.
    ``finish_reason`` is ``stop`` (the model ended), ``length`` or ``deadline`` (cut before the budget's
    ``total_ms``). Times are ms from the call. ``prediction`` says what ``predicted_ttft_ms`` rests on
    (``measured``, ``estimated``, or ``none`` with None). ``note`` is empty or says what the caller should know.
    ``why`` tells why this exit, ``planned_exit`` which one the budget was predicted to allow before any ran, and
    ``deadline_met`` whether its times were kept; both are None without a budget. ``predicted_ms`` and
    ``actual_ms`` are by stage: ``preprocess``, the vision graphs, ``prefill`` and ``decode`` (predicted: one
    token's; actual: all of them), and the actual ones begin with ``wait``, the time until it was this request's turn. The
    predicted ones are medians, corrected by what was known then, so they don't add up to ``predicted_ttft_ms``, which is
    at the budget's quantile; both leave out the waiting. ``reference`` is the exit that the model was trained to use, and
    ``estimated_for`` the device whose profile an estimate is for, else empty. ``source`` is ``hub:ORG/NAME@COMMIT`` where the
    bundle is from the hub, else empty.
    """

    text: str
    finish_reason: str
    exit: Exit
    certified: bool
    predicted_ttft_ms: float | None
    prediction: str
    ttft_ms: float
    total_ms: float
    note: str = ""
    why: str = ""
    planned_exit: Exit | None = None
    deadline_met: bool | None = None
    predicted_ms: dict[str, float] = field(default_factory=dict)
    actual_ms: dict[str, float] = field(default_factory=dict)
    reference: Exit | None = None
    estimated_for: str = ""
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the fields, with exits as their text."""
        return {name: str(value) if isinstance(value, Exit) else value for name, value in vars(self).items()}


def describe(answer: Answer) -> str:
    """An answer's exit, verdict and times in a line; more lines say whether a budget was kept, and the notes.

    >>> print(describe(Answer("a cat", "stop", Exit(6), True, 2.31, "estimated", 23.1, 108.9, reference=Exit(12),
    ...     estimated_for="Raspberry Pi 5, 8 GB")))  # doctest: +NORMALIZE_WHITESPACE
    exit 6 of 12, certified; first token after 23 ms (estimated at least 2 ms for a Raspberry Pi 5; run `edgesafe measure`);
    109 ms in all, ended by stop
    """
    of = f" of {answer.reference}" if answer.reference else ""
    line = (
        f"exit {answer.exit}{of}, {'certified' if answer.certified else 'NOT CERTIFIED'}; "
        f"first token after {_shown_ms(answer.ttft_ms)}{_predicted(answer)}; "
        f"{_shown_ms(answer.total_ms)} in all, ended by {answer.finish_reason}"
    )
    lines = [line]
    if answer.deadline_met is not None:
        lines.append(f"budget {'kept' if answer.deadline_met else 'MISSED'}; this exit because {answer.why}")
    # What the first line says already is not repeated.
    notes = [note for note in answer.note.split("; ") if note and not note.endswith(MEASURE)]
    return "\n".join([*lines, *([f"note: {'; '.join(notes)}"] if notes else [])])


def _predicted(answer: Answer) -> str:
    todo = f"run `{MEASURE.removeprefix('run ')}`"
    if answer.predicted_ttft_ms is None:
        return f" (nothing predicts it here; {todo})" if answer.note.endswith(MEASURE) else ""
    if answer.prediction == ESTIMATED:
        return f" (estimated at least {_shown_ms(answer.predicted_ttft_ms)} for {_a_device(answer.estimated_for)}; {todo})"
    return f" (predicted {_shown_ms(answer.predicted_ttft_ms)} by a measurement on this machine)"


def _a_device(title: str) -> str:
    """A profile's title within a sentence, without what it says in brackets or after a comma.

    >>> [_a_device(t) for t in ("Raspberry Pi 5, 8 GB", "NVIDIA Jetson Orin Nano, 8 GB (CPU)", "this machine", "")]
    ['a Raspberry Pi 5', 'an NVIDIA Jetson Orin Nano', 'this machine', 'the device']
    """
    name = title.partition(",")[0].partition("(")[0].strip()
    if not name or name.lower().startswith(("this ", "the ", "a ", "an ")):
        return name or "the device"
    word = name.split()[0]
    # Letters whose names begin with a vowel, where a word is spelled out.
    vowels = "AEFHILMNORSX" if word.isupper() and word.isalpha() else "AEIOaeio"
    return f"{'an' if word[0] in vowels else 'a'} {name}"


def _shown_ms(ms: float) -> str:
    """A time as a person reads it: to the millisecond, below one to a tenth.

    >>> _shown_ms(23.1), _shown_ms(0.96), _shown_ms(0.94), _shown_ms(0.04)
    ('23 ms', '1 ms', '0.9 ms', '0.0 ms')
    """
    return f"{ms:.1f} ms" if ms < 0.95 else f"{ms:.0f} ms"


class AnswerStream(Generic[A]):
    """Yields the answer's text piece by piece; ``answer`` is there once it has ended.

    It holds the session's turn until it has ended, is closed, or is garbage: requests of other threads wait for that. Its work
    is done in the reader's thread, which is kept on ``cores`` meanwhile (None = any).
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
        if self._turn.forked:
            self._turn.check()
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
            CancelledError, ClosedError: The request was cancelled or the session closed before the answer had ended.
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
        if self._turn.forked:
            return
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
        if self._turn.forked:
            return  # the step that was running runs in the parent, and there it ends
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
        self._process = os.getpid()
        self._future: Future[A] = Future()
        # Running from the start: a pending future could be cancelled behind the back of the line of requests.
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
            TimeoutError: It took longer; the request continues.
            EdgesafeError: What ``ask`` raises.
        """
        self._check_process()
        return self._future.result(timeout_s)

    def done(self) -> bool:
        """Whether there is an answer or an error."""
        return self._future.done()

    def cancel(self) -> None:
        """End it from any thread, waiting in line or running; ``result()`` then raises ``CancelledError``."""
        self._cancel.cancel()

    def __await__(self) -> Generator[object, None, A]:
        return self._wait().__await__()

    def _check_process(self) -> None:
        if not self._future.done():  # its thread doesn't live in a fork
            check_process(self._process)

    async def _wait(self) -> A:
        self._check_process()
        import asyncio  # here alone: it takes as long to import as the rest of the runtime

        try:
            return await asyncio.wrap_future(self._future)
        except asyncio.CancelledError:
            self.cancel()
            raise
