"""Anytime execution and correction, by a clock that only the fake graphs move: every number is worked out in the test."""

from __future__ import annotations

import doctest
import importlib
from collections import Counter
from dataclasses import replace
from types import MethodType

import pytest

from edgesafe import Budget
from edgesafe.errors import NoExitFitsError
from edgesafe.format.exits import Exit
from edgesafe.format.specs import ExitSpec
from edgesafe.runtime.calibrate import MEMORY_MS, Correction, error_bound, factor, learn, remember_deadline, remember_error
from edgesafe.runtime.deadline import Course, run_anytime
from edgesafe.runtime.forecast import DECODE, PREFILL, PREPROCESS, UNCORRECTED, Forecast
from mutants import wrong

# Four segments of 10 ms, a head of 1 ms, a prefill of 4 ms: exit d is measured as 10 d + 5 ms after preprocessing.
SEGMENTS = [f"s{i}" for i in range(1, 5)]
EXITS = [ExitSpec(Exit(d), (*SEGMENTS[:d], "head")) for d in (1, 2, 3, 4)]
MEASURED_MS = {PREPROCESS: 2.0, "head": 1.0, PREFILL: 4.0, DECODE: 3.0} | dict.fromkeys(SEGMENTS, 10.0)


def forecast(rounds: int = 1, **changes: tuple[float, ...]) -> Forecast:
    return Forecast({stage: (ms,) * rounds for stage, ms in MEASURED_MS.items()} | changes, "measured")


class Machine:
    """A clock, and graphs that move it: each stage takes its measured time times ``slow``, or what ``takes`` says."""

    def __init__(self, slow: float = 1.0, **takes: float) -> None:
        self.now_s, self.slow, self.takes = 100.0, slow, takes
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now_s

    def run(self, stage: str) -> str:
        self.ran.append(stage)
        self.now_s += self.takes.get(stage, MEASURED_MS[stage] * self.slow) / 1e3
        return stage

    def course(self, budget: Budget | None, correction: Correction = UNCORRECTED, tokens: int = 1, expected=None) -> Course:
        made = forecast() if expected is None else expected
        return Course(made, correction, budget, clock=self, start_s=self.now_s, tokens=tokens)

    def answer(self, course: Course, exits=EXITS, run=run_anytime) -> int:
        """One answer up to its first token; the depth of the exit that was taken."""
        course.timed(PREPROCESS, lambda: self.run(PREPROCESS))
        course.plan(exits)
        taken, _ = run(exits, lambda path, state: course.timed(path, lambda: self.run(path)), None, course.goes_on)
        course.timed_token(48, lambda: self.run(PREFILL))
        return taken.exit.depth


# Preprocessing takes 2 of the budget, so exit d needs 10 d + 7.
@pytest.mark.parametrize(("ttft_ms", "depth"), [(1000, 4), (47.1, 4), (46.9, 3), (37.1, 3), (27.5, 2), (17.1, 1)])
def test_at_the_measured_speed_the_plan_is_kept(ttft_ms, depth):
    machine = Machine()
    course = machine.course(Budget(ttft_ms))
    assert machine.answer(course) == depth and course.planned_exit == Exit(depth)
    assert course.ttft_ms == pytest.approx(10 * depth + 7)
    assert course.deadline_met(course.ttft_ms) is True
    assert machine.ran == [PREPROCESS, *SEGMENTS[:depth], "head", PREFILL]
    assert course.actual_ms == pytest.approx({PREPROCESS: 2, PREFILL: 4, "head": 1} | dict.fromkeys(SEGMENTS[:depth], 10))


def test_a_machine_that_slowed_down_stops_earlier_and_is_in_time():
    # At half speed exit 4 takes 2 * 47 = 94 ms. Planned as 47, it would miss 80 by far; the clock stops the chain.
    machine = Machine(slow=2.0)
    course = machine.course(Budget(80))
    assert machine.answer(course) == 3 and course.planned_exit == Exit(4)
    # 4 + 20 + 20 + 20 + 2 + 8. When the third segment had ended, 16 were left for at least 15.
    assert course.ttft_ms == pytest.approx(74)
    assert course.deadline_met(74) and "exit 4 was predicted to need" in course.why and "16.0 ms left" in course.why


def test_a_machine_that_is_faster_than_feared_goes_deeper_than_planned_but_no_deeper_than_the_last_exit():
    machine = Machine()
    course = machine.course(Budget(60), Correction(speed=2.0))
    # At a feared half speed with 58 ms left, exit 2 needs 50 and exit 3 70.
    assert machine.answer(course, EXITS[:3]) == 3 and course.planned_exit == Exit(2)
    assert machine.ran.count("s4") == 0


def test_an_exit_that_was_not_given_is_run_through_but_never_taken():
    # Exits 1 and 3 have no passed verdict: what ends after block 2 or 4 is taken, whatever the time.
    for ttft_ms, depth in ((47.1, 4), (46.9, 2), (27.1, 2)):
        machine = Machine()
        assert machine.answer(machine.course(Budget(ttft_ms)), [EXITS[1], EXITS[3]]) == depth


def test_standalone_exits_are_chosen_before_any_runs():
    exits = [ExitSpec(Exit(d), (f"s{d}",)) for d in (1, 2, 3)]
    whole = forecast(s1=(10.0,), s2=(20.0,), s3=(30.0,))
    machine = Machine(s1=10.0, s2=20.0, s3=30.0)
    assert machine.answer(machine.course(Budget(27), expected=whole), exits) == 2
    assert machine.ran == [PREPROCESS, "s2", PREFILL]


def test_no_exit_fits():
    machine = Machine()
    course = machine.course(Budget(16.9))
    course.timed(PREPROCESS, lambda: machine.run(PREPROCESS))
    with pytest.raises(NoExitFitsError, match=r"14\.9 ms that the budget leaves.*at least 15\.0 ms"):
        course.plan(EXITS)
    assert machine.ran == [PREPROCESS]
    course = machine.course(Budget(16.9, on_miss="shallowest"))
    assert machine.answer(course) == 1 and course.planned_exit == Exit(1)
    assert course.deadline_met(course.ttft_ms) is False


def test_what_is_learned_serves_the_next_answer():
    correction = Correction()
    for _ in range(5):
        machine = Machine(slow=2.0)
        course = machine.course(Budget(70), correction)
        machine.answer(course)
        correction = replace(course.correction, errors=())
    # Once the speed is known, the plan before any graph runs is what the clock finds: exit 2 of 54 ms, not exit 3 of 74.
    assert course.planned_exit == Exit(2)
    assert factor(correction, "s1") == pytest.approx(2.0, rel=0.05)


def test_the_widening_comes_from_the_rounds_sums():
    # In one of two rounds every stage takes twice as long: the medians are 1.5 times the fast round's times.
    slow = {stage: (ms, 2 * ms) for stage, ms in MEASURED_MS.items()}
    f = Forecast(slow, "measured")
    assert f.expected_ms(("s1", "head", PREFILL)) == pytest.approx(1.5 * 15)
    assert f.quantile_ms(("s1", "head", PREFILL), 1.0) == pytest.approx(30)
    # Were one round slow in the one stage and the other in the other, no sum would be as large as the sum of the maxima.
    crossed = Forecast({"a": (10.0, 20.0), "b": (20.0, 10.0)}, "measured")
    assert crossed.quantile_ms(("a", "b"), 1.0) == pytest.approx(30)


def test_errors_widen_the_next_prediction_and_are_forgotten():
    correction = Correction()
    for ratio in (1.0, 1.5, 1.1):
        correction = remember_error(correction, ratio)
    assert forecast().quantile_ms(("s1",), 0.95, correction) == pytest.approx(15.0)
    for _ in range(60):
        correction = remember_error(correction, 1.0)
    assert forecast().quantile_ms(("s1",), 0.95, correction) == pytest.approx(10.0)


def test_a_noisy_measurement_counts_until_there_are_errors_enough():
    noisy = Forecast({"a": (10.0, 10.0, 30.0)}, "measured")
    few, many = (Correction(errors=(1.1,) * n) for n in (18, 19))
    assert noisy.quantile_ms(("a",), 0.95, few) == pytest.approx(28.0)  # linear between 10 and 30 at 0.95 * 2 = 1.9
    assert noisy.quantile_ms(("a",), 0.95, many) == pytest.approx(11.0)


def test_kept_deadlines_narrow_the_prediction_and_a_missed_one_widens_it_at_once():
    correction = Correction(errors=tuple(1 + i / 40 for i in range(40)))
    # At 0.95 it is the 39th of 40 errors.
    assert error_bound(correction, 0.95) == correction.errors[38]
    for _ in range(10):
        correction = remember_deadline(correction, False, 0.95)
    # Ten kept add 10 * 0.3 * 0.6 * 0.05 = 0.09: 0.14 may be exceeded, ceil(41 * 0.86) = 36.
    assert error_bound(correction, 0.95) == correction.errors[35]
    assert error_bound(remember_deadline(correction, True, 0.95), 0.95) == correction.errors[39]
    for _ in range(1000):
        correction = remember_deadline(correction, False, 0.95)
    assert error_bound(correction, 0.95) == correction.errors[20]  # ceil(41 / 2) = 21: every other time is the most


def test_a_deadline_that_nothing_was_predicted_to_keep_teaches_no_width():
    machine = Machine()
    course = machine.course(Budget(10, on_miss="shallowest"))
    machine.answer(course)
    assert course.deadline_met(course.ttft_ms) is False and course.correction.slack == 0
    course = machine.course(Budget(40))
    machine.answer(course)
    assert course.correction.slack > 0


def test_the_error_of_an_answer_is_that_of_its_last_bet():
    # All as measured but the prefill, which takes 12 instead of 4. The last bet was on s2, head and prefill: 15 ms expected,
    # times the speed that s1 showed (1), and 23 were taken.
    machine = Machine(**{PREFILL: 12.0})
    course = machine.course(Budget(30))
    assert machine.answer(course) == 2
    assert course.correction.errors == pytest.approx((23 / 15,))


def test_total_ms_keeps_the_asked_tokens_free():
    # 3 tokens after the first take 9 ms: of 50 ms there are 41 for the first token, enough for exit 3 (37), not 4 (47).
    machine = Machine()
    assert machine.answer(machine.course(Budget(total_ms=50, max_new_tokens=4), tokens=4)) == 3
    # Without a length only the first token has to come in time.
    machine = Machine()
    assert machine.answer(machine.course(Budget(total_ms=50))) == 4


def test_decoding_stops_before_the_total_is_over():
    machine = Machine()
    course = machine.course(Budget(total_ms=60))
    assert machine.answer(course) == 4  # 47 ms
    made = 1
    while not course.out_of_time(48 + made):
        course.timed_token(48 + made, lambda: machine.run(DECODE))
        made += 1
    # 47 + 4 * 3 = 59; a fifth would end at 62.
    assert made == 5 and course.elapsed_ms == pytest.approx(59)
    assert course.deadline_met(course.elapsed_ms) is True and course.deadline_met(60.1) is False


def test_an_answer_that_had_ended_teaches_nothing_of_decoding():
    machine = Machine()
    course = machine.course(None)
    course.timed_token(48, lambda: machine.run(PREFILL))
    before = course.correction
    course.timed_token(49, lambda: None)
    assert course.correction == before


def test_the_picture_s_reading_does_not_teach_the_speed():
    machine = Machine(preprocess=200.0)
    course = machine.course(Budget(1000))
    machine.answer(course)
    assert course.correction.speed == pytest.approx(1.0)


def answers(slow: list[float], source: str, deaf=None) -> list[float]:
    """Predicted over taken times to the first token of answers at exit 4, so many times slower than known."""
    runs, correction, ratios = Counter(), Correction(), []
    for times in slow:
        machine = Machine(times)
        known = Forecast({stage: (ms,) for stage, ms in MEASURED_MS.items()}, source)
        course = Course(known, correction, Budget(5000), clock=machine, start_s=machine.now_s, tokens=1, runs=runs)
        if deaf:
            course._learn = MethodType(wrong(Course._learn, deaf), course)
        machine.answer(course)
        ratios.append(course.predicted_ttft_ms((*SEGMENTS, "head")) / course.ttft_ms)
        correction = course.correction
    return ratios


def test_a_cold_first_answer_makes_no_later_prediction_too_high():
    assert answers([10.0, 1.0, 1.0], "measured") == pytest.approx([0.1, 1.0, 1.0])
    assert answers([10.0, 1.0, 1.0], "measured", ("(_WARM if estimated else 1)", "0"))[1] > 5


def test_what_was_seen_takes_the_place_of_an_estimate():
    ratios = answers([14.0, 7.0, 7.0, 7.0], "estimated")
    assert ratios[0] < 0.1 and ratios[1] == pytest.approx(2, rel=0.1)  # the first run is all there is
    assert ratios[2:] == pytest.approx([1, 1], rel=0.05)
    assert answers([14.0, 7.0, 7.0, 7.0], "estimated", ("_WARM if estimated", "1 if estimated"))[2] > 1.08


def test_learning_by_hand():
    # A stage of MEMORY_MS moves the speed by 1 - 1/e; one of a tenth of it by 1 - exp(-0.1).
    assert learn(Correction(), "a", MEMORY_MS, 3 * MEMORY_MS).speed == pytest.approx(1 + 2 * 0.6321206)
    assert learn(Correction(), "a", MEMORY_MS / 10, 3 * MEMORY_MS / 10).speed == pytest.approx(1 + 2 * 0.0951626)
    # A clock that was set changes nothing, and nothing is believed without bounds.
    assert learn(Correction(), "a", 10.0, -5.0) == learn(Correction(), "a", 0.0, 5.0) == Correction()
    assert learn(Correction(), "a", 1e3, 1e9).speed == 50.0


def test_a_chain_that_asks_nobody_misses():
    deaf = wrong(run_anytime, ("goes_on(deeper.graphs[done:], deeper)", "True"))
    machine = Machine(slow=2.0)
    course = machine.course(Budget(80))
    assert machine.answer(course, run=deaf) == 4 and course.deadline_met(course.ttft_ms) is False


def test_twins():
    # Wrong versions, each of which a test above would see.
    deaf = wrong(learn, ("correction.speed + gain", "correction.speed + 0 * gain"))
    assert deaf(Correction(), "a", MEMORY_MS, 3 * MEMORY_MS).speed == 1.0
    low = wrong(error_bound, ("(len(errors) + 1) * level", "(len(errors) + 1) * (1 - level)"))
    assert low(Correction(errors=(1.0, 1.5, 1.1)), 0.95) == 1.0
    separate = wrong(Forecast.spread, ("[sum(row) for row in zip(*(self.rounds[stage] for stage in stages), strict=True)]",
                                      "[sum(max(self.rounds[stage]) for stage in stages)]"))  # fmt: skip
    crossed = Forecast({"a": (10.0, 20.0), "b": (20.0, 10.0)}, "measured")
    assert separate(crossed, ("a", "b"), 1.0) == pytest.approx(40 / 30)


@pytest.mark.parametrize(
    "name", ["format.latency", "machine", *(f"runtime.{m}" for m in ("choose", "calibrate", "forecast", "measure"))]
)
def test_doctests(name):
    found = doctest.testmod(importlib.import_module(f"edgesafe.{name}"))
    assert found.attempted > 0 and found.failed == 0
