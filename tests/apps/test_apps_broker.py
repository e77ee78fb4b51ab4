"""The cockpit at a broker of the real protocol: what it reads, and that no broken broker lets it look at a picture."""

from __future__ import annotations

import io
import json
import time

import cockpit
import driving
import pytest
from broker import serving
from driving import GEAR, PARK, SPEED, Signals, limits
from PIL import Image

from edgesafe.runtime import measure
from handmade import ANSWER


@pytest.fixture(params=["v2", "v1"])
def broker(request):
    with serving((request.param,)) as made:
        yield made


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A busy machine may take longer than a car may."""
    monkeypatch.setattr(driving, "PATIENCE_S", 10.0)


def signals(broker, token=None):
    return driving.Broker("127.0.0.1", broker.port, token).signals()


def test_speed_and_gear_come_through(broker):
    broker.send(SPEED, 42.5)
    broker.send(GEAR, -1, age_s=3600)
    assert signals(broker) == Signals(42.5, -1)
    broker.send(SPEED, 0.0)
    broker.send(GEAR, PARK)
    assert limits(signals(broker)) is driving.PARKED


def test_a_car_whose_gear_is_unknown_drives(broker):
    broker.send(SPEED, 0.0)
    assert signals(broker) == Signals(0.0, None) and limits(signals(broker)) is driving.DRIVING
    broker.send(GEAR, None)
    assert limits(signals(broker)) is driving.DRIVING


@pytest.mark.parametrize(
    ("value", "age_s", "why"),
    [(None, 0, "no speed"), (50.0, 5, "s old"), (float("nan"), 0, "nan"), (1e9, 0, "not possible"), ("50", 0, "'50'")],
)
def test_a_speed_that_does_not_count(broker, value, age_s, why):
    broker.send(SPEED, value, age_s)
    broker.send(GEAR, PARK)
    told = signals(broker)
    assert told.speed_kmh is None and why in told.why and limits(told) is driving.UNKNOWN


def test_a_broker_that_does_not_serve_the_speed(broker):
    broker.send(GEAR, PARK)
    assert signals(broker) == Signals(None, None, f"the broker doesn't know the signal ({SPEED})")
    broker.send(SPEED, 0.0)
    broker.token = "right"
    assert signals(broker, "wrong") == Signals(None, None, f"the broker wants a token ({SPEED})")
    assert signals(broker, "right") == Signals(0.0, PARK)


def test_a_broker_that_hangs_is_not_waited_for(broker, monkeypatch):
    monkeypatch.setattr(driving, "PATIENCE_S", 0.3)
    broker.send(SPEED, 0.0)
    broker.silent_s = 4.0
    start = time.perf_counter()
    assert signals(broker) == Signals(None, None, f"the broker doesn't answer ({SPEED})")
    assert time.perf_counter() - start < 3


def test_a_broker_that_goes_and_comes_back():
    with serving() as broker:
        broker.send(SPEED, 0.0)
        port, reader = broker.port, driving.Broker("127.0.0.1", broker.port)
        assert reader.signals().speed_kmh == 0.0
    assert reader.signals() == Signals(None, None, f"the broker is gone ({SPEED})")
    with serving(port=port) as broker:
        broker.send(SPEED, 5.0)
        assert reader.signals().speed_kmh == 5.0


def test_the_program_answers_as_the_car_drives(broker, handmade, copy_of, tmp_path, monkeypatch, capsys):
    root = copy_of(handmade)
    measure(root, seconds=0.1)
    Image.new("RGB", (9, 7)).save(tmp_path / "p.png")
    log = tmp_path / "log.jsonl"
    words = [str(root), "--picture", str(tmp_path / "p.png"), "--log", str(log), "--broker", f"127.0.0.1:{broker.port}"]

    def said(question: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{question}\n\n"))
        assert cockpit.main(words) == 0
        return capsys.readouterr().out.strip()

    broker.send(GEAR, 127)
    shown = []
    for speed in (0.0, 100.0, 131.0):
        broker.send(SPEED, speed)
        shown.append(said("what?"))
    broker.send(SPEED, 0.0, age_s=9)
    shown.append(said("what?"))
    assert shown == [ANSWER, ANSWER, driving.TOO_FAST.why, driving.UNKNOWN.why]
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["mode"] for row in rows] == ["driving", "driving", "too fast", "unknown"]
    assert rows[0]["answer"]["certified"] and rows[0]["bundle"] and "9." in rows[3]["signals"]
