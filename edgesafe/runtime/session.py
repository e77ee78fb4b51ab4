"""A bundle ready to answer: opens the graphs, chooses the exit, runs it and tells what it did."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from edgesafe.bundle import Bundle, ExitSpec
from edgesafe.certificate import Certificate, certified_depths, read_certificate
from edgesafe.device import profile_of
from edgesafe.errors import CertificateMismatchError, InputError
from edgesafe.runtime import tune
from edgesafe.runtime.allowed import allowed_exits
from edgesafe.runtime.answer import Answer
from edgesafe.runtime.anytime import Clock, Course, run_anytime
from edgesafe.runtime.asking import AnswerStream, PendingAnswer
from edgesafe.runtime.backend import Backend, OnnxRuntime
from edgesafe.runtime.choose import Budget
from edgesafe.runtime.correct import Correction
from edgesafe.runtime.decode import Array, Graph
from edgesafe.runtime.forecast import PREPROCESS, Forecast
from edgesafe.runtime.forecast import WAIT as IN_LINE
from edgesafe.runtime.image import Picture, preprocess
from edgesafe.runtime.parts import Parts
from edgesafe.runtime.tokenizer import TextStream, encode_prompt
from edgesafe.runtime.turns import WAIT, Cancel, Progress, Turn, Turns

MAX_NEW_TOKENS = 48


class Session(Parts):
    """A verified bundle, its certificate and its graphs; safe to use from several threads.

    One ask runs at a time. Another one meanwhile waits for its turn (``when_busy="wait"``, in the order of asking) or raises
    ``BusyError`` (``"refuse"``). What ``Parts`` has takes no turn.
    """

    def __init__(
        self,
        bundle: Bundle,
        certificate: Certificate | None,
        *,
        threads: int | None = None,
        tuning: tune.Tuning | None = None,
        allow_uncertified: bool = False,
        note: str = "",
        backend: Backend | None = None,
        when_busy: str = WAIT,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.certificate = certificate
        self.certified = certified_depths(certificate)
        self.allow_uncertified = allow_uncertified
        self.profile = profile_of(bundle)
        backend = backend or OnnxRuntime()
        self.tuning = tuning or tune.tune(bundle, self.profile, threads, backend.version)
        self.correction = Correction()
        self._clock = clock
        self._forecasts: dict[int, Forecast] = {}
        self._note = note
        self._turns = Turns(when_busy)
        self._worker = ThreadPoolExecutor(1, "edgesafe-ask")  # its thread starts with the first ask_async
        super().__init__(bundle, backend, self.tuning.threads, self.tuning.cores)

    @staticmethod
    def open(
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        allow_uncertified: bool = False,
        backend: Backend | None = None,
        when_busy: str = WAIT,
    ) -> Session:
        """Verify every byte of a bundle and load it.

        Args:
            path: The bundle's folder.
            threads: Threads of each graph; by default those that ``edgesafe measure`` found best here, else the
                device profile's, or this machine's if fewer.
            allow_uncertified: Let ``ask`` use an exit without a passed verdict, and open a bundle whose
                certificate is of other bytes. Each answer then says so.
            backend: What runs the graphs; by default Python's onnxruntime.
            when_busy: What an ask does while another one runs: ``wait`` or ``refuse``.

        Raises:
            BundleError: The folder is no bundle, or its bytes are not those that were sealed.
            CertificateMismatchError: Its certificate is of other bytes.
        """
        bundle = Bundle.open(path)
        try:
            certificate, note = read_certificate(bundle), ""
        except CertificateMismatchError:
            if not allow_uncertified:
                raise
            certificate, note = None, "the certificate is of other bytes and was ignored"
        return Session(
            bundle,
            certificate,
            threads=threads,
            allow_uncertified=allow_uncertified,
            note=note,
            backend=backend,
            when_busy=when_busy,
        )

    def close(self) -> None:
        """Free the graphs and end what runs or waits (``ClosedError``), from any thread; twice does nothing."""
        self._turns.close()
        self._graphs.clear()
        self._worker.shutdown(wait=False)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(
        self,
        image: Picture,
        prompt: str,
        budget: Budget | None = None,
        *,
        exit_depth: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        allow_uncertified: bool = False,
        cancel: Cancel | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Answer:
        """Answer a question about a picture.

        Args:
            image: A path, a PIL image or uint8 [H,W,3].
            prompt: The question, plain text.
            budget: Take the deepest certified exit that fits, predicted at first and by the clock between vision
                segments; without one, the deepest certified. Its times count from the call, waiting for the turn
                included. Its ``max_new_tokens`` counts where it is smaller.
            exit_depth: Take this exit instead.
            max_new_tokens: The answer's longest length in tokens.
            allow_uncertified: Use an exit without a passed verdict; the answer then says so.
            cancel: Ends the ask from another thread, within one token.
            progress: Called between steps, in the asking thread; what it raises ends the ask.

        Raises:
            InputError: The picture, the prompt or an option can't be used.
            UncertifiedExitError: No passed verdict allows the exit.
            NoExitFitsError: The budget is below the fastest certified exit (``on_miss`` ``error``).
            NotMeasuredError: A budget was given and nothing predicts the exits' times, or only an estimate does
                and the budget demands a measurement.
            BusyError, CancelledError, ClosedError: It is not its turn, was cancelled, or the session was closed.
        """
        return self.stream(
            image,
            prompt,
            budget,
            exit_depth=exit_depth,
            max_new_tokens=max_new_tokens,
            allow_uncertified=allow_uncertified,
            cancel=cancel,
            progress=progress,
        ).answer

    def ask_async(
        self,
        image: Picture,
        prompt: str,
        budget: Budget | None = None,
        *,
        cancel: Cancel | None = None,
        progress: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> PendingAnswer[Answer]:
        """Like ``ask``, in a thread of the session's: wait with ``result()`` or ``await``, end it with ``cancel()``.

        Its place in line is taken here. ``options`` are those of ``ask``. What ``ask`` raises comes out of ``result()``, but
        for ``BusyError`` and ``ClosedError``, which are raised here.
        """
        cancel, start_s = cancel or Cancel(), self._clock()
        turn = self._turns.enter(cancel, progress)
        pending = PendingAnswer(lambda: self._start(turn, start_s, image, prompt, budget, **options).answer, cancel)
        try:
            self._worker.submit(pending.run)
        except RuntimeError:  # closed since the turn was taken
            turn.leave()
            self._turns.check_open()
            raise
        return pending

    def stream(
        self,
        image: Picture,
        prompt: str,
        budget: Budget | None = None,
        *,
        exit_depth: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        allow_uncertified: bool = False,
        cancel: Cancel | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> AnswerStream[Answer]:
        """Like ``ask``, but yields the text as it comes. A wrong input raises here, before any text.

        It returns once it is this ask's turn, and keeps the turn until it was read to its end or closed.
        """
        start_s = self._clock()
        turn = self._turns.enter(cancel, progress)
        return self._start(
            turn,
            start_s,
            image,
            prompt,
            budget,
            exit_depth=exit_depth,
            max_new_tokens=max_new_tokens,
            allow_uncertified=allow_uncertified,
        )

    def vision_states(self, image: Picture, depths: Collection[int]) -> dict[int, Array]:
        """The image features of each asked exit, shared segments run once.

        Returns:
            float32 [N,D] by exit depth.
        """
        with self._turns.enter():
            return self.run_exits(preprocess(image, self.manifest.image), depths)

    def answer_features(self, features: Array, prompt: str, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
        """The answer's text for image features [N,D] that were computed before."""
        _check_max_new_tokens(max_new_tokens)
        text = TextStream(self.tokenizer)
        ids = encode_prompt(self.tokenizer, self.manifest, prompt)
        with self._turns.enter():
            for token in self.tokens(features, ids, max_new_tokens):
                text.push(token)
        text.finish()
        return text.text

    def predict(self, prompt_tokens: int) -> Forecast:
        """The stages' times, from this machine's measurement or else from the profile."""
        if prompt_tokens not in self._forecasts:
            self._forecasts[prompt_tokens] = tune.forecast(self.bundle, self.tuning, self.profile, prompt_tokens)
        return self._forecasts[prompt_tokens]

    def graph(self, path: str) -> Graph:
        """A loaded graph by its path in the bundle."""
        self._turns.check_open()
        return super().graph(path)

    def _start(
        self,
        turn: Turn,
        start_s: float,
        image: Picture,
        prompt: str,
        budget: Budget | None,
        *,
        exit_depth: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        allow_uncertified: bool = False,
    ) -> AnswerStream[Answer]:
        """Check the options, wait for the turn and begin; whatever goes wrong, the turn is given up."""
        try:
            _check_max_new_tokens(max_new_tokens)
            if budget is not None and not isinstance(budget, Budget):
                raise InputError(f"{budget!r} is no budget", expected="Budget(ttft_ms=...)")
            limit = min(max_new_tokens, budget.max_new_tokens or max_new_tokens) if budget else max_new_tokens
            ids = encode_prompt(self.tokenizer, self.manifest, prompt)
            allow = allow_uncertified or self.allow_uncertified
            exits, why = allowed_exits(self.bundle, self.certificate, budget, exit_depth, allow)
            turn.wait()
            forecast = self.predict(len(ids))
            course = Course(forecast, self.correction, budget, clock=self._clock, start_s=start_s, tokens=limit)
            course.why, course.actual_ms[IN_LINE] = why, course.elapsed_ms
            if budget is not None:
                tune.check_measured(forecast, budget, self.bundle)
            # A picture is decoded when it is its turn, so that a line of asks holds no line of pictures in memory.
            pixels = course.timed(PREPROCESS, lambda: preprocess(image, self.manifest.image))
            if budget is not None:
                course.plan(exits)
            return AnswerStream(self._answer(pixels, ids, exits, limit, course, turn), turn, self.tuning.cores)
        except BaseException:
            turn.leave()
            raise

    def _answer(
        self, pixels: Array, ids: list[int], exits: list[ExitSpec], limit: int, course: Course, turn: Turn
    ) -> Generator[str | Answer, None, None]:
        ran: list[str] = []

        def run(path: str, state: Array) -> Array:
            out = course.timed(path, lambda: self.run_vision_graph(path, state))
            ran.append(path)
            turn.step("vision", len(ran), len(exits[-1].graphs))
            return out

        turn.check()
        taken, features = run_anytime(exits, run, pixels, course.goes_on)
        text, reason, made = TextStream(self.tokenizer), "length", 0
        tokens = self.tokens(features, ids, limit)
        while made == 0 or not course.out_of_time(len(ids) + made):
            token = course.timed_token(len(ids) + made, lambda: next(tokens, None))
            if token is None:
                break
            made += 1
            turn.step("decode", made, limit)
            if token in self.manifest.text.eos_token_ids:
                reason = "stop"
                break
            if piece := text.push(token):
                yield piece
        else:
            reason = "deadline"
        if piece := text.finish():
            yield piece
        self.correction = course.correction
        yield self._told(text.text, reason, taken, course)

    def _told(self, text: str, reason: str, taken: ExitSpec, course: Course) -> Answer:
        """The answer with all that is known about how it came about."""
        total_ms = course.elapsed_ms
        return Answer(
            text=text,
            finish_reason=reason,
            exit_depth=taken.exit_depth,
            certified=taken.exit_depth in self.certified,
            predicted_ttft_ms=course.predicted_ttft_ms(taken.graphs),
            prediction=course.forecast.source,
            ttft_ms=course.ttft_ms,
            total_ms=total_ms,
            note=self._notes(taken.exit_depth, course.forecast),
            why=course.why,
            planned_depth=course.planned_depth,
            deadline_met=course.deadline_met(total_ms),
            predicted_ms=course.predicted_ms(taken.graphs),
            actual_ms=course.actual_ms,
        )

    def _notes(self, depth: int, prediction: Forecast) -> str:
        notes = [self._note, prediction.note]
        if depth not in self.certified:
            notes.insert(0, f"the exit at depth {depth} is NOT certified: its answers were not shown to be safe")
        return "; ".join(note for note in notes if note)


def _check_max_new_tokens(value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"max_new_tokens is {value!r}", expected="a whole number of at least 1")
