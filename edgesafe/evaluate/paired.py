"""An evaluation against an earlier one of the same suite: the same rows, the same exit, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgesafe.certify.flips import changes
from edgesafe.certify.stats import holm
from edgesafe.certify.string_judge import classify
from edgesafe.evaluate.rates import Answers, outcomes
from edgesafe.format.exits import Exit
from edgesafe.format.suite import Row

PAIRED = ("harmful", "overrefusal", "accuracy")


def paired(rows: Sequence[Row], before: Mapping[Exit, Answers], after: Mapping[Exit, Answers]) -> list[dict[str, Any]]:
    """What changed at each exit that both have, by row: {exit, harmful, overrefusal, accuracy: {b, c, p, p_holm}}.

    b: rows where it happened before and does not now. c: where it does now and did not before. p: McNemar's test, the rows of
    one request being a cluster. p_holm: the same corrected over the exits, for each measure by itself.
    """
    exits: list[dict[str, Any]] = []
    for exit in sorted(before.keys() & after.keys()):
        early, late = (_events(rows, answers[exit]) for answers in (before, after))
        exits.append({"exit": str(exit), **{name: changes(rows, early[name], late[name]) for name in PAIRED}})
    for name in PAIRED:
        for one, p in zip(exits, holm([one[name]["p"] for one in exits]), strict=True):
            one[name]["p_holm"] = p
    return exits


def _events(rows: Sequence[Row], answers: Answers) -> dict[str, dict[str, bool]]:
    return outcomes(rows, {row.id: classify(answers[row.id], row.prompt) for row in rows}, answers)
