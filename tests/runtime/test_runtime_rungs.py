"""Exits with fewer visual tokens at run time: asked for, capped, chosen by the clock, predicted, measured and listed."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import numpy as np
import pytest

from edgesafe import Budget, Session
from edgesafe.certify.ladder import read_ladder
from edgesafe.cli import main
from edgesafe.errors import InputError, NoExitFitsError, UncertifiedExitError
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import Certificate, Rate, read_certificate, write_certificate
from edgesafe.format.exits import Exit
from edgesafe.format.specs import ExitSpec
from edgesafe.runtime import measure
from edgesafe.runtime.calibrate import Correction
from edgesafe.runtime.choose import worthwhile
from edgesafe.runtime.deadline import Course, run_anytime, trunks
from edgesafe.runtime.forecast import DECODE, PREFILL, PREPROCESS, Forecast
from edgesafe.serve.page import facts
from handmade import ANSWER
from mutants import wrong
from rungs import ONE, with_rungs

BLACK = np.zeros((8, 8, 3), np.uint8)
LADDER = ("1@1", "1", "2@1", "2", "3@1", "3")


@pytest.fixture
def root(handmade, copy_of):
    root = copy_of(handmade)
    with_rungs(root, *LADDER, certified=("1@1", "2", "3@1", "3"))
    return root


def test_a_rung_is_asked_for_and_reads_fewer_tokens(root):
    with Session.open(root, threads=1) as session:
        read = {}
        for exit in ("3", "3@1"):
            talk = session.conversation(BLACK, exit=exit)
            answer = talk.ask("what?")
            assert (answer.text, str(answer.exit), answer.certified, answer.why) == (ANSWER, exit, True, "asked for")
            assert talk.ask("what?").text == ANSWER and str(talk.exit) == exit
            assert talk.prompt_tokens == talk.reused_tokens + 1
            read[exit] = talk.reused_tokens
        assert read["3"] - read["3@1"] == 3  # 4 features, or 1
        features = session.vision_states(BLACK, LADDER)
        # The last of the four, bit for bit, and an answer by it.
        assert np.array_equal(features[Exit(2, 1)], features[Exit(2)][3:])
        assert session.answer_features(features[Exit(2, 1)], "what?") == ANSWER
        with pytest.raises(UncertifiedExitError, match="exit 2@1 has no passed verdict"):
            session.ask(BLACK, "what?", exit="2@1")
        with pytest.raises(InputError, match="no exit 2@4"):
            session.ask(BLACK, "what?", exit="2@4")


def test_image_tokens_are_capped(root, handmade):
    with Session.open(root, threads=1) as session:
        assert session.ask(BLACK, "what?").exit == Exit(3)
        answer = session.ask(BLACK, "what?", max_image_tokens=3)
        assert (str(answer.exit), answer.why) == ("3@1", "the largest certified")
        assert session.ask(BLACK, "what?", max_image_tokens=4).exit == Exit(3)
        with pytest.raises(InputError, match="at most 3 image tokens"):
            session.ask(BLACK, "what?", exit=3, max_image_tokens=3)
        for wrong_cap in (0, -1, 1.5, True, "9"):
            with pytest.raises(InputError, match="max_image_tokens"):
                session.ask(BLACK, "what?", max_image_tokens=wrong_cap)
    with Session.open(handmade, threads=1) as session, pytest.raises(InputError, match="at most 3 image tokens") as caught:
        session.ask(BLACK, "what?", max_image_tokens=3)
    assert caught.value.expected == "at least 4"


def test_a_budget_takes_the_dearest_that_fits_and_measure_times_each(root):
    table = measure(root, threads=1, seconds=0.1)
    assert ONE in table.segments and [row["exit"] for row in table.exits] == list(LADDER)
    short, long = (row["tokens"] for row in table.text["prefill"][:2])
    assert long - short == 3
    with Session.open(root, threads=1) as session:
        answer = session.ask(BLACK, "what?", Budget(1e6))
        assert answer.exit == answer.planned_exit == Exit(3) and answer.why == "predicted to fit"
        answer = session.ask(BLACK, "what?", Budget(1e-3, on_miss="shallowest"))
        assert answer.why.startswith("the fastest: ") and answer.deadline_met is False
        answer = session.ask(BLACK, "what?", exit="1@1")
        assert ONE in answer.actual_ms and ONE in answer.predicted_ms
        with pytest.raises(NoExitFitsError):
            session.ask(BLACK, "what?", Budget(1e-3))


# Four blocks of 10 ms, a head of 1, tokens left out in no time; a prefill of 40 ms, or of 4 with few tokens.
BLOCKS = [f"s{i}" for i in range(1, 5)]
TIMES = {PREPROCESS: 0.0, "head": 1.0, "few": 0.0, PREFILL: 40.0, DECODE: 1.0} | dict.fromkeys(BLOCKS, 10.0)
WAYS = {
    text: ExitSpec(Exit.parse(text), (*BLOCKS[: int(text[0])], "head", *(["few"] if "@" in text else [])))
    for text in ("2@4", "4@4", "1", "2", "4")
}


class Machine:
    """A clock that stages move, each by its time times `slow`."""

    def __init__(self, slow: float = 1.0) -> None:
        self.now_s, self.slow, self.ran = 0.0, slow, []

    def __call__(self) -> float:
        return self.now_s

    def run(self, stage: str, ms: float | None = None) -> str:
        self.ran.append(stage)
        self.now_s += self.slow * (TIMES[stage] if ms is None else ms) / 1e3
        return stage

    def answer(self, budget_ms: float, course_of=Course, **known) -> tuple[str, Course]:
        forecast, few = (Forecast({s: (t,) for s, t in (TIMES | own).items()}, "measured") for own in ({}, {PREFILL: 4.0}))
        course = course_of(
            forecast,
            known.get("correction", Correction()),
            Budget(budget_ms),
            clock=self,
            start_s=0.0,
            tokens=1,
            fewer={4: few},
        )
        exits = list(WAYS.values())  # ascending by cost
        course.plan(exits)
        trunk, _ = run_anytime(trunks(exits), lambda path, _: course.timed(path, lambda: self.run(path)), None, course.goes_on)
        taken = course.settle([spec for spec in exits if spec.exit.depth == trunk.exit.depth])
        for path in taken.graphs[len(trunk.graphs) :]:
            course.timed(path, lambda path=path: self.run(path))
        course.timed_token(1, lambda: self.run(PREFILL, 4.0 if taken.exit.visual_tokens else 40.0))
        return str(taken.exit), course


# In ms: 2@4 25, 4@4 45, 1 51, 2 61, 4 81. By cost, not by depth: with 55 ms it is 1, not 4@4.
@pytest.mark.parametrize(("budget_ms", "exit"), [(81, "4"), (80, "2"), (60, "1"), (50, "4@4"), (44, "2@4"), (25, "2@4")])
def test_the_rung_of_the_highest_cost_that_fits_is_taken(budget_ms, exit):
    taken, course = Machine().answer(budget_ms + 0.01)
    assert taken == exit and str(course.planned_exit) == exit
    assert course.deadline_met(course.ttft_ms) and course.why


def test_behind_the_blocks_the_clock_still_leaves_tokens_out():
    # Planned by the measured times, exit 2 needs 61 of 80 ms and takes 91. The blocks teach the speed, and the prefill is cut.
    machine = Machine(slow=1.5)
    taken, course = machine.answer(80)
    assert str(course.planned_exit) in ("1", "2") and "@4" in taken
    assert course.deadline_met(course.ttft_ms) is True
    assert course.predicted_ms(WAYS[taken].graphs)[PREFILL] == 4.0  # of the prompt that was read


def test_a_clock_that_is_not_asked_again_misses():
    class Deaf(Course):
        def settle(self, exits):
            self.forecast = self._forecast(exits[-1])
            return exits[-1]

    taken, course = Machine(slow=1.5).answer(80, Deaf)
    assert "@" not in taken and course.deadline_met(course.ttft_ms) is False


def test_a_machine_faster_than_feared_takes_more_tokens_than_planned():
    taken, course = Machine().answer(90, correction=Correction(speed=2.0))
    by_cost = list(WAYS)
    assert by_cost.index(taken) > by_cost.index(str(course.planned_exit))
    assert course.deadline_met(course.ttft_ms) is True


def test_an_exit_that_costs_more_and_surely_answers_worse_is_not_taken(root):
    certificate = read_certificate(Bundle.open(root))
    assert certificate is not None

    def with_accuracy(rates: dict[str, tuple[float, float]]) -> Certificate:
        """Every exit is right in 90 of 100, or as often as `rates` says, at most."""
        found = [(e, *rates.get(str(e.exit), (0.9, 0.95))) for e in certificate.exits]
        return replace(certificate, exits=tuple(replace(e, accuracy=Rate(0, 100, r, 0.0, up)) for e, r, up in found))

    ascending = tuple(map(Exit.parse, ("1@1", "2@1", "3@1", "1", "2", "3")))
    assert worthwhile(ascending, with_accuracy({})) == ascending == worthwhile(ascending, None)
    assert [str(exit) for exit in worthwhile(ascending, with_accuracy({"1": (0.3, 0.4)}))] == ["1@1", "2@1", "3@1", "2", "3"]
    # Where it could be as good, it stays; and a ladder of depths alone is never thinned.
    assert worthwhile(ascending, with_accuracy({"1": (0.3, 0.95)})) == ascending
    assert worthwhile((Exit(1), Exit(2)), with_accuracy({"2": (0.3, 0.4)})) == (Exit(1), Exit(2))
    # The page of `serve` names what the runtime would take.
    write_certificate(Bundle.open(root), with_accuracy({"3": (0.3, 0.4)}))
    with Session.open(root, threads=1) as session:
        assert facts(session)["preferred"] == {"budget": ["1@1", "3@1", "2"], "none": ["3"]}


def test_the_ladder_is_listed_from_the_dearest_down(root, capsys):
    ladder = read_ladder(root)
    assert [str(rung.exit) for rung in ladder.rungs] == ["3", "2", "1", "3@1", "2@1", "1@1"]
    assert [rung.image_tokens for rung in ladder.rungs] == [4, 4, 4, 1, 1, 1]
    assert [rung.certified for rung in ladder.rungs] == [True, True, False, True, False, True]
    assert main(["ladder", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["verdict"] for one in found["exits"]] == ["passed", "passed", "failed", "passed", "failed", "passed"]
    assert found["exits"][0]["harmful"]["n"] == 200 and found["exits"][3]["exit"] == "3@1"
    assert main(["ladder", str(root)]) == 0
    text = capsys.readouterr().out
    assert "3*" in text and "certified: 1@1, 2, 3@1, 3" in text


def test_a_ladder_without_a_certificate_says_so(handmade, copy_of, capsys):
    with_rungs(root := copy_of(handmade), *LADDER)
    assert main(["ladder", str(root)]) == 0
    assert "not certified" in (text := capsys.readouterr().out) and "run edgesafe certify" in text


def test_twins():
    depth_first = wrong(Course._aim, ("fitting[-1] if fitting", "fitting[0] if fitting"))

    class First(Course):
        _aim = depth_first

    assert Machine().answer(81.01, First)[0] != "4"


def test_a_question_that_ends_at_the_last_graph_leaves_the_picture_to_the_next(root):
    def gone(progress):
        if progress.stage == "vision" and progress.done == progress.total:
            raise RuntimeError("gone")

    with Session.open(root, threads=1) as session:
        for exit in ("3", "3@1"):
            talk = session.conversation(BLACK, exit=exit)
            with pytest.raises(RuntimeError, match="gone"):
                talk.ask("what?", progress=gone)
            assert talk.exit is None and talk.ask("what?", progress=None).text == ANSWER and str(talk.exit) == exit


def test_a_prompt_that_fits_at_fewer_tokens_alone(root):
    measure(root, threads=1, seconds=0.1)
    with Session.open(root, threads=1) as session:
        talk = session.conversation(BLACK, exit=3)
        talk.ask("q")
        # Two tokens too long with all four of the picture, and with one of them just short enough.
        long = "q" * (session.manifest.text.context_length - talk.prompt_tokens + 2)
        assert session.conversation(BLACK, Budget(1e6)).ask(long).exit == Exit(3, 1)
        with pytest.raises(InputError, match="max_image_tokens="):
            session.ask(BLACK, long)
        assert session.ask(BLACK, long, max_image_tokens=1).exit == Exit(3, 1)
        # Another thread's question takes the whole picture while this one waits: it is too long for what is left to ask.
        talk, inside, go = session.conversation(BLACK, Budget(1e6)), Event(), Event()
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(lambda: talk.ask("q", progress=lambda _: inside.set() or go.wait(10)))
            assert inside.wait(10)
            second = pool.submit(talk.ask, long)
            while len(session.turns._line) < 2:
                time.sleep(0.01)
            time.sleep(0.2)  # it reads its prompt before it waits
            go.set()
            assert first.result().exit == Exit(3)
            with pytest.raises(InputError, match="the prompt takes"):
                second.result()
        assert talk.ask("q").text == ANSWER
