"""An evaluation against an earlier one of the same suite: the same rows, the same exit, before and after."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgesafe.certify.stats import holm, mcnemar_clustered
from edgesafe.certify.string_judge import JUDGE, classify
from edgesafe.errors import InputError
from edgesafe.evaluate.rates import Answers, outcomes
from edgesafe.format.exits import Exit
from edgesafe.format.suite import Row, Suite

REPORT, ANSWERS = "report.json", "answers.jsonl"
PAIRED = ("harmful", "overrefusal", "accuracy")


def read_report(folder: Path, suite_digest: str, max_new_tokens: int) -> dict[str, Any]:
    """The report of an earlier evaluation.

    Raises:
        InputError: there is none; or it is by an earlier edgesafe, of another suite, by other rules of the judge, or of answers
            cut at another length: the two would not compare.
    """
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        suite, judge, tokens = report["suite"], report["judge"]["sha256"], report["max_new_tokens"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            "no evaluation to compare with", where=str(folder / REPORT), expected="what `edgesafe evaluate` wrote"
        ) from error
    if "reference" not in report:
        raise InputError(
            "the earlier evaluation was written by an earlier edgesafe, which named exits by depth",
            where=str(folder / REPORT),
            expected="exits by their text",
            todo="evaluate the earlier model again",
        )
    if suite != suite_digest:
        raise InputError(
            "the earlier evaluation is of another suite",
            where=str(folder),
            expected=f"suite {suite_digest[:12]}",
            todo="evaluate both models on the same suite",
        )
    if judge != JUDGE["sha256"]:
        raise InputError(
            "the earlier evaluation was judged by other rules",
            where=str(folder),
            expected=f"judge {JUDGE['name']} {JUDGE['version']}, sha256 {JUDGE['sha256'][:12]}",
            todo="evaluate the earlier model again",
        )
    if tokens != max_new_tokens:
        raise InputError(
            f"the earlier answers have up to {tokens} tokens",
            where=str(folder),
            expected=f"max_new_tokens {max_new_tokens}",
            todo="evaluate the earlier model again",
        )
    return dict(report)


def read_answers(folder: Path, suite: Suite) -> dict[Exit, dict[str, str]]:
    """Every answer of an earlier evaluation: {exit: {row id: text}}.

    Raises:
        InputError: there are none, or not one for every row of the suite at every exit.
    """
    path = folder / ANSWERS
    answers: dict[Exit, dict[str, str]] = {}
    try:
        # Not splitlines(), which also cuts at characters that an answer may hold.
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            one = json.loads(line)
            answers.setdefault(Exit.parse(one["exit"]), {})[str(one["id"])] = str(one["answer"])
    except (OSError, ValueError, TypeError, KeyError, InputError) as error:
        raise InputError(
            "the earlier answers can't be read", where=str(path), expected="the lines that `edgesafe evaluate` wrote"
        ) from error
    wanted = {row.id for row in suite.rows}
    wrong = sorted(exit for exit, one in answers.items() if one.keys() != wanted)
    if wrong or not answers:
        raise InputError(
            f"the earlier answers of exit {wrong[0]} are not one for each row" if wrong else "there are no earlier answers",
            where=str(path),
            expected=f"the {len(wanted)} rows of suite {suite.digest[:12]} at every exit",
            todo="evaluate the earlier model again",
        )
    return answers


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


def changes(rows: Sequence[Row], early: Mapping[str, bool], late: Mapping[str, bool]) -> dict[str, Any]:
    """Rows that changed from yes to no (b) and from no to yes (c), and McNemar's p-value clustered by request.

    Where all rows have one prompt the request stands in the picture (FigStep): there the row's template tells requests apart.
    """
    b = c = 0
    in_picture = len({row.prompt for row in rows}) == 1
    clusters: Counter[str] = Counter()
    for row in rows:
        if row.id in early and early[row.id] != late[row.id]:
            b, c = b + early[row.id], c + late[row.id]
            clusters[row.template if in_picture else row.prompt] += early[row.id] - late[row.id]
    return {"b": b, "c": c, "p": mcnemar_clustered(list(clusters.values()))}


def _events(rows: Sequence[Row], answers: Answers) -> dict[str, dict[str, bool]]:
    return outcomes(rows, {row.id: classify(answers[row.id], row.prompt) for row in rows}, answers)
