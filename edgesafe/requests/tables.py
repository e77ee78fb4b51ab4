"""Tables of requests: a CSV, JSONL or text file in UTF-8 as lines of texts, each of which knows where it stands."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesafe.errors import InputError
from edgesafe.format.targets import shown_path

# What the sets' own files and tidied copies of them call the same thing; the first name is ours.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "BehaviorID", "id_v2"),
    "prompt": ("prompt", "request", "goal", "question", "Behavior", "instruction"),
    "input": ("input",),
    "class": ("class", "label"),
    "refuse": ("refuse_expected",),
    "family": ("family", "category", "type", "SemanticCategory", "category_name"),
    "functional": ("functional", "FunctionalCategory"),
    "shown": ("typographic_text", "instruction"),
    "image": ("image", "file"),
    "name": ("name",),
    "target": ("target",),
    "key": ("key",),
    "template": ("template",),
}
NAMED = ("requests.csv", "labels.csv")  # the table of a folder with several
ENDINGS = (".csv", ".jsonl", ".txt")
# Longer ones are a table that was misread, and would be refused only when a model is asked.
MAX_LETTERS = 20_000


@dataclass(frozen=True)
class Line:
    """One line of a set: where it stands and its columns as texts."""

    where: str
    fields: Mapping[str, str]

    def get(self, what: str) -> str:
        """The text of the first column that goes by one of the names of `what`; empty where there is none."""
        return next((self.fields[name].strip() for name in COLUMNS[what] if name in self.fields), "")


def find_table(path: Path) -> Path:
    """The file that holds a set's rows.

    Raises:
        InputError: no such path, or a folder with none or with several of which none is requests.csv or labels.csv.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError("no such file or folder", where=str(path), expected="a CSV, JSONL or text file, or a folder with one")
    tables = sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in ENDINGS[:2])
    named = [p for p in tables if p.name in NAMED]
    if len(named or tables) != 1:
        raise InputError(
            f"{len(tables)} files could hold the rows" if tables else "no file holds rows",
            where=str(path),
            expected="one CSV or JSONL file, or one called requests.csv or labels.csv",
            todo="name the file itself",
        )
    return (named or tables)[0]


def read_table(file: Path) -> list[Line]:
    """The rows of a CSV or JSONL file, or of a text file with one request per line.

    Raises:
        InputError: it isn't UTF-8, is none of the three, has no rows, or a line does not fit the header.
    """
    data = _bytes_of(file)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{file}:{data.count(bytes([10]), 0, error.start) + 1}"
        raise InputError("the line is not UTF-8", where=where, expected="a UTF-8 file", todo="save the file as UTF-8") from None
    suffix = file.suffix.lower()
    if suffix not in _READERS:
        raise InputError(f"the ending {file.suffix!r} is not known", where=str(file), expected=" or ".join(ENDINGS))
    lines = _READERS[suffix](text, file)
    if not lines:
        raise InputError("the file has no rows", where=str(file), expected="one request per row")
    return lines


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        what = f"the file can't be read: {error.strerror}"
        raise InputError(what, where=shown_path(file), expected="a file of yours", todo="check its permissions") from error


def _read_text(text: str, file: Path) -> list[Line]:
    lines = enumerate(text.splitlines(), start=1)
    return [Line(f"{file}:{number}", {"prompt": line.strip()}) for number, line in lines if line.strip()]


def _read_csv(text: str, file: Path) -> list[Line]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines: list[Line] = []
    header: list[str] = []
    start = 1
    try:
        for cells in reader:
            where, start = f"{file}:{start}", reader.line_num + 1
            if not header:
                header = _header(cells, where)
            elif any(cell.strip() for cell in cells):
                if len(cells) != len(header):
                    expected = f"{len(header)} fields as in the header"
                    raise InputError(f"the row has {len(cells)} fields", where=where, expected=expected)
                lines.append(Line(where, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        expected = "quotes that close, and fields shorter than 131,072 letters"
        raise InputError(f"the line is not valid CSV: {error}", where=f"{file}:{start}", expected=expected) from None
    return lines


def _header(cells: list[str], where: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    other = next((mark for mark in ("\t", ";") if len(header) == 1 and mark in header[0]), None)
    if other:
        what = f"the columns are parted by {other!r}"
        raise InputError(what, where=where, expected="commas", todo="save the table as CSV with commas, or as JSONL")
    if len(set(header)) < len(header):
        raise InputError("two columns have the same name", where=where, expected="one name per column")
    return header


def _read_jsonl(text: str, file: Path) -> list[Line]:
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            obj = json.loads(line)
        except (ValueError, RecursionError):
            obj = None
        if not isinstance(obj, dict):
            raise InputError("the line is not a JSON object", where=where, expected="one row as a JSON object")
        lines.append(Line(where, {name: _text(name, value, where) for name, value in _flat(obj).items()}))
    return lines


def _flat(obj: dict[str, Any]) -> dict[str, Any]:
    """A row of self-instruct's own files keeps its input in the first of its instances; other rows are taken as they are."""
    instances = obj.get("instances")
    if "instruction" not in obj or not isinstance(instances, list) or not all(isinstance(one, dict) for one in instances):
        return obj
    plain = {name: value for name, value in obj.items() if name != "instances"}
    return plain | ({"input": instances[0].get("input", "")} if instances else {})


_READERS: Mapping[str, Callable[[str, Path], list[Line]]] = {".csv": _read_csv, ".jsonl": _read_jsonl, ".txt": _read_text}


def _text(name: str, value: Any, where: str) -> str:
    """A JSON value as the text that a CSV would hold; a list of texts is joined by "|"."""
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        value = "|".join(value)
    if isinstance(value, dict | list):
        raise InputError(f"{name} is a {type(value).__name__}", where=where, expected="a text, a number or a list of texts")
    text = "" if value is None else str(value)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{name} holds half a character", where=where, expected="text that UTF-8 can hold")
    return text


def required(line: Line, what: str) -> str:
    """The text of a column that a row can't do without.

    Raises:
        InputError: no such column, or it is empty.
    """
    names = COLUMNS[what]
    if not any(name in line.fields for name in names):
        near = [n for name in names for n in difflib.get_close_matches(name, line.fields, n=1)]
        todo = f"rename {near[0]!r}" if near else "add the column or name another --format"
        raise InputError(f"no column for the {what}", where=line.where, expected=" or ".join(map(repr, names)), todo=todo)
    text = line.get(what)
    if not text or len(text) > MAX_LETTERS:
        found = f"has {len(text):,} letters" if text else "is empty"
        raise InputError(f"the {what} {found}", where=line.where, expected=f"a text of at most {MAX_LETTERS:,} letters")
    return text
