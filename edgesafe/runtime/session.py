"""A bundle ready to answer: opens the graphs, chooses the exit, runs it and tells what it did."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from edgesafe import graph_io
from edgesafe.bundle import Bundle
from edgesafe.certificate import Certificate, certified_depths, read_certificate
from edgesafe.device import (
    ESTIMATED,
    MEASURED,
    DeviceProfile,
    LatencyTable,
    host_cores,
    machine_name,
    profile_of,
    read_latency,
)
from edgesafe.errors import (
    BundleError,
    CertificateMismatchError,
    InputError,
    NotMeasuredError,
    UncertifiedExitError,
)
from edgesafe.runtime import choose, decode
from edgesafe.runtime.asking import AnswerStream, PendingAnswer
from edgesafe.runtime.backend import Backend, OnnxRuntime
from edgesafe.runtime.choose import Budget, Prediction
from edgesafe.runtime.decode import Array, Graph
from edgesafe.runtime.image import Picture, preprocess
from edgesafe.runtime.tokenizer import TextStream, encode_prompt, load_tokenizer
from edgesafe.runtime.turns import WAIT, Cancel, Progress, Turn, Turns

MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Answer:
    """What was said and how.

    ``finish_reason`` is ``stop`` (the model ended) or ``length``. Times are ms from the call. ``prediction``
    says what ``predicted_ttft_ms`` rests on (``measured``, ``estimated``, or ``none`` with None). ``note`` is
    empty or says what the caller should know.
    """

    text: str
    finish_reason: str
    exit_depth: int
    certified: bool
    predicted_ttft_ms: float | None
    prediction: str
    ttft_ms: float
    total_ms: float
    note: str = ""


class Session:
    """A verified bundle, its certificate and its graphs; safe to use from several threads.

    One ask runs at a time. Another one meanwhile waits for its turn (``when_busy="wait"``, in the order of asking) or raises
    ``BusyError`` (``"refuse"``). ``graph``, ``run_exits``, ``run_vision_graph`` and ``prefill`` are the parts that asks are
    made of: they take no turn, so a caller of these sees to it that nothing else runs.
    """

    def __init__(
        self,
        bundle: Bundle,
        certificate: Certificate | None,
        *,
        threads: int | None = None,
        allow_uncertified: bool = False,
        note: str = "",
        backend: Backend | None = None,
        when_busy: str = WAIT,
    ) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.certificate = certificate
        self.certified = certified_depths(certificate)
        self.allow_uncertified = allow_uncertified
        self.profile = profile_of(bundle)
        self.threads = _threads(threads, self.profile)
        self.latency = read_latency(bundle)
        self._note = note
        self.backend: Backend = backend or OnnxRuntime()
        self._turns = Turns(when_busy)
        self._handing_over = threading.Lock()
        self._worker = ThreadPoolExecutor(1, "edgesafe-ask")  # its thread starts with the first ask_async
        self._graphs: dict[str, Graph] = {}
        self.tokenizer = load_tokenizer(bundle.root / self.manifest.tokenizer)
        self._eager()

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
            threads: Threads of each graph; by default the device profile's, or this machine's if fewer.
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
            budget: Take the deepest certified exit predicted to fit; without one, the deepest certified.
            exit_depth: Take this exit instead.
            max_new_tokens: The answer's longest length in tokens.
            allow_uncertified: Use an exit without a passed verdict; the answer then says so.
            cancel: Ends the ask from another thread, within one token.
            progress: Called between steps, in the asking thread; what it raises ends the ask.

        Raises:
            InputError: The picture, the prompt or an option can't be used.
            UncertifiedExitError: No passed verdict allows the exit.
            NoExitFitsError: The budget is below the fastest certified exit.
            NotMeasuredError: A budget was given and nothing predicts the exits' times.
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
        cancel, start = cancel or Cancel(), time.perf_counter()
        # One step, or the worker could get two asks in another order than the line's, and wait for the one behind it.
        with self._handing_over:
            turn = self._turns.enter(cancel, progress)
            pending = PendingAnswer(lambda: self._start(turn, start, image, prompt, budget, **options).answer, cancel)
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
        start = time.perf_counter()
        turn = self._turns.enter(cancel, progress)
        return self._start(
            turn,
            start,
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

    def run_exits(self, pixels: Array, depths: Collection[int], turn: Turn | None = None) -> dict[int, Array]:
        """Like ``vision_states``, from ``pixel_values`` [1,3,H,W]; ``turn`` is told of every graph and may end it."""
        done: dict[tuple[str, ...], Array] = {(): pixels}
        features = {}
        for depth in sorted(depths):
            graphs = self.manifest.exit(depth).graphs
            for i, path in enumerate(graphs):
                if graphs[: i + 1] not in done:
                    done[graphs[: i + 1]] = self.run_vision_graph(path, done[graphs[:i]])
                    if turn is not None:
                        turn.step("vision", i + 1, len(graphs))
            features[depth] = done[graphs]
        return features

    def run_vision_graph(self, path: str, state: Array) -> Array:
        """One segment, head or whole exit: its one input is the picture or the state, its one output the next."""
        graph = self.graph(path)
        (out,) = graph.run(dict.fromkeys(graph.wants, state)).values()
        return out

    def answer_features(self, features: Array, prompt: str, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
        """The answer's text for image features [N,D] that were computed before."""
        _check_max_new_tokens(max_new_tokens)
        text = TextStream(self.tokenizer)
        ids = encode_prompt(self.tokenizer, self.manifest, prompt)
        with self._turns.enter():
            for token in self._tokens(features, ids, max_new_tokens):
                text.push(token)
        text.finish()
        return text.text

    def predict(self, prompt_tokens: int) -> Prediction:
        """Each exit's time to the first token, from this machine's measurement or else from the profile."""
        note = ""
        if self.latency is not None:
            why = latency_mismatch(self.latency, self.bundle, self.threads, self.backend.version)
            if not why:
                return Prediction(choose.from_latency(self.manifest, self.latency, prompt_tokens), MEASURED)
            note = f"latency.json was ignored: {why}; "
        times = choose.from_profile(self.manifest, self.profile, prompt_tokens) if self.profile else None
        if times is None:
            return Prediction(None, "none", note + "nothing predicts the time here: run edgesafe measure")
        name = self.profile.title if self.profile else ""
        return Prediction(times, ESTIMATED, note + f"the time was estimated for {name}, not measured: run edgesafe measure")

    def choose(self, budget: Budget | None, exit_depth: int | None, allow: bool, prediction: Prediction) -> int:
        """The exit to run; see ``ask`` for what it raises."""
        if exit_depth is not None:
            return self._checked_depth(budget, exit_depth, allow)
        usable = self.certified or (self.manifest.depths if allow else ())
        if not usable:
            raise self._uncertified("no exit of this bundle has a passed verdict")
        usable = choose.within_reference(usable, self.manifest.reference_depth)
        if budget is None:
            return usable[-1]
        if prediction.ttft_ms is None:
            raise NotMeasuredError(
                "a budget was given, and nothing predicts how long an exit takes here",
                where=str(self.bundle.root),
                expected="a measurement on this machine, or a device profile with estimates",
                todo=f"measure it: edgesafe measure {self.bundle.root}",
            )
        return choose.choose_exit(prediction.ttft_ms, usable, budget.ttft_ms)

    def graph(self, path: str) -> Graph:
        """A loaded graph by its path in the bundle."""
        self._turns.check_open()
        if path not in self._graphs:
            where = str(self.bundle.graph_path(path))
            self._graphs[path] = self.backend.open(where, self.manifest.graphs[path], self.threads)
        return self._graphs[path]

    def prefill(self, features: Array, ids: list[int]) -> tuple[Array, dict[str, Array]]:
        """Read a whole prompt: its logits and its cache."""
        embeds = self._merged(features, ids)
        text = self.manifest.text
        return decode.step(self.graph(text.decoder), text, embeds, decode.empty_cache(text))

    def _checked_depth(self, budget: Budget | None, exit_depth: int, allow: bool) -> int:
        if budget is not None:
            raise InputError("a budget and an exit depth were given", expected="one of the two")
        if isinstance(exit_depth, bool) or exit_depth not in self.manifest.depths:
            raise InputError(
                f"the bundle has no exit at depth {exit_depth}",
                where="exit_depth",
                expected=f"one of {', '.join(map(str, self.manifest.depths))}",
            )
        if exit_depth not in self.certified and not allow:
            raise self._uncertified(f"the exit at depth {exit_depth} has no passed verdict")
        return exit_depth

    def _uncertified(self, what: str) -> UncertifiedExitError:
        if self.certificate is None:
            what += ", because the bundle has no certificate"
            todo = f"certify it: edgesafe certify {self.bundle.root}"
        else:
            todo = "use a certified exit, or align and export the model again"
        shown = ", ".join(map(str, self.certified)) or "none yet"
        return UncertifiedExitError(what, where=str(self.bundle.root), expected=f"a certified exit ({shown})", todo=todo)

    def _start(
        self,
        turn: Turn,
        start: float,
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
            ids = encode_prompt(self.tokenizer, self.manifest, prompt)
            turn.wait()
            prediction = self.predict(len(ids))
            depth = self.choose(budget, exit_depth, allow_uncertified or self.allow_uncertified, prediction)
            # A picture is decoded when it is its turn, so that a line of asks holds no line of pictures in memory.
            pixels = preprocess(image, self.manifest.image)
            return AnswerStream(self._answer(pixels, ids, depth, max_new_tokens, prediction, start, turn), turn)
        except BaseException:
            turn.leave()
            raise

    def _answer(
        self, pixels: Array, ids: list[int], depth: int, limit: int, prediction: Prediction, start: float, turn: Turn
    ) -> Generator[str | Answer, None, None]:
        turn.check()
        features = self.run_exits(pixels, [depth], turn)[depth]
        text = TextStream(self.tokenizer)
        ttft_ms, reason = 0.0, "length"
        for made, token in enumerate(self._tokens(features, ids, limit), start=1):
            ttft_ms = ttft_ms or _ms_since(start)
            turn.step("decode", made, limit)
            if token in self.manifest.text.eos_token_ids:
                reason = "stop"
                break
            if piece := text.push(token):
                yield piece
        if piece := text.finish():
            yield piece
        predicted = prediction.ttft_ms[depth] if prediction.ttft_ms else None
        yield Answer(
            text=text.text,
            finish_reason=reason,
            exit_depth=depth,
            certified=depth in self.certified,
            predicted_ttft_ms=predicted,
            prediction=prediction.source,
            ttft_ms=ttft_ms,
            total_ms=_ms_since(start),
            note=self._notes(depth, prediction),
        )

    def _notes(self, depth: int, prediction: Prediction) -> str:
        notes = [self._note, prediction.note]
        if depth not in self.certified:
            notes.insert(0, f"the exit at depth {depth} is NOT certified: its answers were not shown to be safe")
        return "; ".join(note for note in notes if note)

    def _tokens(self, features: Array, ids: list[int], limit: int) -> Iterator[int]:
        text = self.manifest.text
        embeds = self._merged(features, ids)
        return decode.greedy(self.graph(text.embed_tokens), self.graph(text.decoder), text, embeds, limit)

    def _merged(self, features: Array, ids: list[int]) -> Array:
        embed = self.graph(self.manifest.text.embed_tokens)
        return decode.merge_features(embed, ids, self.manifest.image_token_id, features)

    def _eager(self) -> None:
        """Load at once what any answer needs, so that the first question isn't slower than the next.

        A chain's segments hold each weight once; standalone exits would hold it again for every exit, so these
        are loaded when first used.
        """
        Image.preinit()
        paths = [self.manifest.text.embed_tokens, self.manifest.text.decoder]
        if self.manifest.layout == "chain":
            paths += [path for spec in self.manifest.exits for path in spec.graphs]
        for path in paths:
            self.graph(path)
        wanted = {graph_io.INPUTS_EMBEDS, graph_io.ATTENTION_MASK, graph_io.POSITION_IDS}
        unknown = self.graph(paths[1]).wants - wanted - decode.empty_cache(self.manifest.text).keys()
        if unknown:
            raise BundleError(f"the decoder wants {sorted(unknown)}, which this runtime doesn't know")


def latency_mismatch(table: LatencyTable, bundle: Bundle, threads: int, version: str) -> str:
    """Why a latency table says nothing about this bundle here, or an empty text where it does."""
    if table.bundle_digest != bundle.digest:
        return "it was measured on another bundle"
    if table.machine != machine_name():
        return f"it was measured on another machine ({table.machine})"
    if table.onnxruntime_version != version:
        return f"it was measured with onnxruntime {table.onnxruntime_version}"
    graphs = {path for spec in bundle.manifest.exits for path in spec.graphs}
    if not table.text["prefill"] or not graphs <= table.segments.keys():
        return "it doesn't cover every exit"
    if table.threads != threads:
        return f"it was measured with {table.threads} threads"
    return ""


def _threads(asked: int | None, profile: DeviceProfile | None) -> int:
    if asked is not None:
        if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
            raise InputError(f"{asked!r} is no number of threads", expected="at least 1")
        return asked
    cores = host_cores()
    return min(cores, profile.threads) if profile and profile.threads else cores


def _check_max_new_tokens(value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"max_new_tokens is {value!r}", expected="a whole number of at least 1")


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3
