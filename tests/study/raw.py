"""Raw answers on disk: one JSON file a run, the suite's rows once beside them.

FOLDER/rows.json is {suite, split, rows}; FOLDER/raw/NAME.json holds a run's answers, each different one once in `strings`
and for every exit the number of its string for every row, in the suite's order; under "0" those of requests without a picture,
where no exit takes part. Files of earlier runs have the reference's depth, as `reference_depth`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesafe.errors import AlignError
from edgesafe.format.exits import Exit, read_exit
from edgesafe.format.fields import Fields
from edgesafe.format.files import write_atomically
from edgesafe.format.suite import Row

Said = Mapping[Exit | None, tuple[str, ...]]

ROWS, RAW = "rows.json", "raw"
_NO_EXIT = "0"
_ROW_FIELDS = ("id", "cls", "family", "prompt", "target", "key", "template")


@dataclass(frozen=True)
class Raw:
    """What one run said, and what it was made from.

    key: digest of all that the answers depend on. config: the resolved settings, {} where nothing was trained. model, suite:
    digests of what was asked. seconds: of the updates; setup_seconds: of what comes before and after them; cpu_seconds: both on
    the processor's clock. tokens: language-model token positions, backward counted as two forward passes. None = not measured.
    said: {exit: an answer for every row of the suite}; None is that of requests without a picture, where no exit takes part.
    """

    run: str
    key: str
    config: dict[str, Any]
    model: str
    suite: str
    reference: Exit
    seconds: float | None
    setup_seconds: float | None
    cpu_seconds: float | None
    tokens: int | None
    machine: dict[str, Any]
    said: Said


@dataclass(frozen=True)
class Answers:
    """A folder of raw answers to one suite: its digest, its rows, and the runs by name."""

    suite: str
    rows: tuple[Row, ...]
    runs: dict[str, Raw]


def encode(said: Mapping[Exit | None, Sequence[str]]) -> dict[str, Any]:
    """Answers as {strings, said}; the commonest string has the smallest number, so that the file stays small.

    >>> encode({Exit(1): ["no", "yes", "yes"]})
    {'strings': ['yes', 'no'], 'said': {'1': [1, 0, 0]}}
    """
    counts = Counter(text for texts in said.values() for text in texts)
    strings = sorted(counts, key=lambda text: (-counts[text], text))
    number = {text: i for i, text in enumerate(strings)}
    return {
        "strings": strings,
        "said": {str(e or _NO_EXIT): [number[text] for text in said[e]] for e in sorted(said, key=_place)},
    }


def raw_path(folder: Path, run: str) -> Path:
    """Where a run's answers lie."""
    return folder / RAW / f"{run}.json"


def write_raw(folder: Path, raw: Raw) -> Path:
    """Write a run's file, one line a field; returns its path."""
    fields = {**vars(raw), "reference": str(raw.reference), **encode(raw.said)}
    fields["strings"], fields["said"] = fields.pop("strings"), fields.pop("said")
    path = raw_path(folder, raw.run)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False, separators=(',', ':'))}" for k, v in fields.items()]
    write_atomically(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    return path


def write_rows(folder: Path, suite: str, split: str, rows: Sequence[Row]) -> None:
    """Write the suite's rows, without their pictures."""
    plain = ({k: getattr(row, k) for k in _ROW_FIELDS} | ({"asked": row.asked} if row.asked else {}) for row in rows)
    shown = [json.dumps(row, ensure_ascii=False) for row in plain]
    head = f'{{"suite": {json.dumps(suite)}, "split": {json.dumps(split)}, "rows": [\n'
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / ROWS, (head + ",\n".join(shown) + "\n]}\n").encode())


def read_suite_digest(folder: Path) -> str | None:
    """The digest of the suite that a folder's answers are to; None where the folder has no rows."""
    path = folder / ROWS
    return Fields(_decode(path), str(path), AlignError).text("suite") if path.is_file() else None


def read_answers(folder: Path) -> Answers | None:
    """The rows and every run of a folder, or None where there are no rows.

    Raises:
        AlignError: a file is damaged, named after another run, or of another suite than rows.json.
    """
    if not (folder / ROWS).is_file():
        return None
    fields = Fields(_decode(folder / ROWS), str(folder / ROWS), AlignError)
    suite, rows = fields.text("suite"), tuple(_row(f) for f in fields.children("rows"))
    runs = {}
    for path in sorted((folder / RAW).glob("*.json")):
        raw = read_raw(path, len(rows))
        if raw.suite != suite or raw.run != path.stem:
            what = f"the answers are to suite {raw.suite[:12]}" if raw.suite != suite else f"the answers are of run {raw.run!r}"
            raise AlignError(what, where=str(path), expected=f"run {path.stem!r} on suite {suite[:12]}", todo="run it again")
        runs[raw.run] = raw
    return Answers(suite, rows, runs)


def read_raw(path: Path, rows: int) -> Raw:
    """One run's file.

    Args:
        path: the file.
        rows: how many answers each exit must have.

    Raises:
        AlignError: the file is damaged.
    """
    fields = Fields(_decode(path), str(path), AlignError)
    strings, said = fields.texts("strings"), fields.child("said")
    return Raw(
        run=fields.text("run"),
        key=fields.text("key"),
        config=fields.table("config"),
        model=fields.text("model"),
        suite=fields.text("suite"),
        reference=read_exit(fields, "reference", by_depth=fields.has("reference_depth")),
        seconds=_maybe(fields, "seconds"),
        setup_seconds=_maybe(fields, "setup_seconds"),
        cpu_seconds=_maybe(fields, "cpu_seconds"),
        tokens=fields.integer("tokens") if fields.has("tokens") else None,
        machine=fields.table("machine"),
        said={_exit(e): _texts(said.integers(e), strings, rows, f"{path}: exit {e}") for e in fields.table("said")},
    )


def _exit(text: str) -> Exit | None:
    return None if text == _NO_EXIT else Exit.parse(text)


def _place(exit: Exit | None) -> tuple[Exit, ...]:
    """What exits are sorted by; no exit comes first."""
    return () if exit is None else (exit,)


def _maybe(fields: Fields, key: str) -> float | None:
    return fields.number(key, 0.0) if fields.has(key) else None


def _texts(numbers: Sequence[int], strings: Sequence[str], rows: int, where: str) -> tuple[str, ...]:
    if len(numbers) != rows or not all(0 <= n < len(strings) for n in numbers):
        raise AlignError(
            "the answers do not fit", where=where, expected=f"{rows} numbers below {len(strings)}", todo="run the run again"
        )
    return tuple(strings[n] for n in numbers)


def _row(f: Fields) -> Row:
    return Row(
        id=f.text("id"),
        cls=f.text("cls"),
        family=f.text("family"),
        image=None,
        prompt=f.text("prompt"),
        target=f.text("target"),
        key=f.texts("key"),
        template=f.text("template"),
        smoke=False,
        asked=f.text("asked") if f.has("asked") else "",
    )


def _decode(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AlignError(
            "the raw answers can't be read", where=str(path), expected="what `make study` wrote", todo=str(error)
        ) from error
