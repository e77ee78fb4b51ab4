"""A bundle ready to answer: opens the graphs, chooses the exit, runs it and tells what it did."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnxruntime as ort
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
from edgesafe.runtime.choose import Budget, Prediction
from edgesafe.runtime.conversation import Conversation
from edgesafe.runtime.decode import Array, Reader, State
from edgesafe.runtime.graph import OrtGraph
from edgesafe.runtime.image import Picture, preprocess
from edgesafe.runtime.options import MAX_NEW_TOKENS, check_max_new_tokens, check_options
from edgesafe.runtime.sampling import GREEDY, Picker, Sampling
from edgesafe.runtime.tokenizer import TextStream, encode_prompt, load_tokenizer


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


class AnswerStream:
    """Yields the answer's text piece by piece; ``answer`` is there once it has ended."""

    def __init__(self, pieces: Iterator[str | Answer]) -> None:
        self._pieces = pieces
        self._answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        if isinstance(piece, str):
            return piece
        self._answer = piece
        raise StopIteration

    @property
    def answer(self) -> Answer:
        """The whole answer; what is left of the stream is read first."""
        for _ in self:
            pass
        if self._answer is None:
            raise InputError("the stream was closed before its answer ended", todo="read it to its end")
        return self._answer


class Session:
    """A verified bundle, its certificate and its graphs. Not for use from two threads at once."""

    def __init__(
        self,
        bundle: Bundle,
        certificate: Certificate | None,
        *,
        threads: int | None = None,
        allow_uncertified: bool = False,
        note: str = "",
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
        self._graphs: dict[str, OrtGraph] = {}
        self.tokenizer = load_tokenizer(bundle.root / self.manifest.tokenizer)
        self._eager()

    @staticmethod
    def open(path: str | os.PathLike[str], *, threads: int | None = None, allow_uncertified: bool = False) -> Session:
        """Verify every byte of a bundle and load it.

        Args:
            path: The bundle's folder.
            threads: Threads of each graph; by default the device profile's, or this machine's if fewer.
            allow_uncertified: Let ``ask`` use an exit without a passed verdict, and open a bundle whose
                certificate is of other bytes. Each answer then says so.

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
        return Session(bundle, certificate, threads=threads, allow_uncertified=allow_uncertified, note=note)

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
    ) -> Answer:
        """Answer a question about a picture.

        Args:
            image: A path, a PIL image or uint8 [H,W,3].
            prompt: The question, plain text.
            budget: Take the deepest certified exit predicted to fit; without one, the deepest certified.
            exit_depth: Take this exit instead.
            max_new_tokens: The answer's longest length in tokens.
            sampling: How tokens are picked and which texts end the answer. Exits are certified on greedy answers.
            allow_uncertified: Use an exit without a passed verdict; the answer then says so.

        Raises:
            InputError: The picture, the prompt or an option can't be used.
            UncertifiedExitError: No passed verdict allows the exit.
            NoExitFitsError: The budget is below the fastest certified exit.
            NotMeasuredError: A budget was given and nothing predicts the exits' times.
        """
        return self.stream(
            image,
            prompt,
            budget,
            exit_depth=exit_depth,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            allow_uncertified=allow_uncertified,
        ).answer

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
    ) -> AnswerStream:
        """Like ``ask``, but yields the text as it comes. A wrong input raises here, before any text."""
        start = time.perf_counter()
        check_max_new_tokens(max_new_tokens)
        check_options(budget, sampling)
        ids = encode_prompt(self.tokenizer, self.manifest, prompt)
        allow = allow_uncertified or self.allow_uncertified
        prediction = self.predict(len(ids))
        depth = self.choose(budget, exit_depth, allow, prediction)
        pixels = preprocess(image, self.manifest.image)
        return AnswerStream(self._answer(pixels, ids, depth, max_new_tokens, sampling, prediction, start))

    def conversation(
        self,
        image: Picture,
        budget: Budget | None = None,
        *,
        exit_depth: int | None = None,
        allow_uncertified: bool = False,
    ) -> Conversation:
        """Several questions about one picture, which is paid for once; the exit is chosen now and stays.

        Args and errors are those of ``ask``.
        """
        check_options(budget, GREEDY)
        allow = allow_uncertified or self.allow_uncertified
        prediction = self.predict(len(encode_prompt(self.tokenizer, self.manifest, "?")))
        depth = self.choose(budget, exit_depth, allow, prediction)
        return Conversation(self, preprocess(image, self.manifest.image), depth, prediction)

    def vision_states(self, image: Picture, depths: Collection[int]) -> dict[int, Array]:
        """The image features of each asked exit, shared segments run once.

        Returns:
            float32 [N,D] by exit depth.
        """
        return self.run_exits(preprocess(image, self.manifest.image), depths)

    def run_exits(self, pixels: Array, depths: Collection[int]) -> dict[int, Array]:
        """Like ``vision_states``, from ``pixel_values`` [1,3,H,W]."""
        done: dict[tuple[str, ...], State] = {(): pixels}
        features = {}
        for depth in sorted(depths):
            graphs = self.manifest.exit(depth).graphs
            for i, path in enumerate(graphs):
                if graphs[: i + 1] not in done:
                    done[graphs[: i + 1]] = self.run_vision_graph(path, done[graphs[:i]])
            features[depth] = decode.as_array(done[graphs])
        return features

    def run_vision_graph(self, path: str, state: State) -> State:
        """One segment, head or whole exit: its one input is the picture or the state, its one output the next."""
        return decode.advance(self.graph(path), state)

    def answer_features(self, features: Array, prompt: str, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
        """The answer's text for image features [N,D] that were computed before."""
        check_max_new_tokens(max_new_tokens)
        text = TextStream(self.tokenizer)
        for token in self._tokens(features, encode_prompt(self.tokenizer, self.manifest, prompt), max_new_tokens):
            text.push(token)
        text.finish()
        return text.text

    def predict(self, prompt_tokens: int) -> Prediction:
        """Each exit's time to the first token, from this machine's measurement or else from the profile."""
        note = ""
        if self.latency is not None:
            why = latency_mismatch(self.latency, self.bundle, self.threads)
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

    def graph(self, path: str) -> OrtGraph:
        """A loaded graph by its path in the bundle."""
        if path not in self._graphs:
            where = str(self.bundle.graph_path(path))
            self._graphs[path] = OrtGraph(where, self.manifest.graphs[path], self.threads)
        return self._graphs[path]

    def prefill(self, features: Array, ids: list[int]) -> tuple[Array, dict[str, Array]]:
        """Read a whole prompt: its logits and its cache."""
        embeds = self.merged(features, ids)
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

    def _answer(
        self, pixels: Array, ids: list[int], depth: int, limit: int, sampling: Sampling, prediction: Prediction, start: float
    ) -> Iterator[str | Answer]:
        features = self.run_exits(pixels, [depth])[depth]
        tokens = self._tokens(features, ids, limit, sampling)
        yield from self.answer_of(tokens, depth, sampling, prediction, start)

    def answer_of(
        self, tokens: Iterator[int], depth: int, sampling: Sampling, prediction: Prediction, start: float
    ) -> Iterator[str | Answer]:
        """An answer's pieces, then the answer, from its tokens; the first of them costs what comes before it."""
        text = TextStream(self.tokenizer, sampling.stop)
        ttft_ms, reason = 0.0, "length"
        for token in tokens:
            ttft_ms = ttft_ms or _ms_since(start)
            ended = token in self.manifest.text.eos_token_ids
            if not ended and (piece := text.push(token)):
                yield piece
            if ended or text.ended:
                reason = "stop"
                break
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

    def _tokens(self, features: State, ids: list[int], limit: int, sampling: Sampling = GREEDY) -> Iterator[int]:
        reader = self.reader(len(ids) + limit)
        logits = reader.read(self.merged(features, ids))
        yield from decode.generate(reader, logits, self.manifest.text, limit, Picker(sampling, ids).pick)

    def reader(self, length: int) -> Reader:
        """The language side before its first token, with room for so many."""
        text = self.manifest.text
        return decode.open_reader(self.graph(text.embed_tokens), self.graph(text.decoder), text, length)

    def merged(self, features: State, ids: list[int]) -> Array:
        """A prompt's embeddings [1,S,D] with the picture's features [N,D] in their places."""
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


def latency_mismatch(table: LatencyTable, bundle: Bundle, threads: int) -> str:
    """Why a latency table says nothing about this bundle here, or an empty text where it does."""
    if table.bundle_digest != bundle.digest:
        return "it was measured on another bundle"
    if table.machine != machine_name():
        return f"it was measured on another machine ({table.machine})"
    if table.onnxruntime_version != ort.__version__:
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


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3
