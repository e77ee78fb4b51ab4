"""Tables between markers in Markdown files: written from the raw answers, and checked against them.

A block starts with the line `<!-- table: NAME -->` and ends with `<!-- /table -->`. What stands between them is generated and
compared; everything else in a document is prose and nobody's business here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

from edgesafe.errors import AlignError
from edgesafe.format.certificate import Rate
from edgesafe.format.files import write_atomically

_OPEN = re.compile(r"<!-- table: (.*?) -->\s*")
_CLOSE = re.compile(r"<!-- /table -->\s*")


@dataclass(frozen=True)
class Block:
    """A marked table: lines[first:last] lie between its markers."""

    name: str
    first: int
    last: int


def blocks(lines: Sequence[str], where: str) -> list[Block]:
    """The marked tables of a document.

    Raises:
        AlignError: a block in a block, one that does not end, or an end without a beginning.
    """
    found, name, first = [], "", 0
    for i, line in enumerate(lines):
        if match := _OPEN.fullmatch(line):
            if name:
                raise _broken(f"the table {name!r} does not end before the next begins", where, i)
            name, first = match[1], i + 1
        elif _CLOSE.fullmatch(line):
            if not name:
                raise _broken("a table ends that did not begin", where, i)
            found.append(Block(name, first, i))
            name = ""
    if name:
        raise _broken(f"the table {name!r} does not end", where, first - 1)
    return found


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(markdown(["exit", "rate"], [["1", "2.0"]]))
    | exit | rate |
    |---|---|
    | 1 | 2.0 |
    """
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The mean of several seeds, with the lowest and the highest where there are several.

    >>> spread([1.0, 2.0, 6.0]), spread([0.25], 2)
    ('3.0 (1.0-6.0)', '0.25')
    """
    shown = f"{fmean(values):.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def interval(rate: Rate) -> str:
    """A rate in per cent with its 95 % interval.

    >>> interval(Rate(5, 100, 0.05, 0.0215, 0.1118))
    '5.0 [2.1-11.2]'
    """
    return f"{100 * rate.rate:.1f} [{100 * rate.lower_95:.1f}-{100 * rate.upper_95:.1f}]"


def write(path: Path, tables: Mapping[str, str]) -> list[str]:
    """Put today's tables between a document's markers; returns their names.

    Raises:
        AlignError: broken markers, or a name that no table has.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    found = blocks(lines, str(path))
    for block in reversed(found):
        lines[block.first : block.last] = _table(block, tables, str(path)).split("\n")
    write_atomically(path, "\n".join(lines).encode())
    return [block.name for block in found]


def check(path: Path, tables: Mapping[str, str]) -> None:
    """Refuse a document whose tables are not what the raw answers give.

    Raises:
        AlignError: It says which table and line.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    found = blocks(lines, str(path))
    for block in found:
        shown, wanted = lines[block.first : block.last], _table(block, tables, str(path)).split("\n")
        for i, (is_there, should) in enumerate(zip_longest(shown, wanted)):
            if is_there != should:
                raise AlignError(
                    f"the table {block.name!r} is not what the raw answers give: {_line(is_there)}",
                    where=f"{path}:{block.first + i + 1}",
                    expected=_line(should),
                    todo="`PYTHONPATH=tests python -m study tables` writes it anew; tables are not edited by hand",
                )


def _table(block: Block, tables: Mapping[str, str], where: str) -> str:
    if block.name not in tables:
        raise AlignError(
            f"no table is called {block.name!r}",
            where=f"{where}:{block.first}",
            expected=", ".join(sorted(tables)),
            todo="fix the marker's name",
        )
    return tables[block.name]


def _line(line: str | None) -> str:
    return "no line" if line is None else repr(line)


def _broken(what: str, where: str, i: int) -> AlignError:
    todo = "put <!-- table: NAME --> before and <!-- /table --> after each table, on lines of their own"
    return AlignError(what, where=f"{where}:{i + 1}", expected="one end for each beginning", todo=todo)
