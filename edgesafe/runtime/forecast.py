"""What each stage of an answer is expected to take: from a measurement on this machine, or from a device's profile."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from edgesafe.device import DeviceProfile
from edgesafe.format.latency import ESTIMATED, MEASURED, LatencyTable, percentile
from edgesafe.format.manifest import Manifest
from edgesafe.format.specs import GraphSpec
from edgesafe.runtime.calibrate import Correction, enough_errors, error_bound, factor

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

    A graph costs the longer of its arithmetic and of reading its weights once, plus the overhead. An
    absent overhead adds nothing and the preprocessing counts as nothing, so an estimate is a floor. A decoder's
    ``flops`` count one token. An estimate is one number: it knows no spread until runs have shown one.
    """
    text = manifest.quantization.get("text", "fp32")
    vision = manifest.quantization.get("vision", "fp32")
    decoder = manifest.graphs[manifest.text.decoder]
    times = {path: graph_ms(manifest.graphs[path], profile, vision, 1) for spec in manifest.exits for path in spec.graphs}
    times[PREFILL] = graph_ms(decoder, profile, text, prompt_tokens)
    times[DECODE] = graph_ms(decoder, profile, text, 1)
    known = {stage: (ms,) for stage, ms in times.items() if ms is not None}
    if len(known) < len(times):
        return None
    note = f"the time was estimated for {profile.title}, not measured: {MEASURE}"
    return Forecast({PREPROCESS: (0.0,), **known}, ESTIMATED, note, profile.title)


def graph_ms(graph: GraphSpec, profile: DeviceProfile, scheme: str, runs: int) -> float | None:
    """One graph's estimated time over ``runs`` tokens, ms, or None where the profile lacks a figure for it."""
    # int4 weights are multiplied in int8 by MLAS, so both quantized schemes use the int8 figure.
    gops = profile.estimates.get("gops_fp32" if scheme == "fp32" else "gops_int8")
    read = profile.estimates.get("read_gb_s")
    if not gops or not read or graph.flops is None:
        return None
    arithmetic = runs * graph.flops / (gops * 1e9) * 1e3
    reading = graph.weight_bytes / (read * 1e9) * 1e3
    return max(arithmetic, reading) + profile.estimates.get("overhead_ms_per_graph", 0.0)
