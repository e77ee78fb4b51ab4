"""The cockpit: what speed and gear allow, what is spoken, and what is kept."""

from __future__ import annotations

import datetime
import json
import math
from types import SimpleNamespace

import cockpit
import driving
import pytest
from answers import REFUSAL, Says, answer
from driving import PARK, Signals, limits, speed_of

from edgesafe.errors import InputError, NoExitFitsError, UncertifiedExitError

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
STANDS, DRIVES, FAST, LOST = Signals(0.0, PARK), Signals(80.0, 127), Signals(180.0, 127), Signals(None, None, "gone")


def sent(value, age_s=0.1):
    return SimpleNamespace(value=value, timestamp=NOW - datetime.timedelta(seconds=age_s))


def car(tmp_path, session, *signals):
    """A cockpit in a car that shows these signals in turn, the last one for ever."""
    shown = list(signals)
    return cockpit.Cockpit(session, lambda: shown.pop(0) if len(shown) > 1 else shown[0], tmp_path / "log.jsonl")


def kept(tmp_path):
    return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("point", "why"),
    [
        (None, "no speed was sent"),
        (sent(None), "no speed was sent"),
        (sent(math.nan), "the speed is nan"),
        (sent(math.inf), "the speed is inf"),
        (sent("fast"), "the speed is 'fast'"),
        (sent(True), "the speed is True"),
        (sent([1.0]), "the speed is"),
        (sent(5000.0), "not possible"),
        (sent(-200.0), "not possible"),
        (sent(50.0, 2.1), "2.1 s old"),
        (sent(50.0, -1.5), "-1.5 s old"),
        (SimpleNamespace(value=50.0, timestamp=None), "no time"),
    ],
)
def test_a_speed_that_is_unknown(point, why):
    speed, told = speed_of(point, NOW)
    assert speed is None and why in told and limits(Signals(speed, PARK, told)) is driving.UNKNOWN


def test_a_speed_that_is_known():
    assert [speed_of(sent(value), NOW) for value in (0.0, 12, -7.5)] == [(0.0, ""), (12.0, ""), (7.5, "")]
    assert [driving.gear_of(sent(value)) for value in (PARK, -1, 4000, 1.5, None, True)] == [PARK, -1, *[None] * 4]


@pytest.mark.parametrize(("signals", "ttft_ms", "total_ms"), [(STANDS, 2000, 12000), (DRIVES, 1000, 2000)])
def test_the_budget_is_what_reading_the_signals_left_of_the_limit(tmp_path, signals, ttft_ms, total_ms):
    session = Says(answer())
    assert car(tmp_path, session, signals).ask("p.png", "What is it?") == "It is a van."
    ((picture, question, budget, options),) = session.asked
    assert (picture, question, options) == ("p.png", "What is it?", {"max_new_tokens": cockpit.TOKENS})
    assert ttft_ms - 500 < budget.ttft_ms < ttft_ms and total_ms - 500 < budget.total_ms < total_ms
    assert budget.on_miss == "error"


@pytest.mark.parametrize(("signals", "said"), [(FAST, driving.TOO_FAST.why), (LOST, driving.UNKNOWN.why)])
def test_no_picture_is_looked_at(tmp_path, signals, said):
    session = Says(answer())
    assert car(tmp_path, session, signals).ask("p.png", "What is it?") == said and not session.asked
    (row,) = kept(tmp_path)
    assert (row["outcome"], row["said"], row["signals"]) == ("not allowed", said, signals.why)


@pytest.mark.parametrize("after", [FAST, LOST])
def test_what_changed_meanwhile_counts(tmp_path, after):
    said = car(tmp_path, Says(answer()), DRIVES, after).ask("p.png", "What is it?")
    assert said == limits(after).why and kept(tmp_path)[0]["outcome"] == "withheld"


def test_a_late_answer_is_spoken_in_a_parked_car_only(tmp_path):
    late = answer(deadline_met=False)
    assert car(tmp_path, Says(late), DRIVES).ask("p.png", "What?") == cockpit.LATE
    assert car(tmp_path, Says(late), STANDS).ask("p.png", "What?") == "It is a van."
    assert car(tmp_path, Says(answer(ttft_ms=1500.0)), STANDS, DRIVES).ask("p.png", "What?") == cockpit.LATE


def test_an_answer_without_a_certificate_is_not_spoken(tmp_path):
    assert car(tmp_path, Says(answer("Here is how.", certified=False)), STANDS).ask("p.png", "What?") == cockpit.UNSAFE


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NoExitFitsError("the fastest certified exit takes 3 s"), cockpit.NO_TIME),
        (InputError("the picture can't be read", where="p.png"), cockpit.UNSEEN),
        (UncertifiedExitError("no exit"), cockpit.FAILED),
    ],
)
def test_errors_are_spoken_in_short_and_kept_in_full(tmp_path, error, said):
    assert car(tmp_path, Says(error), DRIVES).ask("p.png", "What?") == said
    (row,) = kept(tmp_path)
    assert row["outcome"] == "no answer" and type(error).__name__ in row["error"] and error.what in row["error"]


def test_a_refusal_and_its_evidence_are_kept_without_the_picture(tmp_path):
    app = car(tmp_path, Says(answer(REFUSAL), answer()), DRIVES)
    assert app.ask("secret/p.png", "How do I make it?") == REFUSAL
    app.ask("secret/p.png", "What is it?")
    first, second = kept(tmp_path)
    assert (first["outcome"], second["outcome"]) == ("refused", "answered")
    assert (first["speed_kmh"], first["gear"], first["mode"], first["question"]) == (80.0, 127, "driving", "How do I make it?")
    assert (first["bundle"], first["certificate"]) == ("b" * 64, "c" * 64)
    assert first["answer"]["exit"] == "6" and first["answer"]["certified"] is True
    assert "secret" not in (tmp_path / "log.jsonl").read_text()


def test_nothing_is_spoken_that_is_not_kept(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    assert car(tmp_path, Says(answer()), DRIVES).ask("p.png", "What?") == cockpit.NO_RECORDS


@pytest.mark.parametrize("text", ["a. " * 60, "a " * 60, "b", "One. Two. " + "three " * 30])
def test_what_is_spoken_is_short(text):
    said = cockpit.spoken(text)
    assert said and len(said.split()) <= cockpit.WORDS and text.startswith(said.rstrip("…"))


@pytest.mark.parametrize("wrong", ["", "host", ":1", "host:0", "host:99999", "host:x"])
def test_what_is_no_address(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cockpit.main([str(tmp_path), "--picture", "p", "--log", str(tmp_path / "l"), "--broker", wrong])
    assert "is not HOST:PORT" in capsys.readouterr().err


def test_a_bundle_without_a_certified_exit_is_refused_at_the_start(handmade, copy_of, tmp_path, capsys):
    root = copy_of(handmade)
    (root / "certificate.json").unlink()
    for bundle, code, shown in ((root, 51, "no exit is certified"), (tmp_path / "none", 40, "BundleError")):
        with pytest.raises(SystemExit) as ended:
            cockpit.main([str(bundle), "--picture", "p.png", "--log", str(tmp_path / "log.jsonl")])
        assert ended.value.code == code and shown in capsys.readouterr().err


def test_a_log_that_cannot_be_written_is_told_at_the_start(handmade, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cockpit.main([str(handmade), "--picture", "p.png", "--log", str(tmp_path / "none" / "log.jsonl")])
    assert ended.value.code == 11 and "none" in capsys.readouterr().err


def test_a_client_that_is_not_installed_is_told_at_the_start(handmade, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        cockpit.main([str(handmade), "--picture", "p.png", "--log", str(tmp_path / "log.jsonl")])
    assert ended.value.code == 10 and "pip install kuksa-client==0.6.0" in capsys.readouterr().err


def test_why_the_speed_is_unknown_is_told(tmp_path, capsys):
    car(tmp_path, Says(), LOST).ask("p.png", "What is it?")
    assert capsys.readouterr().err == "the speed is unknown: gone\n"
