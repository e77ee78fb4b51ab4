"""A bundle ready to answer: opens the graphs, chooses the exit, runs it and tells what it did."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor

from edgesafe.device import profile_of
from edgesafe.errors import CertificateMismatchError
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import Certificate, certified_depths, read_certificate
from edgesafe.format.tiles import ALONE, Cut
from edgesafe.runtime import threads as tune
from edgesafe.runtime.allowed import allowed_exits
from edgesafe.runtime.answer import Answer
from edgesafe.runtime.asking import AnswerStream, PendingAnswer
from edgesafe.runtime.calibrate import Correction
from edgesafe.runtime.choose import Budget
from edgesafe.runtime.conversation import Conversation
from edgesafe.runtime.deadline import Clock
from edgesafe.runtime.decode import Array, Graph
from edgesafe.runtime.engine import Engine, OnnxRuntime
from edgesafe.runtime.forecast import Forecast
from edgesafe.runtime.image import Picture
from edgesafe.runtime.options import MAX_NEW_TOKENS, check_max_new_tokens, check_options
from edgesafe.runtime.parts import Parts
from edgesafe.runtime.sampling import GREEDY, Sampling
from edgesafe.runtime.tokenizer import TextStream, encode_prompt
from edgesafe.runtime.turns import WAIT, Cancel, Progress, Turns


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
        engine: Engine | None = None,
        when_busy: str = WAIT,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.certificate = certificate
        self.certified = certified_depths(certificate)
        self.allow_uncertified = allow_uncertified
        self.profile = profile_of(bundle)
        engine = engine or OnnxRuntime()
        self.tuning = tuning or tune.tune(bundle, self.profile, threads, engine.version)
        self.correction = Correction()
        self.clock = clock
        self._forecasts: dict[tuple[int, int], Forecast] = {}
        self._note = note
        self.turns = Turns(when_busy)
        self._handing_over = threading.Lock()
        # Those that hold a cache of the decoder's, which close frees; they enter while it is their turn.
        self.talks: weakref.WeakSet[Conversation] = weakref.WeakSet()
        self._worker = ThreadPoolExecutor(1, "edgesafe-ask")  # its thread starts with the first ask_async
        super().__init__(bundle, engine, self.tuning.threads, self.tuning.cores)

    @staticmethod
    def open(
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        allow_uncertified: bool = False,
        engine: Engine | None = None,
        when_busy: str = WAIT,
    ) -> Session:
        """Verify every byte of a bundle and load it.

        Args:
            path: The bundle's folder.
            threads: Threads of each graph; by default those that ``edgesafe measure`` found best here, else the
                device profile's, or this machine's if fewer.
            allow_uncertified: Let ``ask`` use an exit without a passed verdict, and open a bundle whose
                certificate is of other bytes. Each answer then says so.
            engine: What runs the graphs; by default Python's onnxruntime.
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
            engine=engine,
            when_busy=when_busy,
        )

    def close(self) -> None:
        """Free the graphs and end what runs or waits (``ClosedError``), from any thread; twice does nothing."""
        self.turns.close()
        self._graphs.clear()
        for talk in list(self.talks):
            talk.forget()
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
        sampling: Sampling = GREEDY,
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
            sampling: How tokens are picked and which texts end the answer. Exits are certified on greedy answers.
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
            sampling=sampling,
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
        exit_depth: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
        allow_uncertified: bool = False,
        cancel: Cancel | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> PendingAnswer[Answer]:
        """Like ``ask``, in a thread of the session's: wait with ``result()`` or ``await``, end it with ``cancel()``.

        Its place in line is taken here. What ``ask`` raises comes out of ``result()``, but for ``BusyError`` and
        ``ClosedError``, which are raised here.
        """
        cancel, start_s = cancel or Cancel(), self.clock()
        talk = Conversation(self, image, budget, exit_depth, allow_uncertified)
        # One step, or the worker could get two asks in another order than the line's, and wait for the one behind it.
        with self._handing_over:
            turn = self.turns.enter(cancel, progress)
            pending = PendingAnswer(lambda: talk.begin(turn, start_s, prompt, max_new_tokens, sampling).answer, cancel)
            try:
                self._worker.submit(pending.run)
            except RuntimeError:  # closed since the turn was taken
                turn.leave()
                self.turns.check_open()
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
        sampling: Sampling = GREEDY,
        allow_uncertified: bool = False,
        cancel: Cancel | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> AnswerStream[Answer]:
        """Like ``ask``, but yields the text as it comes. A wrong input raises here, before any text.

        It returns once it is this ask's turn, and keeps the turn until it was read to its end or closed.
        """
        talk = Conversation(self, image, budget, exit_depth, allow_uncertified)
        return talk.stream(prompt, max_new_tokens=max_new_tokens, sampling=sampling, cancel=cancel, progress=progress)

    def conversation(
        self,
        image: Picture,
        budget: Budget | None = None,
        *,
        exit_depth: int | None = None,
        allow_uncertified: bool = False,
    ) -> Conversation:
        """Several questions about one picture, which is paid for once.

        Args are those of ``ask``, with a budget for each question; the first one finds the exit.

        Raises:
            InputError, UncertifiedExitError, ClosedError: As by ``ask``; the picture is read by the first question.
        """
        self.turns.check_open()
        check_options(budget, GREEDY)
        allow = allow_uncertified or self.allow_uncertified
        allowed_exits(self.bundle, self.certificate, budget, exit_depth, allow)
        return Conversation(self, image, budget, exit_depth, allow)

    def vision_states(self, image: Picture, depths: Collection[int]) -> dict[int, Array]:
        """The image features of each asked exit, shared segments run once.

        Returns:
            float32 [N,D] by exit depth.
        """
        with self.turns.enter():
            return self.run_exits(self.look(image), depths, self.cut(image))

    def answer_features(self, features: Array, prompt: str, max_new_tokens: int = MAX_NEW_TOKENS, cut: Cut = ALONE) -> str:
        """The answer's text for image features [N,D] that were computed before, of a picture that is cut so."""
        check_max_new_tokens(max_new_tokens)
        text = TextStream(self.tokenizer)
        ids = encode_prompt(self.tokenizer, self.manifest, prompt, cut)
        with self.turns.enter():
            for token in self.tokens(features, ids, max_new_tokens):
                text.push(token)
        text.finish()
        return text.text

    def predict(self, prompt_tokens: int, tiles: int = 1) -> Forecast:
        """The stages' times, from this machine's measurement or else from the profile."""
        key = (prompt_tokens, tiles)
        if key not in self._forecasts:
            found = tune.forecast(self.bundle, self.tuning, self.profile, prompt_tokens)
            self._forecasts[key] = found.tiled(tiles)
        return self._forecasts[key]

    def graph(self, path: str) -> Graph:
        """A loaded graph by its path in the bundle."""
        self.turns.check_open()
        return super().graph(path)

    def notes(self, depth: int, prediction: Forecast) -> str:
        """What an answer's caller should know."""
        notes = [self._note, prediction.note]
        if depth not in self.certified:
            notes.insert(0, f"the exit at depth {depth} is NOT certified: its answers were not shown to be safe")
        return "; ".join(note for note in notes if note)
