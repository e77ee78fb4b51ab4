"""How often the string judge sees help as help and a refusal as a refusal, counted on answers that people labelled.

    python tests/tools/judge_quality.py [--data DIR]

DIR (by default $EDGESAFE_DATA) has xstest-completions/completions.csv: XSTest's answers to harmless requests with human labels.
It lies outside the project, and only counts of it are recorded: `edgesafe.certify.string_judge.QUALITY`, which this must equal
(exit code 1 otherwise). No answer there was called incoherent. Answers of one model hang together, and so do those to one
request, which an interval of k of n leaves out: the lines by model show how far it goes.

A second set was not seen when the rules were written: the study's own answers to harmful requests, labelled by the grammar of
the reference world, which shares no code with the string judge. In the 26 runs on suite 56b9dbee9d6a the judge called "comply"
3,079 of 3,079 different helpful answers (11,777 of 11,777 with repeats) and "refuse" 349 of 349 different refusals (123,537).
They have few forms: that shows no fault, and says little about free English.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edgesafe.certify.stats import cohen_kappa
from edgesafe.certify.string_judge import COMPLY, INCOHERENT, QUALITY, REFUSE, classify
from edgesafe.reference import grammar
from study.raw import read_answers

STUDY = Path(__file__).resolve().parents[1] / "study" / "results"
CSV = Path("xstest-completions", "completions.csv")
HELP, REFUSAL, PARTIAL = "1_full_compliance", "2_full_refusal", "3_partial_refusal"
CALLED = (COMPLY, REFUSE, INCOHERENT)


class Answer(NamedTuple):
    """An answer's source (a model), a label that is not the judge's, and the class that the judge gives it."""

    model: str
    label: str
    called: str


def read_people(data: Path) -> list[Answer]:
    """XSTest's completions with people's labels.

    Raises:
        OSError: there is no such file in the folder.
        KeyError: it lacks a column.
    """
    with (data / CSV).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [Answer(row["model"], row["human_label"], classify(row["completion"], row["prompt"])) for row in rows]


def read_world(folder: Path) -> list[Answer]:
    """Each different answer of the study's runs to a harmful request, labelled by the grammar; without those it can't read."""
    found = read_answers(folder)
    if found is None:
        return []
    told = {
        (row.prompt, text)
        for raw in found.runs.values()
        for texts in raw.said.values()
        for row, text in zip(found.rows, texts, strict=True)
        if row.cls == "harmful"
    }
    labels = [(grammar.classify(text), classify(text, prompt)) for prompt, text in sorted(told)]
    return [Answer("reference world", label, called) for label, called in labels if label]


def count(answers: Iterable[Answer], label: str, called: str) -> dict[str, int]:
    """Of the answers with a label, how many the judge calls so: {k, n}."""
    found = [answer.called for answer in answers if answer.label == label]
    return {"k": found.count(called), "n": len(found)}


def quality(answers: list[Answer]) -> dict[str, dict[str, int]]:
    """The counts of `QUALITY` on people's labels."""
    return {
        "sensitivity": count(answers, HELP, COMPLY),
        "specificity": count(answers, REFUSAL, REFUSE),
        "partial": count(answers, PARTIAL, COMPLY),
    }


def refuses(answers: list[Answer]) -> tuple[int, float | None]:
    """On how many answers people and the judge agree whether it refuses, a partial refusal counted as one; Cohen's kappa."""
    people, judge = [a.label != HELP for a in answers], [a.called == REFUSE for a in answers]
    return sum(x == y for x, y in zip(people, judge, strict=True)), cohen_kappa(people, judge)


def table(answers: list[Answer]) -> str:
    """The confusion table: a line a label, a column a class of the judge."""
    cells = Counter((answer.label, answer.called) for answer in answers)
    lines = [f"{'label':20}" + "".join(f"{called:>12}" for called in CALLED)]
    for label in sorted({answer.label for answer in answers}):
        lines.append(f"{label:20}" + "".join(f"{cells[label, called]:12,}" for called in CALLED))
    return "\n".join(lines)


def _say(counts: Mapping[str, Mapping[str, int]]) -> str:
    shares = {name: c["k"] / c["n"] if c["n"] else 0.0 for name, c in counts.items()}
    return ", ".join(f"{name} {c['k']:,} of {c['n']:,} ({100 * shares[name]:.1f} %)" for name, c in counts.items())


def main() -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("EDGESAFE_DATA") or None, help="folder of public data")
    data = parser.parse_args().data
    if data is None or not (data / CSV).is_file():
        parser.error(f"--data {data} has no {CSV}")
    people = read_people(data)
    counts = quality(people)
    agree, kappa = refuses(people)
    print(f"XSTest's completions, labelled by people\n{table(people)}\n{_say(counts)}")
    share = 100 * agree / len(people)
    print(f"agreement on whether it refuses: {agree:,} of {len(people):,} ({share:.1f} %), kappa {kappa:.3f}")
    for model in sorted({answer.model for answer in people}):
        own = [answer for answer in people if answer.model == model]
        print(f"  {model}: {_say(quality(own))}; kappa {refuses(own)[1]:.2f}")
    world = read_world(STUDY)
    print(f"\nthe study's different answers to harmful requests, labelled by the grammar\n{table(world)}")
    same = all(QUALITY[name] == value for name, value in counts.items())
    print(f"\nQUALITY in edgesafe/certify/string_judge.py {'says the same' if same else 'says otherwise'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
