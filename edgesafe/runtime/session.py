"""A bundle ready to answer: opens the graphs, chooses the exit, runs it and tells what it did."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from PIL import Image

from edgesafe import graph_io
from edgesafe.bundle import Bundle, ExitSpec
from edgesafe.certificate import Certificate, certified_depths, read_certificate
from edgesafe.device import profile_of
from edgesafe.errors import BundleError, CertificateMismatchError, InputError, UncertifiedExitError
from edgesafe.machine import on_cores
from edgesafe.runtime import choose, decode, tune
from edgesafe.runtime.anytime import Clock, Course, run_anytime
from edgesafe.runtime.choose import Budget
from edgesafe.runtime.correct import Correction
from edgesafe.runtime.decode import Array
from edgesafe.runtime.forecast import PREPROCESS, Forecast
from edgesafe.runtime.graph import OrtGraph
from edgesafe.runtime.image import Picture, preprocess
from edgesafe.runtime.tokenizer import TextStream, encode_prompt, load_tokenizer

MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Answer:
    """What was said and how.

    ``finish_reason`` is ``stop`` (the model ended), ``length`` or ``deadline`` (cut before the budget's
    ``total_ms``). Times are ms from the call. ``prediction`` says what ``predicted_ttft_ms`` rests on
    (``measured``, ``estimated``, or ``none`` with None). ``note`` is empty or says what the caller should know.
    ``why`` tells why this exit, ``planned_depth`` which one the budget was predicted to allow before any ran, and
    ``deadline_met`` whether its times were kept; both are None without a budget. ``predicted_ms`` and
    ``actual_ms`` are by stage: ``preprocess``, the vision graphs, ``prefill`` and ``decode`` (predicted: one
    token's; actual: all of them). The predicted ones are medians, corrected by what was known at the call, so
    they don't add up to ``predicted_ttft_ms``, which is at the budget's quantile.
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
    why: str = ""
    planned_depth: int | None = None
    deadline_met: bool | None = None
    predicted_ms: dict[str, float] = field(default_factory=dict)
    actual_ms: dict[str, float] = field(default_factory=dict)


class AnswerStream:
    """Yields the answer's text piece by piece; ``answer`` is there once it has ended."""

    def __init__(self, pieces: Iterator[str | Answer], cores: Sequence[int] | None = None) -> None:
        self._pieces = pieces
        self._cores = cores
        self._answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        with on_cores(self._cores):
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
        tuning: tune.Tuning | None = None,
        allow_uncertified: bool = False,
        note: str = "",
        clock: Clock = time.perf_counter,
    ) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.certificate = certificate
        self.certified = certified_depths(certificate)
        self.allow_uncertified = allow_uncertified
        self.profile = profile_of(bundle)
        self.tuning = tuning or tune.tune(bundle, self.profile, threads)
        self.threads = self.tuning.threads
        self.correction = Correction()
        self._clock = clock
        self._forecasts: dict[int, Forecast] = {}
        self._note = note
        self._graphs: dict[str, OrtGraph] = {}
        self.tokenizer = load_tokenizer(bundle.root / self.manifest.tokenizer)
        with on_cores(self.tuning.cores):
            self._eager()

    @staticmethod
    def open(path: str | os.PathLike[str], *, threads: int | None = None, allow_uncertified: bool = False) -> Session:
        """Verify every byte of a bundle and load it.

        Args:
            path: The bundle's folder.
            threads: Threads of each graph; by default those that ``edgesafe measure`` found best here, else the
                device profile's, or this machine's if fewer.
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
        allow_uncertified: bool = False,
    ) -> Answer:
        """Answer a question about a picture.

        Args:
            image: A path, a PIL image or uint8 [H,W,3].
            prompt: The question, plain text.
            budget: Take the deepest certified exit that fits, predicted at first and by the clock between vision
                segments; without one, the deepest certified. Its ``max_new_tokens`` counts where it is smaller.
            exit_depth: Take this exit instead.
            max_new_tokens: The answer's longest length in tokens.
            allow_uncertified: Use an exit without a passed verdict; the answer then says so.

        Raises:
            InputError: The picture, the prompt or an option can't be used.
            UncertifiedExitError: No passed verdict allows the exit.
            NoExitFitsError: The budget is below the fastest certified exit (``on_miss`` ``error``).
            NotMeasuredError: A budget was given and nothing predicts the exits' times, or only an estimate does
                and the budget demands a measurement.
        """
        return self.stream(
            image,
            prompt,
            budget,
            exit_depth=exit_depth,
            max_new_tokens=max_new_tokens,
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
        allow_uncertified: bool = False,
    ) -> AnswerStream:
        """Like ``ask``, but yields the text as it comes. A wrong input raises here, before any text."""
        start_s = self._clock()
        _check_max_new_tokens(max_new_tokens)
        if budget is not None and not isinstance(budget, Budget):
            raise InputError(f"{budget!r} is no budget", expected="Budget(ttft_ms=...)")
        limit = min(max_new_tokens, budget.max_new_tokens or max_new_tokens) if budget else max_new_tokens
        ids = encode_prompt(self.tokenizer, self.manifest, prompt)
        allow = allow_uncertified or self.allow_uncertified
        course = Course(self.predict(len(ids)), self.correction, budget, clock=self._clock, start_s=start_s, tokens=limit)
        exits = self.choose(course, exit_depth, allow)
        pixels = course.timed(PREPROCESS, lambda: preprocess(image, self.manifest.image))
        if budget is not None:
            course.plan(exits)
        return AnswerStream(self._answer(pixels, ids, exits, limit, course), self.tuning.cores)

    def vision_states(self, image: Picture, depths: Collection[int]) -> dict[int, Array]:
        """The image features of each asked exit, shared segments run once.

        Returns:
            float32 [N,D] by exit depth.
        """
        return self.run_exits(preprocess(image, self.manifest.image), depths)

    def run_exits(self, pixels: Array, depths: Collection[int]) -> dict[int, Array]:
        """Like ``vision_states``, from ``pixel_values`` [1,3,H,W]."""
        done: dict[tuple[str, ...], Array] = {(): pixels}
        features = {}
        for depth in sorted(depths):
            graphs = self.manifest.exit(depth).graphs
            for i, path in enumerate(graphs):
                if graphs[: i + 1] not in done:
                    done[graphs[: i + 1]] = self.run_vision_graph(path, done[graphs[:i]])
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
        for token in self._tokens(features, encode_prompt(self.tokenizer, self.manifest, prompt), max_new_tokens):
            text.push(token)
        text.finish()
        return text.text

    def predict(self, prompt_tokens: int) -> Forecast:
        """The stages' times, from this machine's measurement or else from the profile."""
        if prompt_tokens not in self._forecasts:
            self._forecasts[prompt_tokens] = tune.forecast(self.bundle, self.tuning, self.profile, prompt_tokens)
        return self._forecasts[prompt_tokens]

    def choose(self, course: Course, exit_depth: int | None, allow: bool) -> list[ExitSpec]:
        """The exits that may be taken, ascending: one, or with a budget all usable ones. See ``ask`` for what it raises."""
        if exit_depth is not None:
            course.why = "asked for"
            return [self.manifest.exit(self._checked_depth(course.budget, exit_depth, allow))]
        usable = self.certified or (self.manifest.depths if allow else ())
        if not usable:
            raise self._uncertified("no exit of this bundle has a passed verdict")
        usable = choose.within_reference(usable, self.manifest.reference_depth)
        if course.budget is None:
            course.why = "the deepest certified" if self.certified else "the deepest"
            return [self.manifest.exit(usable[-1])]
        tune.check_measured(course.forecast, course.budget, self.bundle)
        return [self.manifest.exit(depth) for depth in usable]

    def graph(self, path: str) -> OrtGraph:
        """A loaded graph by its path in the bundle."""
        if path not in self._graphs:
            where = str(self.bundle.graph_path(path))
            self._graphs[path] = OrtGraph(where, self.manifest.graphs[path], self.threads)
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

    def _answer(
        self, pixels: Array, ids: list[int], exits: list[ExitSpec], limit: int, course: Course
    ) -> Iterator[str | Answer]:
        def run(path: str, state: Array) -> Array:
            return course.timed(path, lambda: self.run_vision_graph(path, state))

        taken, features = run_anytime(exits, run, pixels, course.goes_on)
        text, reason, made = TextStream(self.tokenizer), "length", 0
        tokens = self._tokens(features, ids, limit)
        while made == 0 or not course.out_of_time(len(ids) + made):
            token = course.timed_token(len(ids) + made, lambda: next(tokens, None))
            made += 1
            if token is None or token in self.manifest.text.eos_token_ids:
                reason = "length" if token is None else "stop"
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


def _check_max_new_tokens(value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"max_new_tokens is {value!r}", expected="a whole number of at least 1")
