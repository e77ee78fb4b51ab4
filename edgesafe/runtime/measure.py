"""Times every graph of a bundle here and writes ``latency.json``, which holds for this machine alone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import onnxruntime as ort

from edgesafe import graph_io
from edgesafe.bundle import Manifest
from edgesafe.device import MEASURED, LatencyTable, machine_name, write_latency
from edgesafe.progress import bar
from edgesafe.runtime import decode
from edgesafe.runtime.image import preprocess
from edgesafe.runtime.session import Session
from edgesafe.runtime.tokenizer import encode_prompt

# A photo of the size that phones send on: 1 megapixel. Decoding a larger file takes longer than predicted.
_PICTURE = (864, 1152, 3)
_WARMUPS = 2
_LEAST = 5
_MOST = 40
_PROMPT = "What is in the picture?"
_LONGER = 4

Job = tuple[str, Callable[[], object]]


def measure(path: str | os.PathLike[str], *, threads: int | None = None, seconds: float = 40.0) -> LatencyTable:
    """Time preprocessing, each vision graph, prefill at two lengths and one decoding step; keep the result.

    Args:
        path: The bundle's folder; ``latency.json`` is written into it.
        threads: As for ``Session.open``.
        seconds: About how long to take; each part runs at least five times even where that takes longer.

    Returns:
        The table that was written. Times are ms, ``p50_ms`` and ``p95_ms`` of ``n`` runs.

    Raises:
        BundleError: The folder is no whole bundle.
        DeviceError: The machine's memory or time doesn't suffice.
    """
    session = Session.open(path, threads=threads, allow_uncertified=True)
    jobs, tokens = _jobs(session)
    share_s = seconds / len(jobs)
    times = {}
    for name, job in bar(jobs, label="measuring"):
        times[name] = _time(job, share_s)
    vision = {name: row for name, row in times.items() if name in session.manifest.graphs}
    text = {
        "preprocess": times["preprocess"],
        "prefill": [{"tokens": n, **times[f"prefill {n}"]} for n in tokens],
        "decode": times["decode"],
    }
    table = LatencyTable(
        bundle_digest=session.bundle.digest,
        machine=machine_name(),
        onnxruntime_version=ort.__version__,
        threads=session.threads,
        segments=vision,
        text=text,
        exits=_exit_rows(session.manifest, vision, times["preprocess"], times[f"prefill {tokens[0]}"]),
        peak_rss_mib=peak_rss_mib(),
        source=MEASURED,
    )
    write_latency(session.bundle, table)
    return table


def percentiles(samples_ms: list[float]) -> dict[str, float]:
    """The median and the 95th percentile, linear between samples.

    >>> percentiles([1.0, 2.0, 3.0])
    {'p50_ms': 2.0, 'p95_ms': 2.9, 'n': 3}
    """
    p50, p95 = np.percentile(samples_ms, [50, 95])
    return {"p50_ms": round(float(p50), 4), "p95_ms": round(float(p95), 4), "n": len(samples_ms)}


def peak_rss_mib() -> float | None:
    """This process's largest resident memory so far, MiB, or None where the system doesn't tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return round(peak / (1024.0 if sys.platform != "darwin" else 1024.0**2), 1)


def _jobs(session: Session) -> tuple[list[Job], list[int]]:
    """Everything to time, by name, and the two prompt lengths in tokens."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, _PICTURE, np.uint8)
    jobs: list[Job] = [("preprocess", partial(preprocess, picture, session.manifest.image))]
    state: dict[tuple[str, ...], decode.State] = {(): preprocess(picture, session.manifest.image)}
    for spec in session.manifest.exits:
        for i, path in enumerate(spec.graphs):
            before = spec.graphs[:i]
            if spec.graphs[: i + 1] not in state:
                state[spec.graphs[: i + 1]] = session.run_vision_graph(path, state[before])
            if path not in dict(jobs):
                jobs.append((path, partial(session.run_vision_graph, path, state[before])))
    features = decode.as_array(state[session.manifest.exits[-1].graphs])
    prompts = _prompts(session)
    for ids in prompts:
        jobs.append((f"prefill {len(ids)}", partial(session.prefill, features, ids)))
    text = session.manifest.text
    _, cache = session.prefill(features, prompts[0])
    embed, decoder = session.graph(text.embed_tokens), session.graph(text.decoder)

    def one_step() -> object:
        new = embed.run({graph_io.INPUT_IDS: np.zeros((1, 1), np.int64)})[graph_io.INPUTS_EMBEDS]
        return decode.step(decoder, text, new, cache)

    return [*jobs, ("decode", one_step)], [len(ids) for ids in prompts]


def _prompts(session: Session) -> list[list[int]]:
    """A short prompt's ids and a longer one's, both within the context."""
    short = encode_prompt(session.tokenizer, session.manifest, _PROMPT)
    tail = short[-_LONGER:]
    room = session.manifest.text.context_length - 1 - len(short)
    extra = max(1, len(short) // 2)
    longer = [*short, *(tail * extra)[: min(extra, room)]] if room > 0 else short
    return [short, longer] if len(longer) > len(short) else [short]


def _time(job: Callable[[], object], share_s: float) -> dict[str, float]:
    for _ in range(_WARMUPS):
        job()
    samples: list[float] = []
    end = time.perf_counter() + share_s
    while len(samples) < _LEAST or (len(samples) < _MOST and time.perf_counter() < end):
        start = time.perf_counter()
        job()
        samples.append((time.perf_counter() - start) * 1e3)
    return percentiles(samples)


def _exit_rows(
    manifest: Manifest, vision: dict[str, dict[str, float]], before: dict[str, float], after: dict[str, float]
) -> list[dict[str, object]]:
    """Each exit's time to the first token as a sum of its parts, so that it grows with the depth."""
    rows: list[dict[str, object]] = []
    floor = dict.fromkeys(("p50_ms", "p95_ms"), 0.0)
    for spec in manifest.exits:
        for key in floor:
            total = before[key] + after[key] + sum(vision[path][key] for path in spec.graphs)
            floor[key] = max(floor[key], round(total, 4))
        rows.append({"exit_depth": spec.exit_depth, "ttft_ms": dict(floor)})
    return rows
