"""A suite put to several sessions at once: the same answers, and a fault doesn't wait for the rest."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from edgesafe.certify import ask
from edgesafe.certify.ask import ask_all, sessions_at_once, side_by_side
from edgesafe.certify.certify import certify
from edgesafe.certify.sampled import sampling_of
from edgesafe.errors import BundleError, ClosedError
from edgesafe.format.bundle import Bundle
from edgesafe.format.suite import Row, Suite, read_suite
from edgesafe.runtime import OnnxRuntime
from edgesafe.runtime.session import Session
from handmade import make_suited
from mutants import wrong


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(make_suited(tmp_path))


def check_same(bundle: Bundle, sessions: list[Session]) -> None:
    """Sampled, each row has an answer of its own: one that went astray, or to another place, would show."""
    suite, ladder, hot = read_suite(bundle.root / "suite"), bundle.manifest.ladder, partial(sampling_of, 1.0, 0)
    alone = ask_all(sessions[0], suite, suite.rows, ladder, "", hot)
    assert len(set(alone[ladder[0]].values())) > 3 and alone.keys() == set(ladder)
    for one in alone.values():
        assert list(one) == [row.id for row in suite.rows]
    assert ask_all(sessions, suite, suite.rows, ladder, "", hot) == alone
    assert ask_all(sessions, suite, suite.rows, ladder, "asked by three", hot) == alone


def test_several_sessions_give_the_answers_that_one_gives(bundle):
    check_same(bundle, [Session.open(bundle.root, threads=1, allow_uncertified=True) for _ in range(3)])


@pytest.mark.parametrize(
    "edit",
    [("sampling(place)", "sampling(0)"), ("row.prompt, MAX", "row.prompt + 'x', MAX"), ("_parts(rows,", "_parts(rows[1:],")],
)
def test_answers_that_went_astray_are_seen(bundle, edit):
    astray = wrong(ask_all, edit)
    suite, ladder, hot = read_suite(bundle.root / "suite"), bundle.manifest.ladder, partial(sampling_of, 1.0, 0)
    with Session.open(bundle.root, threads=1, allow_uncertified=True) as session:
        said = {
            row.id: session.ask(suite.image_path(row), row.prompt, exit=ladder[0], sampling=hot(place)).text
            for place, row in enumerate(suite.rows)
        }
        assert ask_all(session, suite, suite.rows, ladder, "", hot)[ladder[0]] == said
        assert astray(session, suite, suite.rows, ladder, "", hot)[ladder[0]] != said


class Fake(Session):
    """Answers by row and exit, and notes in which order, without a model."""

    def __init__(self, session: Session, answer: Callable[[str], str], log: list[str]) -> None:
        super().__init__(session.bundle, None, threads=1, allow_uncertified=True)
        self.say, self.log = answer, log

    def vision_states(self, picture, exits):
        self.log.append("look")
        return {exit: str(exit) for exit in exits}

    def answer_features(self, features, prompt, *rest):
        self.log.append(f"{prompt} at {features}")
        return self.say(prompt)


def many(suite: Suite, count: int) -> list[Row]:
    """So many rows with one picture, each with a prompt of its own."""
    return [dataclasses.replace(suite.rows[0], id=f"r{i}", prompt=f"p{i}") for i in range(count)]


@pytest.fixture
def session(bundle):
    with Session.open(bundle.root, threads=1, allow_uncertified=True) as opened:
        yield opened


def test_rows_of_one_picture_are_asked_in_the_order_of_rows_and_then_of_exits(bundle, session):
    """Boards read the tokens of each answer in that order (`edgesafe_boards.answers`)."""
    log: list[str] = []
    suite = read_suite(bundle.root / "suite")
    ask_all(Fake(session, str, log), suite, many(suite, 2), (1, 3), "")
    assert log == ["look", "p0 at 1", "p0 at 3", "p1 at 1", "p1 at 3"]


def test_a_picture_with_many_rows_is_shared(bundle, session):
    logs: tuple[list[str], list[str]] = ([], [])
    both, suite = threading.Barrier(2, timeout=20), read_suite(bundle.root / "suite")
    rows = many(suite, 40)

    def wait(prompt: str) -> str:
        if prompt in ("p0", "p16"):  # the first rows of two parts: neither is done until the other is being asked
            both.wait()
        return prompt

    said = ask_all([Fake(session, wait, log) for log in logs], suite, rows, (1,), "")
    assert list(said[1]) == [row.id for row in rows] and said[1]["r39"] == "p39"
    assert sum(log.count("look") for log in logs) == 3 and all(logs)


@pytest.mark.parametrize("label", ["", "ask"])
@pytest.mark.parametrize("fault", [BundleError("a graph broke"), KeyboardInterrupt()], ids=["fault", "ctrl-c"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_fault_ends_it_after_the_answers_that_are_being_given(bundle, session, label, fault, count):
    log: list[str] = []
    suite = read_suite(bundle.root / "suite")

    def fail(prompt: str) -> str:
        if prompt == "p20":
            raise fault
        time.sleep(0.02)
        return prompt

    with pytest.raises(type(fault)):
        ask_all([Fake(session, fail, log) for _ in range(count)], suite, many(suite, 400), (1,), label)
    assert len(log) < 60


def test_a_small_bundle_gets_a_session_a_core_and_a_large_one_a_single_one(bundle, monkeypatch):
    monkeypatch.setattr(ask, "host_cores", lambda: 3)
    sizes = ((1, 99), (1, 17), (1, 16), (2**29, 99), (2**33, 99))
    assert [sessions_at_once(size, rows) for size, rows in sizes] == [3, 2, 1, 2, 1]
    suite = read_suite(bundle.root / "suite")
    first = Session.open(bundle.root, allow_uncertified=True)
    assert side_by_side(first, suite) == [first]  # six rows
    monkeypatch.setattr(ask, "_MEMORY", 1)
    long = dataclasses.replace(suite, rows=tuple(many(suite, 40)))
    assert side_by_side(first, long) == [first]
    monkeypatch.setattr(ask, "_MEMORY", 2**40)
    several = side_by_side(first, long)
    assert [session.threads for session in several] == [1, 1, 1] and first not in several
    with pytest.raises(ClosedError):  # a large model never lies in memory twice
        ask_all(first, suite, suite.rows, bundle.manifest.ladder, "")


def test_a_brought_engine_has_one_session(bundle, monkeypatch):
    monkeypatch.setattr("edgesafe.certify.certify.side_by_side", None)
    assert certify(bundle.root, progress=False, engine=OnnxRuntime()).environment["engine"] == "onnxruntime"
