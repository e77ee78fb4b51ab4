"""Times every stage of an answer here and writes ``latency.json``, which holds for this machine alone."""

from __future__ import annotations

import datetime
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from edgesafe.format.bundle import Bundle
from edgesafe.format.latency import LatencyTable, latency_place, percentile, stage_times, write_latency
from edgesafe.format.manifest import Manifest
from edgesafe.format.tiles import ALONE, Cut, prompt_runs
from edgesafe.hub.fetch import bundle_folder
from edgesafe.machine import (
    allowed_cores,
    conditions,
    core_sets,
    host_cores,
    machine_name,
    on_cores,
    read_heat,
    thread_choices,
)
from edgesafe.processor import processor_name
from edgesafe.progress import bar
from edgesafe.runtime.engine import Engine, State
from edgesafe.runtime.forecast import DECODE, PREFILL, PREPROCESS, from_latency
from edgesafe.runtime.image import Picture
from edgesafe.runtime.session import Session
from edgesafe.runtime.threads import Tuning, asked_threads
from edgesafe.runtime.tokenizer import encode_prompt, ids_at, unchecked_ids

# Height and width of pictures: what phones send on (1 megapixel), and a sixteenth of it. Between and beyond lies a line.
_SIZES = ((216, 288), (864, 1152))
_PROMPT = "What is in the picture?"
_LENGTHS = 3
_LONGEST = 4
_STEPS = 4
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 100
_LEAST_ANSWERS, _MOST_ANSWERS = 3, 20
# Where one run alone takes longer than the time set aside for all, two rounds and one answer are enough, the first included,
# which warms up elsewhere: a 7B model takes minutes for a round.
_SLOW_ROUNDS = 2
# Choosing the threads takes this share of the time.
_SWEEP = 0.3
# The length of an answer that thread counts are compared by: prefill likes more threads than single tokens do.
_ANSWER_TOKENS = 16
# A count of threads has to be faster than a smaller one by this much: idle cores are worth something on a device.
_WORTH = 0.03

Samples = dict[str, list[float]]


@dataclass
class _Probe:
    """One session with a picture and prompts to run through it; ``samples`` are ms by stage, round by round."""

    session: Session
    samples: Samples = field(default_factory=dict)

    def __post_init__(self) -> None:
        manifest = self.session.manifest
        self.pictures = _pictures()
        picture = self.pictures[_ROUND]
        looked = self.session.look(picture)
        # One tile stands for all: a forecast multiplies by a picture's own number of them.
        self.pixels = looked[:1] if manifest.tiles else looked
        self.prompts = _prompts(self.session, self.session.cut(picture))
        # The short prompt again as each exit with fewer visual tokens reads it.
        fewer = sorted({exit.visual_tokens: exit for exit in manifest.ladder if exit.visual_tokens}.items())
        self.fewer = {count: ids_at(self.prompts[0], manifest, exit) for count, exit in fewer}

    def one_answer(self) -> float:
        """Run an answer from the deepest exit; seconds without preprocessing, in which threads play no part."""
        start = time.perf_counter()
        deepest = self.session.manifest.reference
        features = self.session.run_exits(self.pixels, [deepest])[deepest]
        for _ in self._tokens(features, self.prompts[0], _ANSWER_TOKENS):
            pass
        return time.perf_counter() - start

    def one_round(self) -> float:
        """Run every stage once, in the order of an answer, and keep its time; seconds in all."""
        began = time.perf_counter()
        for kind, picture in self.pictures.items():
            self._timed(f"{PREPROCESS} {kind}", partial(self.session.look, picture))
        features = self._vision()
        for ids in (*self.fewer.values(), *self.prompts):
            tokens = self._tokens(features, ids, 1 + _STEPS)
            self._timed(f"{PREFILL} {len(ids)}", partial(next, tokens))
            start = time.perf_counter()
            made = sum(1 for _ in tokens)
            self.samples.setdefault(f"{DECODE} {len(ids)}", []).append(_ms_since(start) / max(1, made))
        return time.perf_counter() - began

    def _vision(self) -> State:
        state: dict[tuple[str, ...], State] = {(): self.pixels}
        timed: set[str] = set()
        first = self.session.manifest.exits[0].trunk
        for spec in self.session.manifest.exits:
            for i, path in enumerate(spec.graphs):
                way = spec.graphs[: i + 1]
                if way not in state and path not in timed:
                    timed.add(path)
                    # A head runs once, and what leaves tokens out behind it takes what the head gave then.
                    before = state[way[:-1] if way[:-1] in state else first]
                    state[way] = self._timed(path, partial(self.session.run_vision_graph, path, before))
        features = state[first]
        return self.session.joined(features, ALONE)

    def _timed(self, stage: str, job: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = job()
        self.samples.setdefault(stage, []).append(_ms_since(start))
        return result

    def _tokens(self, features: State, ids: list[int], limit: int) -> Iterator[int]:
        some = features[: ids.count(self.session.manifest.image_token_id)]  # which ones is all the same to the clock
        return self.session.tokens(some, ids, limit, past_the_end=True)


def measure(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    seconds: float = 40.0,
    engine: Engine | None = None,
    thermal_status: Callable[[], int | None] | None = None,
) -> LatencyTable:
    """Find the best threads and cores, time every stage with them, and keep the result.

    Args:
        path: The bundle's folder, or ``hub:ORG/NAME@REVISION``. ``latency.json`` is written into it, or into the user's cache
            where it can't be written.
        threads: Measure with so many threads; by default the best of a sweep, which ``Session.open`` then uses.
        seconds: About how long to take; each part runs a few times even where that takes longer, a very slow one twice.
        engine: What runs the graphs; by default Python's onnxruntime.
        thermal_status: Of an Android app: its PowerManager's ``getCurrentThermalStatus``, which Python can't reach by itself.

    Returns:
        The table that was written; its ``path`` says where.

    Raises:
        BundleError: The folder is not a whole bundle.
        DeviceError: Neither the bundle nor the cache can be written; raised before anything is measured.
    """
    path = bundle_folder(path)
    place = latency_place(Bundle.open(path, verify=False))
    before = read_heat(thermal_status=thermal_status)
    start = time.perf_counter()
    bundle = Bundle.open(path)
    verified_ms = _ms_since(start)
    sweep = _sweep(bundle, seconds * _SWEEP, engine) if threads is None else []
    tuning = _best(sweep) if threads is None else asked_threads(threads)
    start = time.perf_counter()
    session = Session(bundle, None, tuning=tuning, allow_uncertified=True, engine=engine)
    opened_ms = verified_ms + _ms_since(start)
    probe = _Probe(session)
    with on_cores(tuning.cores):
        _rounds(probe, seconds * (1 - _SWEEP if sweep else 1.0))
    table = replace(_table(probe), sweep=sweep, session_open_ms=round(opened_ms, 1))
    table.conditions.update(conditions(before, read_heat(thermal_status=thermal_status)))
    table = write_latency(bundle, table, place)
    if place.parent != bundle.root:
        print(f"the bundle can't be written; the measurement is in {place}", file=sys.stderr, flush=True)
    return table


def peak_rss_mib() -> float | None:
    """This process's largest resident memory so far, MiB, or None where the system doesn't tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return round(peak / (1024.0 if sys.platform != "darwin" else 1024.0**2), 1)


def _sweep(bundle: Bundle, seconds: float, engine: Engine | None) -> list[dict[str, Any]]:
    """The median time of an answer for each choice of threads and cores; one session is open at a time."""
    most = host_cores()  # a container's quota may end before its cores do
    choices = [choice for choice in thread_choices(core_sets(allowed_cores() or range(most))) if choice[0] <= most]
    rows = []
    for threads, cores in bar(choices, label="comparing threads"):
        tuning = Tuning(threads, cores)
        with Session(bundle, None, tuning=tuning, allow_uncertified=True, engine=engine) as session, on_cores(cores):
            probe = _Probe(session)
            times = [1e3 * probe.one_answer()]
            if times[0] < 1e3 * seconds / len(choices):
                end = time.perf_counter() + seconds / len(choices)
                times = [1e3 * probe.one_answer() for _ in _until(end, _LEAST_ANSWERS, _MOST_ANSWERS)]
        rows.append({"threads": threads, "cores": list(cores) if cores else None, "answer_ms": percentile(times, 50)})
    return rows


def _best(sweep: list[dict[str, Any]]) -> Tuning:
    """The fastest row, where a later one (more threads or cores) must be faster by a few percent.

    >>> _best([{"threads": n, "cores": None, "answer_ms": ms} for n, ms in ((1, 100.0), (2, 70.0), (4, 69.0))]).threads
    2
    """
    best = sweep[0]
    for row in sweep[1:]:
        if row["answer_ms"] < (1 - _WORTH) * best["answer_ms"]:
            best = row
    return Tuning(best["threads"], tuple(best["cores"]) if best["cores"] else None)


def _rounds(probe: _Probe, seconds: float) -> None:
    least, took = _SLOW_ROUNDS, probe.one_round()
    if took < seconds:
        probe.samples.clear()
        least, took = _LEAST_ROUNDS, probe.one_round()
    for _ in bar(range(1, min(max(int(seconds / took), least), _MOST_ROUNDS)), label="measuring: round"):
        probe.one_round()


def _until(end: float, least: int, most: int) -> Iterator[int]:
    """Count up to ``most``, but not beyond the time ``end`` once there were ``least``."""
    for i in range(most):
        if i >= least and time.perf_counter() >= end:
            return
        yield i


def _pictures() -> dict[tuple[int, bool], Picture]:
    """A picture by its pixels and whether it is encoded: as an array, and as a JPEG file of a soft picture, as a photo is."""
    found: dict[tuple[int, bool], Picture] = {}
    for height, width in _SIZES:
        noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        image.save(file := io.BytesIO(), "JPEG", quality=85)
        found |= {(height * width, False): np.asarray(image), (height * width, True): file.getvalue()}
    return found


# The picture that the rows of `exits` are for.
_ROUND = (_SIZES[-1][0] * _SIZES[-1][1], False)


def _prompts(session: Session, cut: Cut) -> list[list[int]]:
    """A short prompt's ids, longer ones and the longest that is measured, all within the context.

    Where the bundle has tiles the short one shows one of them, and the longest is no shorter than one with all of ``cut``.
    """
    short = encode_prompt(session.tokenizer, session.manifest, _PROMPT)
    m = session.manifest
    whole = sum(prompt_runs(m.tiles, cut, m.image_token, m.image_tokens)[1]) - m.image_tokens
    room = session.manifest.text.context_length - 1 - _STEPS - len(short)
    most = max(0, min(room, max(whole, (_LONGEST - 1) * len(short))))
    extras = sorted({most * i // (_LENGTHS - 1) for i in range(_LENGTHS)})
    # The image token stands at the beginning; what is repeated is the question.
    tail = [i for i in short[-8:] if i != session.manifest.image_token_id]
    return [[*short, *(tail * (1 + extra // len(tail)))[:extra]] for extra in extras]


def _table(probe: _Probe) -> LatencyTable:
    session, samples = probe.session, probe.samples
    lengths = [len(ids) for ids in (*probe.fewer.values(), *probe.prompts)]
    short: dict[int | None, int] = {None: len(probe.prompts[0])}
    short.update((count, len(ids)) for count, ids in probe.fewer.items())
    text = {
        PREPROCESS: [
            {"pixels": pixels, "encoded": encoded, **stage_times(samples[f"{PREPROCESS} {(pixels, encoded)}"])}
            for pixels, encoded in probe.pictures
        ],
        PREFILL: [{"tokens": n, **stage_times(samples[f"{PREFILL} {n}"])} for n in lengths],
        DECODE: [{"context": n, **stage_times(samples[f"{DECODE} {n}"])} for n in lengths],
    }
    table = LatencyTable(
        bundle_digest=session.bundle.digest,
        machine=machine_name(),
        engine=session.engine.name,
        engine_version=session.engine.version,
        threads=session.threads,
        cores=list(session.tuning.cores) if session.tuning.cores else None,
        segments={path: stage_times(times) for path, times in samples.items() if path in session.manifest.graphs},
        text=text,
        exits=_exit_rows(session.manifest, samples, short),
        peak_rss_mib=peak_rss_mib(),
        conditions={
            "cpu_model": processor_name(),
            "measured_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
    )
    # Only one tile was run. Where exits differ in tiles, their times are told for a picture that has more.
    return replace(table, exits=_told_rows(session, table)) if any(exit.tiles for exit in session.manifest.ladder) else table


def _told_rows(session: Session, table: LatencyTable) -> list[dict[str, Any]]:
    """Each exit's time to the first token with as many tiles as it has of the picture that times are told for."""
    rows, manifest = [], session.manifest
    for spec in manifest.exits:
        cut = manifest.told_cut(spec.exit)
        length = len(unchecked_ids(session.tokenizer, manifest, _PROMPT, cut, spec.exit))
        times = from_latency(manifest, table, length).tiled(cut.tiles)
        ttft = {f"p{percent}_ms": times.ttft_ms(spec.graphs, percent / 100) for percent in (50, 95)}
        rows.append({"exit": str(spec.exit), "ttft_ms": ttft})
    return rows


def _exit_rows(manifest: Manifest, samples: Samples, lengths: Mapping[int | None, int]) -> list[dict[str, Any]]:
    """Each exit's time to the first token: percentiles of the rounds' sums. A deeper exit is never reported as faster.

    Args:
        manifest: Has the exits.
        samples: ms by stage.
        lengths: Tokens of the short prompt, by an exit's visual tokens.
    """
    rows: list[dict[str, Any]] = []
    floors = dict.fromkeys(lengths, {"p50_ms": 0.0, "p95_ms": 0.0})
    for spec in manifest.exits:
        kind = spec.exit.visual_tokens
        stages, floor = (f"{PREPROCESS} {_ROUND}", *spec.graphs, f"{PREFILL} {lengths[kind]}"), floors[kind]
        sums = [sum(row) for row in zip(*(samples[stage] for stage in stages), strict=True)]
        floors[kind] = {key: max(floor[key], percentile(sums, percent)) for key, percent in (("p50_ms", 50), ("p95_ms", 95))}
        rows.append({"exit": str(spec.exit), "ttft_ms": floors[kind]})
    return rows


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3
