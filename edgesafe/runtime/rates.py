"""How fast this machine computes what bundles are made of: the figures of a device's profile, measured in seconds.

A bundle need not be there. What comes out is a profile that `edgesafe plan` and `edgesafe export` take for any model;
`edgesafe measure` still times a bundle's own graphs, which is closer.
"""

from __future__ import annotations

import datetime
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edgesafe.device import DeviceProfile
from edgesafe.errors import DeviceError
from edgesafe.format.latency import percentile
from edgesafe.format.specs import GraphSpec
from edgesafe.machine import host_cores, machine_name
from edgesafe.runtime.deadline import Clock
from edgesafe.runtime.decode import PART_TOKENS
from edgesafe.runtime.engine import Array, Engine, Graph
from edgesafe.runtime.opened import default_engine
from edgesafe.runtime.rate_graphs import attention, decoder, feed_forward, feeds
from edgesafe.runtime.threads import asked_threads

_LEAST_ROUNDS, _MOST_ROUNDS = 3, 50
# Runs in a round of what takes less than a scheduler's slice.
_AGAIN = 8


@dataclass(frozen=True)
class Sizes:
    """Of the graphs: by default a tower's block of SmolVLM's, and layers whose weights no cache holds."""

    tokens: int = 1024
    width: int = 768
    heads: int = 12
    layers: int = 6
    text_width: int = 2048
    inner: int = 5632
    part: int = PART_TOKENS
    small_layers: int = 20
    small: int = 64


@dataclass(frozen=True)
class _Job:
    """An opened graph, its inputs, and how often a round runs it."""

    graph: Graph
    inputs: dict[str, Array]
    times: int = 1


def measured_profile(
    base: DeviceProfile,
    *,
    engine: Engine | None = None,
    threads: int | None = None,
    seconds: float = 10.0,
    sizes: Sizes | None = None,
    clock: Clock = time.perf_counter,
) -> DeviceProfile:
    """A device's profile with the figures of this machine in the place of its estimates.

    Args:
        base: What else a profile says: its schemes and its budget.
        engine: What runs the graphs; by default Python's onnxruntime.
        threads: Of each graph; by default the profile's, or as many as there are cores.
        seconds: About how long to take; everything runs a few times even where that takes longer.
        sizes: Of what is run; smaller ones are for tests.
        clock: Seconds.

    Raises:
        DeviceError: Times that can't be: the machine was too busy.
    """
    engine = engine or default_engine()
    count = host_cores() if base.threads is None else min(base.threads, host_cores())
    count = count if threads is None else asked_threads(threads).threads
    figures = _figures(engine, count, seconds, sizes or Sizes(), clock)
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    told = f"edgesafe devices measure, {machine_name()}, {count} threads, {engine.name} {engine.version}, {day}"
    kept = {key: text for key, text in base.sources.items() if key not in base.estimates}
    sources = kept | {"threads": told} | dict.fromkeys(figures, told)
    return replace(base, threads=count, estimates=figures, sources=sources, measured_on=machine_name())


def _figures(engine: Engine, threads: int, seconds: float, sizes: Sizes, clock: Clock) -> dict[str, float]:
    """Each figure from the medians of rounds in which everything runs in turn."""
    with tempfile.TemporaryDirectory() as folder:
        jobs, weight_bytes = _jobs(Path(folder), engine, threads, sizes)
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    end = time.perf_counter() + seconds
    for done in range(1 + _MOST_ROUNDS):
        for name, job in jobs.items():
            start = clock()
            for _ in range(job.times):
                job.graph.run(job.inputs)
            samples[name] += [(clock() - start) / job.times] if done else []  # the first round reads weights in
        if done >= _LEAST_ROUNDS and time.perf_counter() > end:
            break
    return _solve({name: percentile([1e3 * s for s in times], 50) for name, times in samples.items()}, weight_bytes, sizes)


def _jobs(folder: Path, engine: Engine, threads: int, sizes: Sizes) -> tuple[dict[str, _Job], int]:
    """What is run, by name, and the bytes of the large decoder's weights."""
    state = sizes.tokens, sizes.width
    made = {
        "int8": (feed_forward(folder / "int8", *state, "int8"), 1, 2),
        "fp32": (feed_forward(folder / "fp32", *state, "fp32"), 1, 1),
        "attention": (attention(folder / "attention", *state, sizes.heads), 1, 2),
        "prefill": (decoder(folder / "prefill", sizes.layers, sizes.text_width, sizes.inner), sizes.part, 1),
        "layers": (decoder(folder / "layers", sizes.small_layers, sizes.small, sizes.small), 1, _AGAIN),
        "graph": (feed_forward(folder / "graph", 1, sizes.small, "fp32"), 1, _AGAIN),
    }
    jobs = {}
    for name, (spec, tokens, times) in made.items():
        jobs[name] = _Job(engine.open(str(folder / name), spec, threads), feeds(spec, tokens), times)
    large: GraphSpec = made["prefill"][0]
    jobs["decode"] = _Job(jobs["prefill"].graph, feeds(large, 1), 2)
    return jobs, large.weight_bytes


def _solve(ms: Mapping[str, float], weight_bytes: int, sizes: Sizes) -> dict[str, float]:
    """A profile's figures from each job's time, ms.

    >>> sizes = Sizes(tokens=100, width=10, layers=1, text_width=10, inner=20, part=10, small_layers=4)
    >>> ms = {"int8": 0.16, "fp32": 0.32, "attention": 0.46, "prefill": 0.1, "decode": 3.0, "layers": 2.5, "graph": 0.5}
    >>> found = _solve(ms, 2_000_000, sizes)
    >>> found["gops_int8"], found["gops_fp32"], found["gops_attention"], found["gops_int4"]
    (1.0, 0.5, 1.0, 0.2)
    >>> found["read_gb_s"], found["overhead_ms_per_graph"], found["overhead_ms_per_layer"]
    (1.0, 0.5, 0.5)
    """
    linear = sizes.tokens * sizes.width**2
    int8 = 16 * linear / ms["int8"]  # operations a ms
    scores = ms["attention"] - 6 * linear / int8
    layer = (ms["layers"] - ms["graph"]) / sizes.small_layers
    reading = ms["decode"] - ms["graph"] - sizes.layers * layer
    if min(scores, reading) <= 0 or layer < 0:
        raise DeviceError(
            "the times contradict each other: a part takes longer than the whole",
            expected="a machine with little else to do",
            todo="end other programs and measure again, for longer (--seconds)",
        )
    products = 2 * sizes.layers * sizes.text_width * (4 * sizes.text_width + 3 * sizes.inner)
    figures = {
        "gops_int8": int8 / 1e6,
        "gops_int4": sizes.part * products / ms["prefill"] / 1e6,
        "gops_fp32": 16 * linear / ms["fp32"] / 1e6,
        "gops_attention": 4 * sizes.tokens**2 * sizes.width / scores / 1e6,
        "read_gb_s": weight_bytes / reading / 1e6,
        "overhead_ms_per_graph": ms["graph"],
        "overhead_ms_per_layer": layer,
    }
    return {name: float(f"{value:.4g}") for name, value in figures.items()}
