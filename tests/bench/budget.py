"""Whether a budget is kept under load: `make bench-budget`, or `python tests/bench/budget.py --out JSON [--rungs] [BUNDLE]`.

Each trace asks the same session one question after another while other processes take the cores by a schedule. Deadlines
are drawn from 0.6 to 1.4 times the deepest exit's quiet time; where exits have fewer visual tokens, from 0.1 times. After each
answer what it left out, vision graphs and prefills, is run as well, at once and under the same load, so that the run's true
time at every exit is known: that is what the oracle and the baselines are reckoned from. The budget says `shallowest`, so
every request is answered by every policy:

    edgesafe     what the session did: prediction, correction, anytime execution (live, by the clock)
    depths       the same without the exits that have fewer visual tokens (live, asked right after it)
    static       the exit that the table of `edgesafe measure` allows at the same quantile; no correction, no clock
    shallowest   always the first exit
    deepest      always the reference
    oracle       of the exits whose true time keeps the deadline the deepest, or the one that is right most often

BUNDLE is by default one of random weights (model.py), every exit of which may be used: one whose encoder takes most of the
time, or with `--rungs` one that has exits with fewer visual tokens as well. In a certified bundle only certified exits are. How
often an exit is right is what the certificate says, or of random weights model.py's stand-in.

Where exits have fewer visual tokens, a deadline may be shorter than every exit's true time. Such requests are counted, and are
in no other figure: no choice of an exit could have kept them.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from bench.model import DEPTHS, RUNGS, STAND_IN, accuracy, make_bench_bundle
from edgesafe import Budget
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import Certificate, certified_exits, read_certificate
from edgesafe.format.exits import Exit
from edgesafe.machine import allowed_cores
from edgesafe.progress import step, table
from edgesafe.runtime import OnnxRuntime, Session, choose_exit, measure
from edgesafe.runtime.calibrate import Correction
from edgesafe.runtime.choose import within_reference, worthwhile
from edgesafe.runtime.engine import as_array
from edgesafe.runtime.forecast import PREFILL, PREPROCESS
from edgesafe.runtime.tokenizer import encode_prompt, ids_at
from results import circumstances, write_json

QUANTILE = 0.95
# Of the deepest exit's quiet time; the second where exits have fewer visual tokens.
DEADLINES, RUNG_DEADLINES = (0.6, 1.4), (0.1, 1.4)
PAUSE_S = (0.0, 0.04)
SHORT = "What is in the picture?"
LONG = " ".join([SHORT] * 8)
RAMP = [share / 5 for share in (0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0)]
HERE = Path(__file__).resolve().parent

Schedule = list[tuple[float, float]]


@dataclass(frozen=True)
class Trace:
    """A load (a schedule a competing process, one a core) and the questions asked under it."""

    name: str
    load: tuple[Schedule, ...] = ()
    prompts: tuple[str, ...] = (SHORT,)


@dataclass(frozen=True)
class Run:
    """One request: its deadline, what was taken and when its first token came, and the true time at every exit.

    `depths` is what was taken, and when its first token came, without the exits that have fewer visual tokens.
    """

    deadline_ms: float
    exit: Exit
    ttft_ms: float
    static_exit: Exit
    true_ms: dict[Exit, float]
    depths: tuple[Exit, float] | None = None


class Watched(Session):
    """A session that keeps what each vision graph gave, so that a run can be gone on with after its answer."""

    def run_vision_graph(self, path, state):
        """As in Session."""
        out = super().run_vision_graph(path, state)
        self.states[path] = out
        return out

    @property
    def states(self) -> dict:
        """The last output of each graph."""
        return self.__dict__.setdefault("_states", {})


class OneCopy(OnnxRuntime):
    """Opens each graph once, so that two sessions of one bundle run the same."""

    def __init__(self) -> None:
        self._opened: dict[str, Any] = {}

    def open(self, path, spec, threads):
        """As in OnnxRuntime."""
        if path not in self._opened:
            self._opened[path] = super().open(path, spec, threads)
        return self._opened[path]


def sessions(bundle: Bundle, certificate: Certificate | None) -> tuple[Watched, Session | None]:
    """A session, and where some of its exits have fewer visual tokens one without these."""
    engine = OneCopy()
    first = Watched(bundle, certificate, engine=engine)
    whole = tuple(spec for spec in bundle.manifest.exits if spec.exit.whole)
    if len(whole) == len(bundle.manifest.exits):
        return first, None
    if certificate is not None:
        certificate = replace(certificate, exits=tuple(one for one in certificate.exits if one.exit.whole))
    depths = replace(bundle, manifest=replace(bundle.manifest, exits=whole))
    return first, Session(depths, certificate, tuning=first.tuning, engine=engine)


def bursts(seed: int, seconds: float) -> Schedule:
    """Busy and idle spells of 0.2 to 2 s, one after the other."""
    rng = random.Random(seed)
    spells: Schedule = []
    while sum(length for _, length in spells) < seconds:
        spells += [(0.0, rng.uniform(0.2, 2)), (1.0, rng.uniform(0.2, 2))]
    return spells


def traces(seconds: float) -> list[Trace]:
    """The loads that the issue names; a ramp takes a whole trace."""
    ramp = [(share, seconds / len(RAMP)) for share in RAMP]
    return [
        Trace("quiet"),
        Trace("one busy process in bursts", (bursts(1, seconds),)),
        Trace("two busy processes in bursts", (bursts(2, seconds), bursts(3, seconds))),
        Trace("throttle ramp to half speed and back", (ramp, ramp)),
        Trace("long prompts mixed with short", (), (SHORT, LONG, SHORT, SHORT, LONG)),
    ]


@contextmanager
def load(schedules: Sequence[Schedule]) -> Iterator[None]:
    """Processes of these schedules beside the block, each on a core of its own as far as there are cores."""
    cores = allowed_cores() or tuple(range(len(schedules)))
    started = [
        subprocess.Popen([sys.executable, str(HERE / "busy.py"), str(cores[i % len(cores)]), json.dumps(schedule)])
        for i, schedule in enumerate(schedules)
    ]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def usable_exits(session: Session) -> tuple[Exit, ...]:
    """What the session chooses from, as allowed_exits has it: those preferred come last."""
    manifest, passed = session.manifest, session.certified or certified_exits(session.certificate)
    within = within_reference(passed or manifest.ladder, manifest.reference)
    return worthwhile([exit for exit in manifest.by_cost if exit in within], session.certificate)


def request(session: Watched, depths: Session | None, picture, prompt: str, deadline_ms: float) -> Run:
    """Ask, run what the answer left out, reckon the true time at each exit, and ask again with depths alone."""
    budget = Budget(deadline_ms, quantile=QUANTILE, on_miss="shallowest")
    manifest, exits = session.manifest, usable_exits(session)
    answer = session.ask(picture, prompt, budget, max_new_tokens=1, allow_uncertified=True)
    ids = encode_prompt(session.tokenizer, manifest, prompt)
    times, prefill_ms = dict(answer.actual_ms), {answer.exit.fewer: answer.actual_ms[PREFILL]}
    for exit in sorted(exits):
        way = manifest.exit(exit).graphs
        for before, path in zip(way, way[1:], strict=False):
            if path not in times:
                times[path] = timed(lambda path=path, before=before: session.run_vision_graph(path, session.states[before]))
        if exit.fewer not in prefill_ms:
            read, features = ids_at(ids, manifest, exit), as_array(session.states[way[-1]])
            prefill_ms[exit.fewer] = timed(lambda read=read, features=features: next(session.tokens(features, read, 1)))

    def needed_ms(exit: Exit) -> float:
        return sum(times[path] for path in manifest.exit(exit).graphs) + prefill_ms[exit.fewer]

    true_ms = {exit: answer.ttft_ms + needed_ms(exit) - needed_ms(answer.exit) for exit in exits}
    static = static_exit(session, ids, deadline_ms - times[PREPROCESS])
    again = depths.ask(picture, prompt, budget, max_new_tokens=1, allow_uncertified=True) if depths else None
    return Run(deadline_ms, answer.exit, answer.ttft_ms, static, true_ms, (again.exit, again.ttft_ms) if again else None)


def timed(job: Callable[[], object]) -> float:
    """How long it takes, ms."""
    start = time.perf_counter()
    job()
    return (time.perf_counter() - start) * 1e3


def static_exit(session: Session, ids: list[int], left_ms: float) -> Exit:
    """The exit that the measured table alone allows, or the fastest."""
    needed = {}
    for exit in (exits := usable_exits(session)):
        forecast = session.predict(len(ids_at(ids, session.manifest, exit)))
        needed[exit] = forecast.quantile_ms((*session.manifest.exit(exit).graphs, PREFILL), QUANTILE)
    return choose_exit(needed, exits, max(left_ms, min(needed.values())), exits)


def by_depth(exit: Exit) -> float:
    """What an exit is worth where depth alone counts."""
    return exit.depth


def oracle_exit(run: Run, worth: Callable[[Exit], float] = by_depth) -> Exit:
    """Of the exits whose true time keeps the deadline the one that is worth most, or else the fastest.

    >>> one, times = Exit(1), {Exit(1): 10.0, Exit(2): 20.0, Exit(3): 30.0}
    >>> [str(oracle_exit(Run(deadline_ms, one, 10.0, one, times))) for deadline_ms in (25.0, 5.0)]
    ['2', '1']
    """
    within = [exit for exit, ms in run.true_ms.items() if ms <= run.deadline_ms]
    return max(within, key=worth, default=min(run.true_ms, key=run.true_ms.__getitem__))


def policies(run: Run, worth: Callable[[Exit], float]) -> dict[str, tuple[Exit, float]]:
    """What each policy takes, and its time."""
    first, last, best = min(run.true_ms), max(run.true_ms), oracle_exit(run, worth)
    live = {"edgesafe": (run.exit, run.ttft_ms)} | ({"depths": run.depths} if run.depths else {})
    fixed = {"static": run.static_exit, "shallowest": first, "deepest": last, "oracle": best}
    return live | {name: (exit, run.true_ms[exit]) for name, exit in fixed.items()}


def summary(runs: Sequence[Run], worth: Callable[[Exit], float] = by_depth, name: str = "depth") -> dict[str, dict[str, float]]:
    """Each policy's share of missed deadlines, the mean of what its exits are worth, and that over the oracle's.

    Of two runs the first keeps exit 2 in 25 ms; the second keeps none, so that even the oracle misses it:

    >>> one, times = Exit(1), {Exit(1): 10.0, Exit(2): 20.0, Exit(3): 30.0}
    >>> found = summary([Run(25.0, one, 10.0, Exit(2), times), Run(5.0, one, 10.0, one, times)])
    >>> found["oracle"], found["deepest"]["miss_rate"], found["edgesafe"]["depth_of_oracle"]
    ({'miss_rate': 0.5, 'mean_depth': 1.5, 'depth_of_oracle': 1.0}, 1.0, 0.6667)
    """
    made = [policies(run, worth) for run in runs]
    best = float(np.mean([worth(taken["oracle"][0]) for taken in made]))
    found = {}
    for policy in made[0]:
        missed = sum(taken[policy][1] > run.deadline_ms for taken, run in zip(made, runs, strict=True))
        mean = float(np.mean([worth(taken[policy][0]) for taken in made]))
        found[policy] = {
            "miss_rate": round(missed / len(runs), 4),
            f"mean_{name}": round(mean, 3),
            f"{name}_of_oracle": round(mean / best, 4),
        }
    return found


def run_trace(session: Watched, depths: Session | None, trace: Trace, seconds: float, least: int = 1) -> list[Run]:
    """Ask for so long, and at least so often."""
    rng = random.Random(trace.name)
    picture = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    for one in (session, depths or session):
        one.correction = Correction()
    deepest = max(usable_exits(session))
    ids = ids_at(encode_prompt(session.tokenizer, session.manifest, SHORT), session.manifest, deepest)
    typical_ms = session.predict(len(ids)).expected_ms((PREPROCESS, *session.manifest.exit(deepest).graphs, PREFILL))
    runs: list[Run] = []
    with load(trace.load):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(runs) < least:
            prompt = trace.prompts[len(runs) % len(trace.prompts)]
            deadline_ms = typical_ms * rng.uniform(*(RUNG_DEADLINES if depths else DEADLINES))
            runs.append(request(session, depths, picture, prompt, deadline_ms))
            time.sleep(rng.uniform(*PAUSE_S))
    return runs


def accuracies(session: Session) -> dict[Exit, float]:
    """How often each exit is right: by its certificate, or by the stand-in for the bundle of random weights."""
    if session.certificate is not None:
        return {verdict.exit: verdict.accuracy.rate for verdict in session.certificate.exits}
    return {exit: accuracy(exit) for exit in usable_exits(session)}


def figures(runs: Sequence[Run], right: Mapping[Exit, float] | None) -> dict:
    """A trace's figures: by depth, or by how often exits are right, over the requests that some exit could keep."""
    if right is None:
        return {"requests": len(runs), "policies": summary(runs)}
    could = [run for run in runs if min(run.true_ms.values()) <= run.deadline_ms]
    found = summary(could, right.__getitem__, "accuracy") if could else {}
    return {"requests": len(runs), "too_short": len(runs) - len(could), "policies": found}


def run_all(bundle: Path, seconds: float, least: int = 1) -> dict:
    """Measure the bundle, run every trace, and report with date and machine."""
    before = circumstances()
    measured = measure(bundle, seconds=min(20.0, seconds))
    opened = Bundle.open(bundle)
    certificate = read_certificate(opened)
    session, depths = sessions(opened, certificate)
    right = accuracies(session) if depths else None
    report = {
        **before,
        "threads": session.threads,
        "model": opened.manifest.name,
        "bundle_digest": opened.digest,
        "exits": [str(exit) for exit in usable_exits(session)],
        "certified": bool(certified_exits(certificate)),
        "quantile": QUANTILE,
        "deadlines": RUNG_DEADLINES if depths else DEADLINES,
        "quiet_ttft_ms": {row["exit"]: row["ttft_ms"] for row in measured.exits},
        "traces": {},
    }
    if right is not None:
        report["accuracy_from"] = "its certificate" if certificate else STAND_IN
        report["accuracy"] = {str(exit): round(right[exit], 4) for exit in usable_exits(session)}
    for trace in traces(seconds):
        with step(trace.name):
            runs = run_trace(session, depths, trace, seconds, least)
        report["traces"][trace.name] = figures(runs, right)
    return report


def shown(report: dict) -> str:
    """The report as a table, one trace and policy a line."""
    name = "accuracy" if "accuracy" in report else "depth"
    rows = []
    for title, trace in report["traces"].items():
        asked = trace["requests"] - trace.get("too_short", 0)
        for policy, found in trace["policies"].items():
            percent = [f"{100 * found[key]:.1f}" for key in ("miss_rate", f"{name}_of_oracle")]
            rows.append([title, asked, policy, percent[0], f"{found[f'mean_{name}']:.2f}", percent[1]])
    lines = [f"accuracy: {report['accuracy_from']}"] if "accuracy" in report else []
    lines += [
        f"{title}: {trace['too_short']} more with a deadline shorter than any exit's time"
        for title, trace in report["traces"].items()
        if trace.get("too_short")
    ]
    return "\n".join([table(rows, ["trace", "requests", "policy", "missed %", f"mean {name}", "of oracle's %"]), *lines])


def main() -> None:
    """Run it and write the report."""
    parser = argparse.ArgumentParser(description="Deadlines kept, and depths or accuracy reached, under load.")
    parser.add_argument("bundle", nargs="?", type=Path, help="a bundle's folder (one of random weights is made)")
    parser.add_argument("--rungs", action="store_true", help="make one that has exits with fewer visual tokens")
    parser.add_argument("--build", type=Path, default=Path("build/bench"), help="the folder where it is made")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="the report")
    parser.add_argument("--seconds", type=float, default=40.0, help="seconds a trace (40)")
    options = parser.parse_args()
    if options.bundle is None:
        options.build.mkdir(parents=True, exist_ok=True)
        name, shape = ("rungs", RUNGS) if options.rungs else ("bundle", DEPTHS)
        options.bundle = make_bench_bundle(options.build / name, shape)
    report = run_all(options.bundle, options.seconds)
    write_json(options.out, report)
    print(shown(report))


if __name__ == "__main__":
    main()
