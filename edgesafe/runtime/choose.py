"""Which exit to run: pure arithmetic over predictions, certified depths and a budget."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from edgesafe.bundle import GraphSpec, Manifest
from edgesafe.device import DeviceProfile, LatencyTable
from edgesafe.errors import InputError, NoExitFitsError

QUANTILE = "p95_ms"


@dataclass(frozen=True)
class Budget:
    """What an answer may cost: ``ttft_ms``, the time to its first token in milliseconds."""

    ttft_ms: float

    def __post_init__(self) -> None:
        value = self.ttft_ms
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"{value!r} is no budget", where="ttft_ms", expected="milliseconds above 0")


@dataclass(frozen=True)
class Prediction:
    """The predicted time to the first token of each exit in ms (None = unknown), and what it rests on.

    ``source`` is ``measured`` (on this machine), ``estimated`` (from the device's profile) or ``none``.
    """

    ttft_ms: dict[int, float] | None
    source: str
    note: str = ""


def choose_exit(predicted: Mapping[int, float], certified: Collection[int], budget_ms: float) -> int:
    """The deepest certified exit whose predicted time to the first token fits the budget.

    Args:
        predicted: ms by exit depth.
        certified: Depths with a passed verdict.
        budget_ms: The budget, ms; a prediction equal to it fits.

    Raises:
        NoExitFitsError: No certified exit fits.

    >>> choose_exit({2: 10.0, 4: 20.0, 6: 30.0}, {2, 4, 6}, 25.0)
    4
    >>> choose_exit({2: 10.0, 4: 20.0, 6: 30.0}, {2, 6}, 25.0)
    2
    """
    fitting = [depth for depth in certified if depth in predicted and predicted[depth] <= budget_ms]
    if fitting:
        return max(fitting)
    times = {depth: predicted[depth] for depth in certified if depth in predicted}
    fastest = f"{min(times.values()):.1f} ms" if times else "unknown"
    raise NoExitFitsError(
        f"no certified exit fits a budget of {budget_ms:g} ms",
        expected=f"at least {fastest}, the fastest certified exit's prediction",
        todo="raise the budget, or export with shallower exits and certify them",
    )


def within_reference(depths: Collection[int], reference_depth: int) -> tuple[int, ...]:
    """The depths up to the reference depth, or all where every one lies beyond it.

    A depth beyond the reference was never trained for: it is not taken only for being deeper.

    >>> within_reference({2, 11, 12}, 11), within_reference({12}, 11)
    ((2, 11), (12,))
    """
    return tuple(sorted(d for d in depths if d <= reference_depth)) or tuple(sorted(depths))


def from_latency(manifest: Manifest, table: LatencyTable, prompt_tokens: int) -> dict[int, float]:
    """Each exit's time to the first token from measured parts, at their 95th percentile, ms.

    A deeper exit is never predicted faster than a shallower one: whatever the noise says, it does more work.
    """
    fixed = float(table.text["preprocess"][QUANTILE]) + _prefill_ms(table.text["prefill"], prompt_tokens)
    times: dict[int, float] = {}
    floor = 0.0
    for spec in manifest.exits:
        floor = max(floor, fixed + sum(table.segments[path][QUANTILE] for path in spec.graphs))
        times[spec.exit_depth] = floor
    return times


def _prefill_ms(points: list[dict[str, Any]], tokens: int) -> float:
    """The prefill's time at a prompt length, on the line through the shortest and longest measured ones."""
    ordered = sorted(points, key=lambda point: point["tokens"])
    low, high = ordered[0], ordered[-1]
    slope = 0.0
    if high["tokens"] > low["tokens"]:
        slope = max(0.0, (high[QUANTILE] - low[QUANTILE]) / (high["tokens"] - low["tokens"]))
    return float(low[QUANTILE] + slope * max(0, tokens - low["tokens"]))


def from_profile(manifest: Manifest, profile: DeviceProfile, prompt_tokens: int) -> dict[int, float] | None:
    """Each exit's time to the first token from the profile's figures, ms; None where a needed figure is absent.

    A graph costs the longer of its arithmetic and of reading its weights once, plus the overhead. An
    absent overhead adds nothing, so an estimate is a floor. A decoder's ``flops`` count one token.
    """
    vision = manifest.quantization.get("vision", "fp32")
    text = manifest.quantization.get("text", "fp32")
    prefill = _graph_ms(manifest.graphs[manifest.text.decoder], profile, text, prompt_tokens)
    if prefill is None:
        return None
    times: dict[int, float] = {}
    floor = 0.0
    for spec in manifest.exits:
        parts = [_graph_ms(manifest.graphs[path], profile, vision, 1) for path in spec.graphs]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        floor = max(floor, prefill + sum(known))
        times[spec.exit_depth] = floor
    return times


def _graph_ms(graph: GraphSpec, profile: DeviceProfile, scheme: str, runs: int) -> float | None:
    # int4 weights are multiplied in int8 by MLAS, so both quantized schemes use the int8 figure.
    gops = profile.estimates.get("gops_fp32" if scheme == "fp32" else "gops_int8")
    read = profile.estimates.get("read_gb_s")
    if not gops or not read or graph.flops is None:
        return None
    arithmetic = runs * graph.flops / (gops * 1e9) * 1e3
    reading = graph.weight_bytes / (read * 1e9) * 1e3
    return max(arithmetic, reading) + profile.estimates.get("overhead_ms_per_graph", 0.0)
