"""What the car does and what it may be asked meanwhile: speed and gear from the data broker, and the limits that they set.

Names of signals and values are those of the COVESA Vehicle Signal Specification.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SPEED, GEAR = "Vehicle.Speed", "Vehicle.Powertrain.Transmission.SelectedGear"
PARK = 126  # of SelectedGear: 0 neutral, 1 to 125 forward, -1 and below reverse, 127 drive
STANDS_KMH, FASTEST_KMH = 1.0, 130.0
POSSIBLE_KMH = (-60.0, 450.0)  # a signal beyond is broken; some cars count reversing below zero
OLDEST_S, AHEAD_S = 2.0, 1.0  # speed is sent several times a second; the broker's clock may be a little ahead
PATIENCE_S = 0.3
_MEANT = {
    4: "the broker doesn't answer",
    5: "the broker doesn't know the signal",
    7: "the broker refuses the signal: its token lacks the right",
    14: "the broker is gone",
    16: "the broker wants a token",
}


@dataclass(frozen=True)
class Signals:
    """Speed in km/h, above 0 in both directions, and the selected gear; None where unknown, and ``why``."""

    speed_kmh: float | None
    gear: int | None
    why: str = ""


@dataclass(frozen=True)
class Limits:
    """What a question about a picture may cost; ``why`` is not empty where none may be asked, and is what to say then."""

    mode: str
    ttft_ms: float = 0.0
    total_ms: float = 0.0
    why: str = ""


# Glances of 2 s at most and 12 s a task: NHTSA's guidelines of 2013. 1 s keeps the flow of thought.
PARKED = Limits("parked", 2000, 12000)
DRIVING = Limits("driving", 1000, 2000)
TOO_FAST = Limits("too fast", why=f"I don't look at pictures above {FASTEST_KMH:.0f} kilometres an hour.")
UNKNOWN = Limits("unknown", why="I don't know how fast we are going, so I don't look at pictures.")


def limits(signals: Signals) -> Limits:
    """The limits that speed and gear set; where they contradict each other, the car drives.

    >>> [limits(Signals(*of)).mode for of in ((0.0, PARK), (0.0, None), (7.0, PARK), (130.0, 127), (130.1, 127), (None, PARK))]
    ['parked', 'driving', 'driving', 'driving', 'too fast', 'unknown']
    """
    if signals.speed_kmh is None:
        return UNKNOWN
    if signals.speed_kmh > FASTEST_KMH:
        return TOO_FAST
    return PARKED if signals.gear == PARK and signals.speed_kmh < STANDS_KMH else DRIVING


def stricter(one: Limits, other: Limits) -> Limits:
    """The one that allows less.

    >>> stricter(PARKED, DRIVING).mode, stricter(UNKNOWN, DRIVING).mode
    ('driving', 'unknown')
    """
    return min(one, other, key=lambda each: each.ttft_ms)


def speed_of(point: Any, now: datetime.datetime) -> tuple[float | None, str]:
    """The speed in km/h of a data point of the broker, or None and why it counts as unknown.

    Args:
        point: Has ``value`` and ``timestamp``; None where the signal was never sent.
        now: By the car's clock, with a time zone.
    """
    value = getattr(point, "value", None)
    if value is None:
        return None, "no speed was sent yet"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None, f"the speed is {value!r}"
    if not POSSIBLE_KMH[0] <= value <= POSSIBLE_KMH[1]:
        return None, f"a speed of {value:g} km/h is not possible"
    if point.timestamp is None:
        return None, "the speed has no time"
    age_s = (now - point.timestamp).total_seconds()
    if not -AHEAD_S <= age_s <= OLDEST_S:
        return None, f"the speed is {age_s:.1f} s old"
    return abs(float(value)), ""


def gear_of(point: Any) -> int | None:
    """The gear of a data point; it is sent when it changes, so it may be old. What is no gear is unknown."""
    value = getattr(point, "value", None)
    fits = isinstance(value, int) and not isinstance(value, bool) and -128 <= value <= 127
    return value if fits else None


class Broker:
    """The car's data broker, by the v2 protocol of KUKSA or else by v1, asked anew at every question.

    A connection of its own for each question finds a broker that came back at once; a kept one would wait longer each time.

    Args:
        host: Its address.
        port: Its port; 55555 is usual.
        token: Its text, where the broker wants one.
    """

    def __init__(self, host: str, port: int, token: str | None = None) -> None:
        from kuksa_client.grpc import VSSClient  # takes a second, which is no part of the first question's budget

        self._client = VSSClient
        self._where: dict[str, Any] = {"host": host, "port": port, "token": token, "ensure_startup_connection": False}

    def signals(self) -> Signals:
        """Speed and gear as they are now. Whatever goes wrong, the speed is unknown."""
        try:
            with self._client(**self._where) as client:
                speed, why = speed_of(_value(client, SPEED), datetime.datetime.now(datetime.UTC))
                return Signals(speed, None if why else self._gear(client), why)
        except Exception as error:  # a broken broker or client must never allow anything
            return Signals(None, None, _meaning(error, SPEED))

    def _gear(self, client: Any) -> int | None:
        try:
            return gear_of(_value(client, GEAR))
        except Exception:  # a car whose gear is unknown drives
            return None


def _value(client: Any, path: str) -> Any:
    """A signal's data point: the first message of a subscription is what is known now, in both protocols."""
    messages = client.subscribe_current_values([path], timeout=PATIENCE_S)
    first: Mapping[str, Any] = next(messages, {})
    return first.get(path)


def _meaning(error: Exception, path: str) -> str:
    told = getattr(error, "error", None)
    code = told.get("code") if isinstance(told, Mapping) else None
    return f"{_MEANT.get(code, f'the broker fails: {type(error).__name__}: {error}')} ({path})"  # type: ignore[arg-type]
