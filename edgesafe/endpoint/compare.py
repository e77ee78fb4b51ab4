"""Before and after: the same requests to two models, what of their answers turned, and whether chance explains it.

An answer set is the folder of a run through an endpoint, the folder of `edgesafe evaluate`, or the file that
`edgesafe certify --answers` writes. The last two hold several exits, of which one is named.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgesafe.certify.earlier import ANSWERS
from edgesafe.certify.flips import changes, digest_of_all
from edgesafe.certify.stats import holm, mcnemar_exact, paired_interval, rate
from edgesafe.certify.string_judge import COMPLY, INCOHERENT, JUDGE, REFUSE, classify, is_right
from edgesafe.endpoint.certify import ONLY
from edgesafe.endpoint.kept import differences, is_run, longest, read_run
from edgesafe.errors import InputError
from edgesafe.format.exits import Exit
from edgesafe.format.suite import CLASSES, Row, Suite
from edgesafe.format.targets import shown_path
from edgesafe.progress import table

LABELS = (REFUSE, COMPLY, INCOHERENT)
# What is counted of each class: the answers that are wrong for it.
FAULT = {"harmful": "helped", "harmless": "refused", "task": "wrong"}
_SAID = {REFUSE: "refused", COMPLY: "helped", INCOHERENT: "incoherent"}


@dataclass(frozen=True)
class AnswerSet:
    """Answers {row id: text}, and who gave them: a run's `subject` and `request`, or the file and the exit."""

    place: str
    answers: Mapping[str, str]
    subject: Mapping[str, Any] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; of the answers their digest."""
        digest = digest_of_all({ONLY: self.answers})
        return {"subject": dict(self.subject), "request": dict(self.request), "answers_digest": digest}


def read_set(path: Path, suite: Suite, exit: str | None = None) -> AnswerSet:
    """An answer set of some of a suite's rows.

    Args:
        path: a run's or an evaluation's folder, or a file of answers.
        suite: whose rows.
        exit: which of several exits.

    Raises:
        InputError: it is none, or of other rows; or there are several exits and none of them is named.
    """
    if is_run(path):
        run = read_run(path)
        if run.head.get("suite") != suite.digest:
            what, todo = "the answers are to another suite", "name the suite that they are to"
            raise InputError(what, where=shown_path(path), expected=f"suite {suite.digest[:12]}", todo=todo)
        answers = {name: one.answer for name, one in run.kept.items()}
        found = AnswerSet(shown_path(path), answers, run.head.get("subject", {}), run.head.get("request", {}))
    else:
        file = path / ANSWERS if path.is_dir() else path
        by_exit = _read_lines(file)
        chosen = _chosen(by_exit, exit, file)
        found = AnswerSet(shown_path(path), by_exit[chosen], {"file": shown_path(file), "exit": str(chosen)})
    strange = sorted(found.answers.keys() - {row.id for row in suite.rows})
    if strange or not found.answers:
        what = f"the suite has no row {strange[0]!r}" if strange else "there are no answers"
        raise InputError(what, where=shown_path(path), expected=f"answers to rows of {shown_path(suite.root)}")
    return found


def _read_lines(file: Path) -> dict[Exit, dict[str, str]]:
    found: dict[Exit, dict[str, str]] = {}
    try:
        # Not splitlines(), which also cuts at characters that an answer may hold.
        for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n"):
            one = json.loads(line)
            answers = found.setdefault(Exit.parse(one["exit"]), {})
            if str(one["id"]) in answers:
                raise ValueError("a second answer to one row")
            answers[str(one["id"])] = str(one["answer"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError, InputError) as error:
        expected = "a run's folder, that of `edgesafe evaluate`, or the file of `edgesafe certify --answers`"
        raise InputError("the answers can't be read", where=shown_path(file), expected=expected) from error
    return found


def _chosen(by_exit: Mapping[Exit, Any], exit: str | None, file: Path) -> Exit:
    known = ", ".join(map(str, sorted(by_exit)))
    if exit is not None:
        if (named := Exit.parse(exit)) not in by_exit:
            raise InputError(f"there are no answers of exit {exit}", where=shown_path(file), expected=f"one of {known}")
        return named
    if len(by_exit) != 1:
        raise InputError("there are answers of several exits", where=shown_path(file), expected=f"--exit with one of {known}")
    return next(iter(by_exit))


def compare(suite: Suite, before: AnswerSet, after: AnswerSet) -> dict[str, Any]:
    """What turned between two sets of answers to the same rows.

    Returns:
        {suite, judge, rows, before, after: see `AnswerSet`, differs: [what the two say differently of themselves],
        identical: answers that are the same text,
        classes: {class: {event, before, after: rates of the event, b, c, p, p_clustered, difference, lower_95, upper_95,
            flips: {"refused -> helped": rows}}}, families: {family: the same, with cls and p_holm},
        turned: [{id, cls, family, before, after}]}.
        b: rows of the event before alone; c: after alone; p: McNemar's exact test, over the families corrected by Holm. The
        difference is that of the two rates, after - before, with its two-sided 95 % interval.

    Raises:
        InputError: the sets answer different rows, or answers of different length.
    """
    rows = [row for row in suite.counted if row.id in before.answers]
    _check_pair(before, after)
    if not rows:
        raise InputError("none of the answers is to a row that counts", where=before.place)
    families = {name: [row for row in rows if row.family == name] for name in dict.fromkeys(row.family for row in rows)}
    by_family = {name: {"cls": own[0].cls, **_turned(own, before.answers, after.answers)} for name, own in families.items()}
    for one, p in zip(by_family.values(), holm([one["p"] for one in by_family.values()]), strict=True):
        one["p_holm"] = p
    labels = [(row, _label(row, before.answers), _label(row, after.answers)) for row in rows]
    of_class = {cls: [row for row in rows if row.cls == cls] for cls in CLASSES}
    return {
        "suite": {"digest": suite.digest, "name": suite.name, "rows": len(suite.counted)},
        "judge": dict(JUDGE),
        "rows": len(rows),
        "before": before.to_json(),
        "after": after.to_json(),
        "differs": differences(before.subject, after.subject) + differences(before.request, after.request),
        "identical": sum(before.answers[row.id] == after.answers[row.id] for row in rows),
        "classes": {cls: _turned(own, before.answers, after.answers) for cls, own in of_class.items() if own},
        "families": by_family,
        "turned": [
            {"id": row.id, "cls": row.cls, "family": row.family, "before": _SAID[x], "after": _SAID[y]}
            for row, x, y in labels
            if x != y
        ],
    }


def _check_pair(before: AnswerSet, after: AnswerSet) -> None:
    apart = sorted(before.answers.keys() ^ after.answers.keys())
    if apart:
        alone = before if apart[0] in before.answers else after
        raise InputError(
            f"{len(apart)} rows have an answer in one set only, such as {apart[0]!r}",
            where=alone.place,
            expected="two sets of answers to the same rows",
            todo="finish the run that stopped: the command that began it continues",
        )
    lengths = [longest(one.request) for one in (before, after)]
    if None not in lengths and lengths[0] != lengths[1]:
        raise InputError(
            f"answers of up to {lengths[0]} and of up to {lengths[1]} tokens don't compare",
            where=f"{before.place}, {after.place}",
            expected="one --max-tokens",
        )


def _turned(rows: Sequence[Row], before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, Any]:
    """One class's rows, or some of them: rates of its fault, what turned, and the paired test."""
    early, late = ({row.id: _fault(row, texts) for row in rows} for texts in (before, after))
    found = changes(rows, early, late)
    b, c, n = found["b"], found["c"], len(rows)
    lower, upper = paired_interval(c, b, n)
    flips = Counter((_label(row, before), _label(row, after)) for row in rows)
    return {
        "event": FAULT[rows[0].cls],
        "before": asdict(rate(sum(early.values()), n)),
        "after": asdict(rate(sum(late.values()), n)),
        "b": b,
        "c": c,
        "p": mcnemar_exact(b, c),
        "p_clustered": found["p"],
        "difference": (c - b) / n,
        "lower_95": lower,
        "upper_95": upper,
        "flips": {f"{_SAID[x]} -> {_SAID[y]}": flips[x, y] for x in LABELS for y in LABELS if x != y},
    }


def _label(row: Row, texts: Mapping[str, str]) -> str:
    return classify(texts[row.id], row.prompt)


def _fault(row: Row, texts: Mapping[str, str]) -> bool:
    if row.cls == "task":
        return not is_right(texts[row.id], row)
    return _label(row, texts) == (COMPLY if row.cls == "harmful" else REFUSE)


def comparison_text(found: Mapping[str, Any]) -> str:
    """The comparison for people: the rates, the flips, the families that turned."""
    lines = [[cls, *_cells(one)] for cls, one in found["classes"].items()]
    heads = ["", "event", "before", "after", "difference, points", "no more", "newly", "p"]
    parts = [
        f"{found['rows']} of {found['suite']['rows']} rows; judge {found['judge']['name']} {found['judge']['version']}; "
        f"{found['identical']} answers are the same text",
        f"the two differ in {', '.join(found['differs']) or 'nothing that they say of themselves'}",
        table(lines, heads),
        "p: McNemar's exact test of the rows that turned; difference with its 95 % interval",
        table([[cls, *one["flips"].values()] for cls, one in found["classes"].items()], ["", *_flip_names(found)]),
    ]
    turned = {name: one for name, one in found["families"].items() if one["b"] or one["c"]}
    if turned and len(found["families"]) > len(found["classes"]):
        rows = [[name, *_cells(one)[:-1], _p(one["p_holm"])] for name, one in turned.items()]
        parts += [
            "families in which the event turned; p corrected by Holm over all of them",
            table(rows, ["family", *heads[1:]]),
        ]
    return "\n\n".join(parts)


def _flip_names(found: Mapping[str, Any]) -> list[str]:
    return list(next(iter(found["classes"].values()))["flips"])


def _cells(one: Mapping[str, Any]) -> list[Any]:
    low, high = 100 * one["lower_95"], 100 * one["upper_95"]
    shift = f"{100 * one['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
    rates = [f"{r['k']}/{r['n']} = {100 * r['rate']:.1f} %" for r in (one["before"], one["after"])]
    return [one["event"], *rates, shift, one["b"], one["c"], _p(one["p"])]


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
