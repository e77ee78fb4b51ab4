"""What each stage of an answer is expected to take: from a measurement on this machine, or from a device's profile."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgesafe.device import DeviceProfile
from edgesafe.format import graph_io
from edgesafe.format.latency import ESTIMATED, MEASURED, LatencyTable, percentile
from edgesafe.format.manifest import Manifest
from edgesafe.format.specs import GraphSpec, TextSpec
from edgesafe.runtime.calibrate import Correction, enough_errors, error_bound, factor
from edgesafe.runtime.decode import PART_TOKENS

WAIT, PREPROCESS, PREFILL, DECODE = "wait", "preprocess", "prefill", "decode"
UNCORRECTED = Correction()
# The source of a prediction that there is none.
NONE = "none"
# What a note ends with where a measurement would help.
MEASURE = "run edgesafe measure"


class Forecast:
    """The stages' times for one prompt length, one column per stage and one row per measured round.

    Stages are ``preprocess``, the vision graphs by their paths, ``prefill`` and ``decode`` (one more token).

    Args:
        rounds: ms by stage, as many for each; empty where nothing is known. An estimate has one round.
        source: ``measured`` (on this machine), ``estimated`` (from the device's profile) or ``none``.
        note: What the caller should know about it.
        device: The title of the profile that an estimate is for.
        decode: ``(context, ms)`` points of one more token, ascending; by default the column's median anywhere.
        preprocess: ``(pixels, ms)`` points of a picture's preprocessing, ascending, by whether it is an encoded file; by
            default the column's median for any picture.
    """

    def __init__(
        self,
        rounds: Mapping[str, Sequence[float]],
        source: str,
        note: str = "",
        device: str = "",
        decode: Sequence[tuple[float, float]] = (),
        preprocess: Mapping[bool, Sequence[tuple[float, float]]] | None = None,
    ) -> None:
        self.rounds = rounds
        self.source = source
        self.note = note
        self.device = device
        self.typical_ms = {stage: percentile(times, 50) for stage, times in rounds.items()}
        self._decode = decode
        self._preprocess = preprocess or {}
        self._spreads: dict[tuple[tuple[str, ...], float], float] = {}

    def __bool__(self) -> bool:
        return bool(self.rounds)

    def expected_ms(self, stages: Sequence[str], correction: Correction = UNCORRECTED) -> float:
        """The stages' medians, each times its correction, added up.

        >>> Forecast({"a": (1.0, 2.0, 6.0), "b": (3.0, 3.0, 3.0)}, "measured").expected_ms(("a", "b"), Correction(2.0))
        10.0
        """
        return sum(self.typical_ms[stage] * factor(correction, stage) for stage in stages)

    def quantile_ms(self, stages: Sequence[str], quantile: float, correction: Correction = UNCORRECTED) -> float:
        """What the stages together take at most, with a chance of ``quantile``.

        The quantile of a sum is not the sum of the quantiles: one slow stage does not make the others slow, but
        a slow moment does. So each round's stages are added up first, and the quantile is that of the
        rounds' sums. It is kept as a ratio to the medians' sum, and the ratio by which predictions were
        exceeded lately takes its place where that is larger. Both multiply the corrected medians.

        The sums are 3, 3 and 9, the medians add up to 4; the largest sum is 9:

        >>> f = Forecast({"a": (1.0, 2.0, 6.0), "b": (2.0, 1.0, 3.0)}, "measured")
        >>> f.expected_ms(("a", "b")), f.quantile_ms(("a", "b"), 1.0), f.quantile_ms(("a", "b"), 1.0, Correction(2.0))
        (4.0, 9.0, 18.0)
        """
        widening = error_bound(correction, quantile)
        if not enough_errors(correction, quantile):
            widening = max(self.spread(tuple(stages), quantile), widening)
        return self.expected_ms(stages, correction) * widening

    def ttft_ms(self, graphs: Sequence[str], quantile: float, correction: Correction = UNCORRECTED) -> float | None:
        """The time to the first token by way of these vision graphs; None where a stage's time is not known."""
        stages = (PREPROCESS, *graphs, PREFILL)
        return self.quantile_ms(stages, quantile, correction) if self.rounds.keys() >= set(stages) else None

    def only(self, stage: str, note: str) -> Forecast:
        """What is known of one stage alone; it predicts no time to the first token, and says why."""
        return Forecast({stage: self.rounds[stage]} if self else {}, NONE, note, decode=self._decode)

    def tiled(self, tiles: int) -> Forecast:
        """The same with vision graphs that run so many times, once per tile."""
        if tiles == 1 or not self:
            return self
        other = (PREPROCESS, PREFILL, DECODE)
        rounds = {stage: times if stage in other else [tiles * ms for ms in times] for stage, times in self.rounds.items()}
        return Forecast(rounds, self.source, self.note, self.device, self._decode, self._preprocess)

    def for_picture(self, pixels: int, encoded: bool) -> Forecast:
        """The same with the preprocessing of a picture of so many pixels, a file's with the decoding.

        >>> f = Forecast({"preprocess": (9.0,)}, "measured", preprocess={True: [(100, 3.0), (300, 7.0)]})
        >>> f.for_picture(200, True).typical_ms, f.for_picture(200, False).typical_ms
        ({'preprocess': 5.0}, {'preprocess': 9.0})
        """
        if encoded not in self._preprocess:
            return self
        other = copy.copy(self)  # it shares the spreads, which are of the rounds
        other.typical_ms = self.typical_ms | {PREPROCESS: on_line(self._preprocess[encoded], pixels)}
        return other

    def spread(self, stages: tuple[str, ...], quantile: float) -> float:
        """The quantile of the rounds' sums over the sum of the stages' medians, and at least 1."""
        if (stages, quantile) not in self._spreads:
            sums = [sum(row) for row in zip(*(self.rounds[stage] for stage in stages), strict=True)]
            typical = sum(percentile(self.rounds[stage], 50) for stage in stages)
            ratio = percentile(sums, 100 * quantile) / typical if typical > 0 else 1.0
            self._spreads[stages, quantile] = max(1.0, ratio)
        return self._spreads[stages, quantile]

    def decode_ms(self, context: int) -> float:
        """The median time of one more token after ``context`` tokens."""
        return on_line(self._decode, context) if self._decode else self.typical_ms[DECODE]


def on_line(points: Sequence[tuple[float, float]], x: float) -> float:
    """The value at x on the lines between points, ascending in x; beyond the last one the last line continues.

    A value never falls as x grows, since more tokens are never less work, and below the first point it is that one's.

    >>> points = [(10, 20.0), (30, 60.0), (50, 50.0)]
    >>> [on_line(points, x) for x in (5, 20, 30, 40, 90)]
    [20.0, 40.0, 60.0, 60.0, 60.0]
    >>> on_line(points[:2], 40)
    80.0
    """
    risen: list[tuple[float, float]] = []
    for at, value in points:
        risen.append((at, max(value, risen[-1][1]) if risen else value))
    if x <= risen[0][0] or len(risen) == 1:
        return risen[0][1]
    (x0, y0), (x1, y1) = next((pair for pair in zip(risen, risen[1:], strict=False) if x <= pair[1][0]), risen[-2:])
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def from_latency(manifest: Manifest, table: LatencyTable, prompt_tokens: int) -> Forecast:
    """The stages' measured times, with the prefill at the prompt's length between the measured lengths.

    Its column is that of the nearest measured length, scaled to the length asked for: so a round in which the machine
    was slow stays a slow round.
    """
    pictures = table.text[PREPROCESS]
    rounds: dict[str, Sequence[float]] = {PREPROCESS: max(pictures, key=lambda row: row["pixels"])["ms"]}
    rounds |= {path: table.segments[path]["ms"] for spec in manifest.exits for path in spec.graphs}
    rounds[PREFILL] = _at_length(table.text[PREFILL], "tokens", prompt_tokens)
    rounds[DECODE] = _at_length(table.text[DECODE], "context", prompt_tokens)
    kinds = {row["encoded"] for row in pictures}
    by_kind = {kind: _points([row for row in pictures if row["encoded"] is kind], "pixels") for kind in kinds}
    return Forecast(rounds, MEASURED, decode=_points(table.text[DECODE], "context"), preprocess=by_kind)


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return sorted((row[key], float(row["p50_ms"])) for row in rows)


def _at_length(rows: Sequence[Mapping[str, Any]], key: str, length: int) -> list[float]:
    nearest = min(rows, key=lambda row: abs(row[key] - length))
    median = nearest["p50_ms"]
    scale = on_line(_points(rows, key), length) / median if median > 0 else 1.0
    return [scale * ms for ms in nearest["ms"]]


def from_profile(manifest: Manifest, profile: DeviceProfile, prompt_tokens: int) -> Forecast | None:
    """The stages' times from the profile's figures; None where a needed figure is absent.

    The preprocessing counts as nothing, and so do absent fixed costs: an estimate is a floor, unless the figures were measured.
    An estimate is one number: it knows no spread until runs have shown one.
    """
    text, vision = (manifest.quantization.get(side, "fp32") for side in ("text", "vision"))
    decoder = manifest.graphs[manifest.text.decoder]
    graphs = {path for spec in manifest.exits for path in spec.graphs}
    times = {path: work_ms(vision_work(path, manifest.graphs[path]), profile, vision) for path in graphs}
    times[PREFILL] = work_ms(decoder_work(decoder, manifest.text, prompt_tokens), profile, text)
    times[DECODE] = work_ms(decoder_work(decoder, manifest.text, 1, prompt_tokens), profile, text)
    known = {stage: (ms,) for stage, ms in times.items() if ms is not None}
    if len(known) < len(times):
        return None
    note = f"the time was estimated for {profile.title}, not measured: {MEASURE}"
    return Forecast({PREPROCESS: (0.0,), **known}, ESTIMATED, note, profile.title)


@dataclass(frozen=True)
class Work:
    """What one run of a graph does.

    ``products`` are operations of products by weights, ``attention`` those of attention's two products. ``read_bytes`` are read
    once, and ``layers`` are those of a decoder.
    """

    products: float
    attention: float
    read_bytes: float
    layers: int = 0


def vision_work(path: str, graph: GraphSpec) -> Work | None:
    """A vision graph's work; a whole exit's attention can't be told apart and counts among its products.

    >>> state = graph_io.TensorSpec(graph_io.HIDDEN_STATES_OUT, "float32", (1, 10, 4))
    >>> vision_work(graph_io.segment_path(1, 3), GraphSpec((), (state,), 5000, 100))
    Work(products=1800.0, attention=3200.0, read_bytes=100, layers=0)
    """
    if graph.flops is None:
        return None
    attention = 0.0
    for tensor in graph.outputs:
        if tensor.name == graph_io.HIDDEN_STATES_OUT and (blocks := graph_io.blocks_of(path)):
            _, tokens, width = (float(n) for n in tensor.shape)
            attention = min(graph.flops, blocks * 4 * tokens**2 * width)
    return Work(graph.flops - attention, attention, graph.weight_bytes)


def decoder_work(graph: GraphSpec, text: TextSpec, tokens: int, past: int = 0) -> Work | None:
    """The work of reading ``tokens`` behind ``past`` others; the head counts for the last token alone.

    A graph's ``flops`` count one token, the head among them and attention's products not.
    """
    if graph.flops is None:
        return None
    head = min(graph.flops, 2 * text.vocab_size * text.hidden_size)
    # A part of the prompt looks at all that was read and at the whole of itself; all heads together are as wide as the state.
    seen = past + (tokens + min(tokens, PART_TOKENS)) / 2
    attention = text.num_layers * 4 * tokens * seen * text.hidden_size
    cache = 8 * text.num_layers * text.num_kv_heads * text.head_dim * past
    return Work(tokens * (graph.flops - head) + head, attention, graph.weight_bytes + cache, text.num_layers)


def work_ms(work: Work | None, profile: DeviceProfile, scheme: str) -> float | None:
    """A run's estimated time, ms: the longer of computing and of reading, plus the fixed costs; None where a figure is absent.

    Weights in blocks and attention have figures of their own; without these the int8 figure counts for both.
    """
    found = profile.estimates
    # MLAS multiplies weights in four bits in eight, so that both quantized schemes may use the int8 figure.
    names = {"fp32": ("gops_fp32",), "int8-dynamic": ("gops_int8",)}.get(scheme, ("gops_int4", "gops_int8"))
    gops = next((found[name] for name in names if found.get(name)), None)
    read = found.get("read_gb_s")
    if work is None or not read:
        return None
    if not gops and (work.products or work.attention):  # what averages visual tokens has neither
        return None
    computing = work.products / gops + work.attention / found.get("gops_attention", gops) if gops else 0.0
    fixed = found.get("overhead_ms_per_graph", 0.0) + work.layers * found.get("overhead_ms_per_layer", 0.0)
    return max(computing, work.read_bytes / read) / 1e6 + fixed
