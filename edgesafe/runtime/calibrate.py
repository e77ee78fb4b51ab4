"""What a run teaches about the next stage: how fast the machine is now, and how far predictions were off.

A measurement is made once; then the device grows hot, or another process takes a core. Every stage that ran says how
many times as long as measured it took. From that come two factors, whose product corrects a stage's prediction:
``speed``, which all stages share and which follows within about ``memory_ms`` of work, and one a stage, which follows
slowly and holds what is peculiar to it. And because no factor foresees the next burst, the last predictions' errors are
kept: their quantile widens the next prediction. Which quantile is learned as well, from the deadlines that were missed: an
exit is deeper than the next by a whole segment, so a prediction that is exceeded seldom costs the deadline, and one that
is never exceeded costs depth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

# Work over which the speed is averaged. A scheduler hands out slices of about 3 ms, so a stage much shorter than a few of
# them tells more of its luck than of the speed.
MEMORY_MS = 25.0
ANSWER_SHARE = 0.1
STAGE_GAIN = 0.05
# Errors kept: with 40 the 95 % bound is the second largest.
WINDOW = 40
# How far one answer moves the quantile, and which share of the misses that a budget allows is aimed at. With all of them as
# the aim, every other stretch of time would miss more than allowed.
LEVEL_GAIN = 0.3
AIM = 0.6
# An error is allowed to be exceeded at most every other time.
_MOST_EXCEEDED = 0.5
# Beyond these a factor stems from a clock that was set or a process that was stopped, not from a load.
_LEAST, _MOST = 0.05, 50.0


@dataclass(frozen=True)
class Correction:
    """What was learned so far; the empty one corrects nothing.

    ``speed`` and ``stages`` are factors on measured times (2 = twice as long). ``errors`` are the last
    ratios of what the rest of an answer took to what was expected, oldest first; ``slack`` is added to the share of
    them that may be exceeded.
    """

    speed: float = 1.0
    stages: Mapping[str, float] = field(default_factory=dict)
    errors: tuple[float, ...] = ()
    slack: float = 0.0


def factor(correction: Correction, stage: str) -> float:
    """By how much a stage's measured time is multiplied.

    >>> factor(Correction(2.0, {"prefill": 1.5}), "prefill"), factor(Correction(2.0), "prefill")
    (3.0, 2.0)
    """
    return correction.speed * correction.stages.get(stage, 1.0)


def memory_ms(answer_ms: float) -> float:
    """Work over which the speed is averaged, for answers whose first token takes so long.

    In a slow answer ``MEMORY_MS`` would be the last token alone, and that one was measured a quarter wrong says nothing of a
    prompt that is read for 20 s.

    >>> memory_ms(8.0), memory_ms(20e3)
    (25.0, 2000.0)
    """
    return max(MEMORY_MS, ANSWER_SHARE * answer_ms)


def learn(correction: Correction, stage: str, typical_ms: float, actual_ms: float, over_ms: float = MEMORY_MS) -> Correction:
    """The correction after a stage ran.

    Args:
        correction: The one before.
        stage: The stage's name.
        typical_ms: Its measured median, uncorrected.
        actual_ms: What it took.
        over_ms: Work over which the speed is averaged.

    A stage of ``MEMORY_MS`` moves the speed by 1 - 1/e = 63 % of the way to what it showed:

    >>> round(learn(Correction(), "a", MEMORY_MS, 2 * MEMORY_MS).speed, 3)
    1.632

    One that is always slower than the others is learned as such, and the speed is left to the others:

    >>> c = Correction()
    >>> for _ in range(200):
    ...     c = learn(learn(c, "a", 10.0, 10.0), "b", 10.0, 20.0)
    >>> round(factor(c, "a"), 1), round(factor(c, "b"), 1)
    (1.0, 2.0)
    """
    if typical_ms <= 0 or actual_ms <= 0:
        return correction
    shown = actual_ms / typical_ms
    own = correction.stages.get(stage, 1.0)
    gain = 1 - math.exp(-typical_ms / over_ms)
    speed = _bounded(correction.speed + gain * (shown / own - correction.speed))
    own = _bounded(own + STAGE_GAIN * (shown / correction.speed - own))
    return replace(correction, speed=speed, stages={**correction.stages, stage: own})


def first_seen(correction: Correction, stage: str, typical_ms: float, actual_ms: float) -> Correction:
    """The correction after a stage ran of which there is only a guess: what it took counts whole, as peculiar to it.

    >>> round(factor(first_seen(Correction(2.0), "a", 10.0, 70.0), "a"), 1)
    7.0
    """
    if typical_ms <= 0 or actual_ms <= 0:
        return correction
    own = _bounded(actual_ms / typical_ms / correction.speed)
    return replace(correction, stages={**correction.stages, stage: own})


def remember_error(correction: Correction, ratio: float) -> Correction:
    """The correction after the rest of an answer took ``ratio`` times what was expected.

    >>> remember_error(Correction(errors=(1.0,) * WINDOW), 1.3).errors[-2:]
    (1.0, 1.3)
    """
    return replace(correction, errors=(*correction.errors, ratio)[-WINDOW:])


def remember_deadline(correction: Correction, missed: bool, quantile: float) -> Correction:
    """The correction after a deadline that was predicted to be kept with a chance of ``quantile`` was missed or kept.

    A budget of quantile 0.9 allows 0.1 misses and aims at 0.06: a kept deadline adds 0.06 times the gain to the slack, and a
    missed one takes 0.94 times the gain away, though never so much that less than nothing may be exceeded.

    >>> kept = remember_deadline(Correction(), False, 0.9)
    >>> round(kept.slack, 3), remember_deadline(kept, True, 0.9).slack == 0.9 - 1
    (0.018, True)

    Source: adaptive conformal inference, Gibbs and Candes 2021 (arXiv 2106.00170), equation 2.
    Differs: the error is the deadline's, not the prediction's, and the aim is below the level.
    """
    slack = correction.slack + LEVEL_GAIN * (AIM * (1 - quantile) - missed)
    return replace(correction, slack=min(max(slack, quantile - 1), _MOST_EXCEEDED))


def error_bound(correction: Correction, quantile: float) -> float:
    """The ratio that the next error stays below with a chance of at least ``quantile``, if it is like the last ones.

    It is 1 before any error, then the ceil((n + 1) quantile)-th smallest of n errors, or the largest where n is too
    small to say. The slack lowers the quantile.

    Source: the split-conformal quantile, Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005.

    >>> error_bound(Correction(errors=tuple(i / 10 for i in range(1, 20))), 0.95)
    1.9
    >>> error_bound(Correction(errors=tuple(i / 10 for i in range(1, 20))), 0.5), error_bound(Correction(), 0.95)
    (1.0, 1.0)
    """
    errors = sorted(correction.errors)
    if not errors:
        return 1.0
    level = 1 - min(max(1 - quantile + correction.slack, 0.0), max(_MOST_EXCEEDED, 1 - quantile))
    place = math.ceil(round((len(errors) + 1) * level, 9))
    return errors[min(max(place, 1), len(errors)) - 1]


def enough_errors(correction: Correction, quantile: float) -> bool:
    """Whether the errors are so many that one of them, and not merely the largest, is the quantile's bound.

    >>> enough_errors(Correction(errors=(1.0,) * 19), 0.95), enough_errors(Correction(errors=(1.0,) * 18), 0.95)
    (True, False)
    """
    count = len(correction.errors)
    return round((count + 1) * quantile, 9) <= count


def _bounded(value: float) -> float:
    return min(max(value, _LEAST), _MOST)
