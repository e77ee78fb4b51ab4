"""Which exits are worth exporting: those that no faster one equals, by predicted time and measured accuracy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgesafe.certify.earlier import REPORT
from edgesafe.errors import InputError
from edgesafe.format.exits import MOST_RUNGS, Exit
from edgesafe_export.plan import Plan


def read_accuracy(evaluation: Path) -> dict[Exit, float]:
    """Each exit's share of right answers.

    Args:
        evaluation: what `edgesafe evaluate` wrote, of a suite of the split "val".

    Raises:
        InputError: It is none, has no tasks, or is of another split: exits that are chosen on the suite which then certifies
            or tests them would look better than they are.
    """
    where = str(evaluation / REPORT)
    try:
        report: dict[str, Any] = json.loads((evaluation / REPORT).read_text(encoding="utf-8"))
        split, found = report["split"], {Exit.parse(e["exit"]): e["accuracy"] for e in report["exits"]}
        rates = {exit: float(one["rate"]) for exit, one in found.items() if one["n"]}
        if not all(0 <= rate <= 1 for rate in rates.values()):  # NaN is neither
            raise ValueError(rates)
    except (OSError, ValueError, KeyError, TypeError, InputError) as error:
        raise InputError("no evaluation here", where=where, expected="what `edgesafe evaluate` wrote") from error
    check_chooses(split, bool(rates), where)
    return rates


def check_chooses(split: str, has_tasks: bool, where: str) -> None:
    """Refuse a suite by which exits can't be chosen.

    Raises:
        InputError: It is not a validation suite, or has no tasks.
    """
    if split != "val":
        todo = "evaluate on a suite of the split val"
        raise InputError(f"the evaluation is of the split {split!r}", where=where, expected="a validation suite", todo=todo)
    if not has_tasks:
        todo = "evaluate on a suite with tasks"
        raise InputError("the evaluation has no accuracy", where=where, expected="answers to tasks", todo=todo)


def front(plan: Plan, accuracy: Mapping[Exit, float], most: int = MOST_RUNGS) -> tuple[Exit, ...]:
    """The exits that answer better than every faster one, ascending, and the reference.

    Args:
        plan: of a ladder that has the exits of `accuracy`; its times order them.
        accuracy: of each exit.
        most: how many there may be; those that add least to the accuracy of the one before go first.

    Raises:
        InputError: The device's profile predicts no times.
    """
    times = {one.exit: one.ttft_ms for one in plan.exits if one.ttft_ms is not None and one.exit in accuracy}
    if not times:
        raise InputError(
            "no time is predicted at an exit that was evaluated",
            where=plan.device,
            expected="a profile with figures, and an evaluation of exits of this model",
            todo="measure the device: edgesafe devices measure",
        )
    chosen: list[Exit] = []
    for exit in sorted(times, key=lambda one: (times[one], -accuracy[one])):
        if not chosen or accuracy[exit] > accuracy[chosen[-1]]:
            chosen.append(exit)
    while len({*chosen, plan.reference}) > most:
        gains = [(accuracy[b] - accuracy[a], b) for a, b in zip(chosen, chosen[1:], strict=False) if b != plan.reference]
        chosen.remove(min(gains)[1])
    return tuple(sorted({*chosen, plan.reference}))
