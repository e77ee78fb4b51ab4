"""A suite put to several sessions at once: the same answers, and a fault doesn't wait for the rest."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path

import pytest

from edgesafe.certify import ask
from edgesafe.certify.ask import ask_all, open_sessions
from edgesafe.certify.sampled import sampling_of
from edgesafe.errors import BundleError
from edgesafe.format.bundle import Bundle
from edgesafe.format.suite import read_suite
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
    ("name", "edit"),
    [
        ("_ask_one_picture", ("sampling(place)", "sampling(0)")),
        ("_ask_one_picture", ("row.prompt, MAX", "placed[0][1].prompt + 'x', MAX")),
        ("ask_all", ("groupby(enumerate(rows)", "groupby(enumerate(rows[1:])")),
    ],
    ids=str,
)
def test_answers_that_went_astray_are_seen(bundle, monkeypatch, name, edit):
    made = wrong(getattr(ask, name), edit)
    monkeypatch.setattr(ask, name, made)
    monkeypatch.setitem(globals(), name, made)
    sessions = [Session.open(bundle.root, threads=1, allow_uncertified=True)]
    suite, ladder, hot = read_suite(bundle.root / "suite"), bundle.manifest.ladder, partial(sampling_of, 1.0, 0)
    said = {
        row.id: sessions[0].ask(suite.image_path(row), row.prompt, exit=ladder[0], sampling=hot(place)).text
        for place, row in enumerate(suite.rows)
    }
    assert ask_all(sessions, suite, suite.rows, ladder, "", hot)[ladder[0]] != said


def test_they_ask_at_the_same_time(bundle, monkeypatch):
    """Both are asking when either waits for the other."""
    both = threading.Barrier(2, timeout=20)
    real = ask._ask_one_picture
    monkeypatch.setattr(ask, "_ask_one_picture", lambda *args: (both.wait(), real(*args))[1])
    suite = read_suite(bundle.root / "suite")
    sessions = [Session.open(bundle.root, threads=1, allow_uncertified=True) for _ in range(2)]
    assert ask_all(sessions, suite, suite.rows, bundle.manifest.ladder, "").keys() == set(bundle.manifest.ladder)


@pytest.mark.parametrize("label", ["", "ask"])
def test_a_fault_ends_it(bundle, monkeypatch, label):
    asked = []

    def fail(session, suite, placed, exits, sampling):
        asked.append(placed[0][0])
        if placed[0][0] == 0:
            raise BundleError("a graph broke")
        time.sleep(0.2)
        return {exit: {} for exit in exits}

    monkeypatch.setattr(ask, "_ask_one_picture", fail)
    suite = read_suite(bundle.root / "suite")
    sessions = [Session.open(bundle.root, threads=1, allow_uncertified=True) for _ in range(2)]
    with pytest.raises(BundleError, match="a graph broke"):
        ask_all(sessions, suite, suite.rows * 50, bundle.manifest.ladder, label)
    assert len(asked) < 20


def test_a_small_bundle_gets_a_session_a_core_and_a_large_one_a_single_one(bundle, monkeypatch):
    monkeypatch.setattr(ask, "host_cores", lambda: 3)
    assert [session.threads for session in open_sessions(bundle, None)] == [1, 1, 1]
    size = sum(spec.bytes for spec in bundle.manifest.files.values())
    for memory, count in ((2 * size, 2), (2 * size - 1, 1), (1, 1)):
        monkeypatch.setattr(ask, "_MEMORY", memory)
        assert len(open_sessions(bundle, None)) == count
    monkeypatch.setattr(ask, "_MEMORY", 2**40)
    assert len(open_sessions(bundle, OnnxRuntime())) == 1
