"""Whether a budget is kept under load: `make bench-budget`, or `python tests/bench/budget.py --out budget.json [BUNDLE]`.

Each trace asks the same session one question after another while other processes take the cores by a schedule. Deadlines
are drawn from 0.6 to 1.4 times the deepest exit's quiet time. After each answer the segments that it left out are run as
well, at once and under the same load, so that the run's true time at every exit is known: that is what the oracle and the
baselines are reckoned from. The budget says `shallowest`, so every request is answered by every policy:

    edgesafe     what the session did: prediction, correction, anytime execution (live, by the clock)
    static       the deepest exit that the table of `edgesafe measure` allows at the same quantile; no correction, no clock
    shallowest   always the first exit
    deepest      always the reference
    oracle       the deepest exit whose true time keeps the deadline, else the first

BUNDLE is by default one of random weights whose encoder takes most of the time (model.py), every exit of which may be used;
in a certified bundle only certified exits are.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from edgesafe import Budget
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import certified_exits, read_certificate
from edgesafe.format.exits import Exit
from edgesafe.machine import allowed_cores
from edgesafe.progress import step, table
from edgesafe.runtime import Forecast, Session, choose_exit, measure
from edgesafe.runtime.calibrate import Correction
from edgesafe.runtime.choose import within_reference
from edgesafe.runtime.forecast import PREFILL, PREPROCESS
from edgesafe.runtime.tokenizer import encode_prompt
from results import circumstances, write_json

QUANTILE = 0.95
DEADLINES = (0.6, 1.4)
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
    """One request: its deadline, what was taken and when its first token came, and the true time at every exit."""

    deadline_ms: float
    exit: Exit
    ttft_ms: float
    static_exit: Exit
    true_ms: dict[Exit, float]


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
    """What the session chooses from, as allowed_exits has it."""
    return within_reference(session.certified or session.manifest.ladder, session.manifest.reference)


def request(session: Watched, picture, prompt: str, deadline_ms: float) -> Run:
    """Ask, then run what the answer left out and reckon the true time at each exit."""
    budget = Budget(deadline_ms, quantile=QUANTILE, on_miss="shallowest")
    answer = session.ask(picture, prompt, budget, max_new_tokens=1, allow_uncertified=True)
    deepest = session.manifest.exit(usable_exits(session)[-1]).graphs
    times = dict(answer.actual_ms)
    for before, path in zip(deepest, deepest[1:-1], strict=False):
        if path not in times:
            start = time.perf_counter()
            session.run_vision_graph(path, session.states[before])
            times[path] = (time.perf_counter() - start) * 1e3
    rest_ms = answer.ttft_ms - sum(times[path] for path in session.manifest.exit(answer.exit).graphs)
    true_ms = {
        exit: rest_ms + sum(times[path] for path in session.manifest.exit(exit).graphs) for exit in usable_exits(session)
    }
    forecast = session.predict(len(encode_prompt(session.tokenizer, session.manifest, prompt)))
    static = static_exit(session, forecast, deadline_ms - times[PREPROCESS])
    return Run(deadline_ms, answer.exit, answer.ttft_ms, static, true_ms)


def static_exit(session: Session, forecast: Forecast, left_ms: float) -> Exit:
    """The exit that the measured table alone allows, or the first."""
    exits = usable_exits(session)
    needed = {exit: forecast.quantile_ms((*session.manifest.exit(exit).graphs, PREFILL), QUANTILE) for exit in exits}
    return choose_exit(needed, exits, max(left_ms, needed[exits[0]]))


def oracle_exit(run: Run) -> Exit:
    """The deepest exit whose true time keeps the deadline, or the first.

    >>> one, times = Exit(1), {Exit(1): 10.0, Exit(2): 20.0, Exit(3): 30.0}
    >>> [str(oracle_exit(Run(deadline_ms, one, 10.0, one, times))) for deadline_ms in (25.0, 5.0)]
    ['2', '1']
    """
    return max((exit for exit, ms in run.true_ms.items() if ms <= run.deadline_ms), default=min(run.true_ms))


POLICIES: dict[str, Callable[[Run], tuple[Exit, float]]] = {
    "edgesafe": lambda run: (run.exit, run.ttft_ms),
    "static": lambda run: (run.static_exit, run.true_ms[run.static_exit]),
    "shallowest": lambda run: (min(run.true_ms), run.true_ms[min(run.true_ms)]),
    "deepest": lambda run: (max(run.true_ms), run.true_ms[max(run.true_ms)]),
    "oracle": lambda run: (oracle_exit(run), run.true_ms[oracle_exit(run)]),
}


def summary(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Each policy's share of missed deadlines, mean depth, and that depth over the oracle's.

    Of two runs the first keeps exit 2 in 25 ms; the second keeps none, so that even the oracle misses it:

    >>> one, times = Exit(1), {Exit(1): 10.0, Exit(2): 20.0, Exit(3): 30.0}
    >>> found = summary([Run(25.0, one, 10.0, Exit(2), times), Run(5.0, one, 10.0, one, times)])
    >>> found["oracle"], found["deepest"]["miss_rate"], found["edgesafe"]["depth_of_oracle"]
    ({'miss_rate': 0.5, 'mean_depth': 1.5, 'depth_of_oracle': 1.0}, 1.0, 0.6667)
    """
    found = {}
    best = float(np.mean([oracle_exit(run).depth for run in runs]))
    for name, policy in POLICIES.items():
        taken = [policy(run) for run in runs]
        missed = sum(ms > run.deadline_ms for (_, ms), run in zip(taken, runs, strict=True))
        depth = float(np.mean([exit.depth for exit, _ in taken]))
        found[name] = {
            "miss_rate": round(missed / len(runs), 4),
            "mean_depth": round(depth, 3),
            "depth_of_oracle": round(depth / best, 4),
        }
    return found


def run_trace(session: Watched, trace: Trace, seconds: float, least: int = 1) -> list[Run]:
    """Ask for so long, and at least so often."""
    rng = random.Random(trace.name)
    picture = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    session.correction = Correction()
    deepest = session.manifest.exit(usable_exits(session)[-1]).graphs
    forecast = session.predict(len(encode_prompt(session.tokenizer, session.manifest, SHORT)))
    typical_ms = forecast.expected_ms((PREPROCESS, *deepest, PREFILL))
    runs: list[Run] = []
    with load(trace.load):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(runs) < least:
            prompt = trace.prompts[len(runs) % len(trace.prompts)]
            runs.append(request(session, picture, prompt, typical_ms * rng.uniform(*DEADLINES)))
            time.sleep(rng.uniform(*PAUSE_S))
    return runs


def run_all(bundle: Path, seconds: float, least: int = 1) -> dict:
    """Measure the bundle, run every trace, and report with date and machine."""
    before = circumstances()
    measured = measure(bundle, seconds=min(20.0, seconds))
    opened = Bundle.open(bundle)
    certificate = read_certificate(opened)
    session = Watched(opened, certificate)
    report = {
        **before,
        "threads": session.threads,
        "model": opened.manifest.name,
        "bundle_digest": opened.digest,
        "exits": [str(exit) for exit in usable_exits(session)],
        "certified": bool(certified_exits(certificate)),
        "quantile": QUANTILE,
        "quiet_ttft_ms": {row["exit"]: row["ttft_ms"] for row in measured.exits},
        "traces": {},
    }
    for trace in traces(seconds):
        with step(trace.name):
            runs = run_trace(session, trace, seconds, least)
        report["traces"][trace.name] = {"requests": len(runs), "policies": summary(runs)}
    return report


def shown(report: dict) -> str:
    """The report as a table, one trace and policy a line."""
    rows = []
    for name, trace in report["traces"].items():
        for policy, found in trace["policies"].items():
            percent = [f"{100 * found[key]:.1f}" for key in ("miss_rate", "depth_of_oracle")]
            rows.append([name, trace["requests"], policy, percent[0], f"{found['mean_depth']:.2f}", percent[1]])
    return table(rows, ["trace", "requests", "policy", "missed %", "mean depth", "of oracle's %"])


def main() -> None:
    """Run it and write the report."""
    parser = argparse.ArgumentParser(description="Deadlines kept and depths reached under load.")
    parser.add_argument("bundle", nargs="?", type=Path, help="a bundle's folder (one of random weights is made)")
    parser.add_argument("--build", type=Path, default=Path("build/bench/bundle"), help="where that one is made")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="the report")
    parser.add_argument("--seconds", type=float, default=40.0, help="seconds a trace (40)")
    options = parser.parse_args()
    if options.bundle is None:
        from bench.model import make_bench_bundle

        options.build.parent.mkdir(parents=True, exist_ok=True)
        options.bundle = make_bench_bundle(options.build)
    report = run_all(options.bundle, options.seconds)
    write_json(options.out, report)
    print(shown(report))


if __name__ == "__main__":
    main()
