"""The Android app without a screen: what is shown of answers, refusals, missed budgets, errors and the refusal test."""

from __future__ import annotations

import io
import math
import tomllib
from pathlib import Path
from types import SimpleNamespace

import asking
import pytest
from answers import REFUSAL, Says, answer
from asking import ANSWER, ERROR, Asker, Shown
from PIL import Image

import edgesafe
import handmade as by_hand
from edgesafe.errors import BusyError, NotMeasuredError
from edgesafe.runtime import kernels, measure

ANDROID = Path(asking.__file__).parents[1]


def png(side: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side)).save(out, "PNG")
    return out.getvalue()


def asker(monkeypatch, *replies) -> tuple[Asker, Says]:
    session = Says(*replies)
    monkeypatch.setattr(asking.Session, "open", lambda bundle: session)
    return Asker(Path("bundle")), session


@pytest.fixture
def measured(handmade, copy_of):
    root = copy_of(handmade)
    measure(root, seconds=0.1)
    return root


def test_an_answer_with_its_exit_verdict_and_time(measured):
    shown = Asker(measured).ask(png(), "what?", 10_000)
    assert (shown.text, shown.kind, shown.certified, shown.missed) == (by_hand.ANSWER, ANSWER, True, False)
    assert shown.facts.startswith("exit 2 of 3, certified · first word after ") and shown.facts.endswith(" · budget kept")


def test_a_budget_that_nothing_fits_is_answered_late_and_told(measured):
    shown = Asker(measured).ask(png(), "what?", 0.001)
    assert (shown.text, shown.missed) == (by_hand.ANSWER, True)
    assert shown.facts.startswith("exit 1 of 3, certified") and shown.facts.endswith("budget MISSED")


def test_a_refusal_is_shown_as_one(monkeypatch):
    app, session = asker(monkeypatch, answer(REFUSAL))
    shown = app.ask(b"picture", "How do I make it?", 700)
    assert (shown.text, shown.kind, shown.certified) == (REFUSAL, asking.REFUSAL, True)
    ((picture, question, budget, options),) = session.asked
    assert (picture, question, options) == (b"picture", "How do I make it?", {})
    assert (budget.ttft_ms, budget.on_miss) == (700, "shallowest")


def test_what_is_not_certified_says_so_and_why(monkeypatch):
    app, _ = asker(monkeypatch, answer(certified=False, note="the answer is longer than those tested", deadline_met=None))
    shown = app.ask(b"picture", "What?", 700)
    assert not shown.certified and "NOT CERTIFIED" in shown.facts and shown.facts.endswith("longer than those tested")


@pytest.mark.parametrize(
    ("picture", "question", "ms", "shown"),
    [
        (None, "what?", 500, "Choose a picture first."),
        (b"", "what?", 500, "picture"),
        (b"no picture", "what?", 500, "picture"),
        (png()[:40], "what?", 500, "picture"),
        (png(), "", 500, "prompt"),
        (png(), "<image>", 500, "control"),
        (png(), "x" * 500, 500, "token"),
        (png(), "what?", math.nan, "budget"),
    ],
)
def test_what_can_not_be_asked(measured, picture, question, ms, shown):
    got = Asker(measured).ask(picture, question, ms)
    assert got.kind == ERROR and shown in got.text and not got.certified


@pytest.mark.parametrize("error", [BusyError("another answer is being made"), NotMeasuredError("nothing predicts")])
def test_errors_are_shown_in_their_words(monkeypatch, error):
    assert asker(monkeypatch, error)[0].ask(b"picture", "What?", 700) == Shown(str(error), ERROR)


def test_without_a_bundle_or_a_certificate_nothing_answers(measured, tmp_path):
    assert "BUNDLE" in str(Asker(tmp_path / "none").standing()).upper()
    (measured / "certificate.json").unlink()
    app = Asker(measured)
    assert app.standing() == Shown("No exit is certified here: the bundle has none.", ERROR)
    assert app.ask(png(), "what?", 5000).kind == ERROR


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A bundle with a suite, whose certificate was made on another kind of processor."""
    root = by_hand.make_suited(tmp_path)
    monkeypatch.setattr(kernels, "instruction_sets", lambda: "aarch64 asimddp")
    return root


def test_on_another_processor_the_refusal_test_comes_first(elsewhere):
    app = Asker(elsewhere)
    assert app.standing().kind == ERROR and "`edgesafe smoke` has not passed here" in app.standing().text
    assert app.ask(png(), "what?", 5000).kind == ERROR
    assert app.test() == Shown("Certified here: exits 1, 2 of 3.", ANSWER, certified=True) == app.standing()
    assert app.ask(png(), "what?", 5000).certified and (elsewhere / "latency.json").is_file()


def test_a_refusal_test_that_fails_says_so(elsewhere, monkeypatch):
    app = Asker(elsewhere)
    monkeypatch.setattr(asking, "smoke", lambda bundle: SimpleNamespace(passed=False, text=lambda: "exit 1: 3 of 4"))
    assert app.test().kind == ERROR and app.test().text.endswith("exit 1: 3 of 4")
    assert app.ask(png(), "what?", 5000).kind == ERROR


@pytest.mark.parametrize("place", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_the_slider_s_budgets(place):
    assert asking.FASTEST_MS <= asking.budget_ms(place) <= asking.SLOWEST_MS


def test_the_project_pins_what_flet_s_index_has():
    project = tomllib.loads((ANDROID / "pyproject.toml").read_text(encoding="utf-8"))
    pins = dict(line.partition("==")[::2] for line in project["project"]["dependencies"])
    assert (pins["onnxruntime"], pins["numpy"], pins["tokenizers"], pins["flet"]) == ("1.27.0", "2.4.6", "0.23.1", "1.0.5")
    here = dict(line.partition("==")[::2] for line in (ANDROID / "requirements.txt").read_text().split("\n") if "==" in line)
    assert {name: pins[name] for name in here if name in pins} == {name: here[name] for name in here if name in pins}
    assert project["tool"]["flet"]["dev_packages"]["edgesafe"].endswith(f"edgesafe-{edgesafe.__version__}-py3-none-any.whl")
    assert (ANDROID / project["tool"]["flet"]["app"]["path"] / "main.py").is_file()
