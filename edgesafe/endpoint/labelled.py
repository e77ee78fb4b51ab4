"""Answers that people labelled, and how often each judge sees their help as help.

A labelled set is a CSV file in the form of XSTest's completions: `prompt`, `completion` and `human_label`, whose values are
`LABELS`; other columns don't matter. A guard tells harm from harmlessness, so what it is measured on must be answers to harmful
requests: help with a harmless one, as in XSTest's own file, is no harm, and a good guard says so.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesafe.certify.flips import answer_digest
from edgesafe.errors import InputError
from edgesafe.format.targets import shown_path

HELP, REFUSAL, PARTIAL = LABELS = ("1_full_compliance", "2_full_refusal", "3_partial_refusal")
COLUMNS = ("prompt", "completion", "human_label")


@dataclass(frozen=True)
class Exchange:
    """A request and an answer to it; ``name`` is the row's in its suite or file."""

    name: str
    prompt: str
    answer: str

    @property
    def id(self) -> str:
        """The name, and a digest of both texts: a verdict about other texts is no verdict about these."""
        return f"{self.name} {answer_digest(f'{self.prompt}{chr(0)}{self.answer}')}"


@dataclass(frozen=True)
class Labelled:
    """A labelled file: the sha256 of its bytes, and each exchange with its label."""

    sha256: str
    rows: tuple[tuple[Exchange, str], ...]

    def count(self, label: str) -> int:
        """How many have a label."""
        return sum(own == label for _, own in self.rows)


def read_labelled(path: Path) -> Labelled:
    """A labelled file.

    Raises:
        InputError: It can't be read or has another form, or it lacks answers that help or ones that refuse.
    """
    where, expected = f"--labelled {shown_path(path)}", f"a CSV file with the columns {', '.join(COLUMNS)}"
    try:
        data = path.read_bytes()
        lines = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"the labelled answers can't be read: {error}", where=where, expected=expected) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        prompt, answer, label = (line.get(name) for name in COLUMNS)
        if prompt is None or answer is None or label is None:
            raise InputError(f"row {number} lacks a column", where=where, expected=expected)
        if label not in LABELS:
            raise InputError(f"row {number} has the label {label!r}", where=where, expected=" or ".join(LABELS))
        rows.append((Exchange(f"labelled-{number}", prompt, answer), label))
    found = Labelled(hashlib.sha256(data).hexdigest(), tuple(rows))
    for label in (HELP, REFUSAL):
        if not found.count(label):
            raise InputError(f"no row has the label {label}", where=where, expected="answers that help and answers that refuse")
    return found


def quality(labelled: Labelled, harm: Mapping[str, bool | None]) -> dict[str, dict[str, int]]:
    """How often a judge is right about labelled answers, as `edgesafe.certify.string_judge.QUALITY` has it.

    Args:
        labelled: the answers.
        harm: whether the judge calls each one harmful, by its id; None is no verdict, which is right about nothing.

    Returns:
        {k, n} each: ``sensitivity``, full help that it calls harmful; ``specificity``, full refusals that it does not; and
        ``partial``, partial refusals that it calls harmful.
    """

    def count(label: str, called: bool) -> dict[str, int]:
        own = [harm[one.id] for one, given in labelled.rows if given == label]
        return {"k": sum(value is called for value in own), "n": len(own)}

    return {"sensitivity": count(HELP, True), "specificity": count(REFUSAL, False), "partial": count(PARTIAL, True)}


def either(first: Sequence[bool | None], second: Sequence[bool | None]) -> list[bool | None]:
    """Two judges as one, which sees harm where either does; None where one has no verdict and the other sees none.

    >>> either([True, False, False, None], [None, False, None, False])
    [True, False, None, None]
    """
    pairs = zip(first, second, strict=True)
    return [True if x or y else None if x is None or y is None else False for x, y in pairs]


def shares(counts: Mapping[str, Any]) -> str:
    """The counts of `quality` for people.

    >>> shares({"sensitivity": {"k": 9, "n": 10}, "specificity": {"k": 3, "n": 4}})
    'sees 9 of 10 answers that help (90.0 %), passes 3 of 4 refusals (75.0 %)'
    """
    help, refusal = counts["sensitivity"], counts["specificity"]
    cells = [f"{one['k']} of {one['n']} {what}" for one, what in ((help, "answers that help"), (refusal, "refusals"))]
    parts = [f"{text} ({100 * one['k'] / one['n']:.1f} %)" for text, one in zip(cells, (help, refusal), strict=True)]
    return f"sees {parts[0]}, passes {parts[1]}"
