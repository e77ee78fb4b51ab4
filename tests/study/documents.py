"""Tables between markers in Markdown files: written from the raw answers, and checked against them.

A block starts with the line `<!-- table: NAME -->` and ends with `<!-- /table -->`. Figures in a table outside a block are
refused, because nothing could tell whether they are still true.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from edgesafe.errors import AlignError
from edgesafe.format.files import write_atomically

_OPEN = re.compile(r"<!-- table: (.*?) -->\s*")
_CLOSE = re.compile(r"<!-- /table -->\s*")
_FENCE = re.compile(r"\s*(```|~~~)")
_DASHES = r"\s*:?-+:?\s*"
_MARKDOWN_RULE = re.compile(rf"\s*(\|{_DASHES})+\|?\s*|{_DASHES}(\|{_DASHES})+\|?\s*")
_TEXT_RULE = re.compile(r"\s*-{2,}(\s+-{2,})+\s*")
_CODE = re.compile(r"`[^`]*`")
_NUMBER_CELL = re.compile(r"[*~<>=]*[-+]?\d[\d.,:%eE+-]*\*?\s*(%|ms|s|MB|\[.*\]|->.*|/.*)?")


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
    """Refuse a document whose tables are not what the raw answers give, or that has figures in a table without markers.

    Raises:
        AlignError: it says which table and line.
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
    inside = {i for block in found for i in range(block.first, block.last)}
    for i in stray(lines, inside):
        raise AlignError(
            f"figures in a table without a marker: {_line(lines[i])}",
            where=f"{path}:{i + 1}",
            expected="figures in tables only between `<!-- table: NAME -->` and `<!-- /table -->`",
            todo="make it a table of tests/study/tables.py, or a list in words",
        )


def stray(lines: Sequence[str], inside: set[int]) -> Iterator[int]:
    """Numbers of lines outside the blocks that hold figures in a table.

    A table is: lines below a Markdown rule, as long as they have a bar; lines of HTML with a cell; in a fenced block, lines
    below a rule of dashes, or two lines or more in a row with two or more columns of numbers. Figures are digits outside of
    code spans (`42` is a name, 42 a figure).

    Args:
        lines: the document.
        inside: numbers of lines that lie in blocks.
    """
    fenced = ruled = table = False
    columns = 0  # lines of columns of numbers just above
    for i, line in enumerate(lines):
        if i in inside or _FENCE.match(line):
            fenced = not fenced if i not in inside else False
            ruled = table = False
            columns = 0
            continue
        if fenced:
            ruled = ruled or bool(_TEXT_RULE.fullmatch(line))
            columns = columns + 1 if _number_cells(line) >= 2 else 0
            if (ruled and re.search(r"\d", line)) or columns >= 2:
                yield i
        else:
            table = (table or bool(_MARKDOWN_RULE.fullmatch(line))) and "|" in line
            if (table or re.search(r"<t[dh]\b", line)) and re.search(r"\d", _CODE.sub("", line)):
                yield i


def _number_cells(line: str) -> int:
    """Cells of a line, parted by two blanks, a tab or a bar, that are numbers."""
    return sum(bool(_NUMBER_CELL.fullmatch(cell.strip())) for cell in re.split(r"\s{2,}|\t|\|", line))


def _table(block: Block, tables: Mapping[str, str], where: str) -> str:
    if block.name not in tables:
        raise AlignError(
            f"no table is called {block.name!r}",
            where=f"{where}:{block.first}",
            expected=", ".join(sorted(tables)),
            todo="mend the marker's name",
        )
    return tables[block.name]


def _line(line: str | None) -> str:
    return "no line" if line is None else repr(line)


def _broken(what: str, where: str, i: int) -> AlignError:
    todo = "put <!-- table: NAME --> before and <!-- /table --> after each table, on lines of their own"
    return AlignError(what, where=f"{where}:{i + 1}", expected="one end for each beginning", todo=todo)
