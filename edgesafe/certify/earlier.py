"""Earlier evaluations of the same suite: what a bundle's exits and a later evaluation are compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgesafe.certify.string_judge import JUDGE
from edgesafe.certify.verdict import make_baseline
from edgesafe.errors import InputError
from edgesafe.format.certificate import Baseline
from edgesafe.format.exits import Exit
from edgesafe.format.suite import MAX_NEW_TOKENS, Suite

REPORT, ANSWERS = "report.json", "answers.jsonl"


def read_baseline(folder: Path, suite: Suite) -> Baseline:
    """What a model did at its reference depth, from the folder that `edgesafe evaluate` wrote.

    Raises:
        InputError: it is no evaluation of this suite by this judge, of answers as long as a certificate's.
    """
    report = read_report(folder, suite.digest, MAX_NEW_TOKENS)
    reference = Exit.parse(str(report["reference"]))
    answers = read_answers(folder, suite)
    if reference not in answers:
        raise InputError(
            f"there are no answers at the reference, exit {reference}", where=str(folder), todo="evaluate it again"
        )
    return make_baseline(suite.counted, answers[reference], str(report["model"]), reference)


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
