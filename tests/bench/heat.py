"""Whether a budget is kept while a machine grows hot: `python tests/bench/heat.py --out JSON`, in simulated time.

Ten minutes pass on a clock that only the stages move, while they grow from their measured times to two and a half times as
long, in a line or in steps as governors take them, each with noise of its own. The chooser, the clock between segments and the
correction are the product's own. `uncorrected` is the same with nothing learned, and `oracle` knows each request's true times.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edgesafe import Budget
from edgesafe.format.exits import Exit
from edgesafe.format.specs import ExitSpec
from edgesafe.progress import table
from edgesafe.runtime.calibrate import Correction
from edgesafe.runtime.deadline import Course, run_anytime, trunks
from edgesafe.runtime.forecast import DECODE, PREFILL, PREPROCESS, Forecast
from results import write_result

SECONDS, HOTTEST, STEPS = 600.0, 2.5, 6
QUANTILE = 0.95
# Of the deepest exit's time on a cold machine. The first exit fits the shortest of them even where it is hottest.
DEADLINES = (0.7, 1.4)
PAUSE_S = (0.0, 1.0)
# Noise that a stage has of its own, and that a request's stages share: of the logarithm.
STAGE_NOISE, REQUEST_NOISE = 0.03, 0.05
SEGMENTS = [f"s{i}" for i in range(1, 13)]
EXITS = [ExitSpec(Exit(d), (*SEGMENTS[:d], "head")) for d in range(1, 13)]
MEASURED_MS = {PREPROCESS: 60.0, "head": 15.0, PREFILL: 250.0, DECODE: 20.0} | dict.fromkeys(SEGMENTS, 120.0)
SEEDS = 5

RAMPS: dict[str, Callable[[float], float]] = {
    "line": lambda share: 1 + (HOTTEST - 1) * share,
    "steps": lambda share: 1 + (HOTTEST - 1) * min(int(share * STEPS), STEPS - 1) / (STEPS - 1),
}
LEARNING = ("learn", "remember_error", "remember_deadline")


@dataclass(frozen=True)
class Request:
    """One request: its deadline, the depth and the first token that came of it, and the deepest that was in time."""

    deadline_ms: float
    depth: int
    ttft_ms: float
    oracle: int
    oracle_ms: float


class Machine:
    """A clock, and stages that move it by times that are drawn for each request."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.times: dict[str, float] = {}

    def __call__(self) -> float:
        return self.now_s

    def run(self, stage: str) -> str:
        """Take as long as the stage takes."""
        self.now_s += self.times[stage] / 1e3
        return stage


def requests(ramp: str, seed: int, *, learning: bool = True, seconds: float = SECONDS) -> list[Request]:
    """Ask until so many simulated seconds have passed."""
    rng, machine, correction, runs, made = random.Random(seed), Machine(), Correction(), Counter[str](), []
    forecast = Forecast({stage: (ms,) for stage, ms in MEASURED_MS.items()}, "measured")
    quiet_ms = forecast.expected_ms((PREPROCESS, *EXITS[-1].graphs, PREFILL))
    with ExitStack() as stack:
        for name in () if learning else LEARNING:
            stack.enter_context(mock.patch(f"edgesafe.runtime.deadline.{name}", lambda before, *_: before))
        while machine.now_s < seconds:
            slow = RAMPS[ramp](machine.now_s / seconds) * rng.lognormvariate(0, REQUEST_NOISE)
            machine.times = {stage: ms * slow * rng.lognormvariate(0, STAGE_NOISE) for stage, ms in MEASURED_MS.items()}
            budget = Budget(quiet_ms * rng.uniform(*DEADLINES), quantile=QUANTILE, on_miss="shallowest")
            course = Course(forecast, correction, budget, clock=machine, start_s=machine.now_s, tokens=1, runs=runs)
            made.append(answer(machine, course, budget))
            correction = course.correction
            machine.now_s += rng.uniform(*PAUSE_S)
    return made


def answer(machine: Machine, course: Course, budget: Budget) -> Request:
    """One answer up to its first token, as a conversation runs it."""
    course.timed(PREPROCESS, lambda: machine.run(PREPROCESS))
    course.plan(EXITS)
    taken, _ = run_anytime(trunks(EXITS), lambda path, _: course.timed(path, lambda: machine.run(path)), None, course.goes_on)
    course.settle([spec for spec in EXITS if spec.exit == taken.exit])
    course.timed_token(1, lambda: machine.run(PREFILL))
    true_ms = {spec.exit.depth: sum(machine.times[stage] for stage in (PREPROCESS, *spec.graphs, PREFILL)) for spec in EXITS}
    assert budget.ttft_ms is not None
    best = max((depth for depth, ms in true_ms.items() if ms <= budget.ttft_ms), default=min(true_ms))
    return Request(budget.ttft_ms, taken.exit.depth, course.ttft_ms, best, true_ms[best])


def summary(made: list[Request]) -> dict[str, float]:
    """Missed deadlines of those asked and of the oracle, and the depth over the oracle's.

    >>> summary([Request(10, 2, 11, 1, 9), Request(10, 2, 9, 3, 10)])
    {'requests': 2, 'miss_rate': 0.5, 'oracle_miss_rate': 0.0, 'depth_of_oracle': 1.0}
    """
    return {
        "requests": len(made),
        "miss_rate": round(sum(one.ttft_ms > one.deadline_ms for one in made) / len(made), 4),
        "oracle_miss_rate": round(sum(one.oracle_ms > one.deadline_ms for one in made) / len(made), 4),
        "depth_of_oracle": round(sum(one.depth for one in made) / sum(one.oracle for one in made), 4),
    }


def run_all(seeds: int = SEEDS) -> dict[str, dict[str, dict[str, float]]]:
    """Each ramp, with and without what is learned."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for ramp in RAMPS:
        for name, learning in (("edgesafe", True), ("uncorrected", False)):
            made = [one for seed in range(seeds) for one in requests(ramp, seed, learning=learning)]
            found.setdefault(ramp, {})[name] = summary(made)
    return found


def main() -> None:
    """Run it, print the table and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="the report")
    options = parser.parse_args()
    found = run_all()
    rows = [
        [ramp, name, *(f"{value:g}" for value in row.values())]
        for ramp, policies in found.items()
        for name, row in policies.items()
    ]
    print(table(rows, ["ramp", "policy", "requests", "missed", "by the oracle", "depth of the oracle's"]))
    write_result(options.out, {"seconds": SECONDS, "hottest": HOTTEST, "quantile": QUANTILE, "ramps": found})


if __name__ == "__main__":
    main()
