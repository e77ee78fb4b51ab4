"""The tokens of every answer to the suite's rows for devices, at every certified exit, one JSON line each.

On a board, with nothing but the wheel beside it, these are the very answers that `edgesafe smoke` judges there:

  python answers.py smoke BUNDLE FILE EVERY    # runs the command and ends with its code
  python answers.py ask BUNDLE FILE EVERY      # asks the same questions without judging the answers or keeping a record

EVERY is 1 for all rows, 3 for every third.

The command asks in as many processes as there are cores, two at most: an emulated core is slow, and more threads don't help it.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from edgesafe import Session
from edgesafe.certify.ask import Answers, ask_all
from edgesafe.certify.certify import suite_of
from edgesafe.cli import main as edgesafe
from edgesafe.format.certificate import certified_exits
from edgesafe.format.exits import Exit
from edgesafe.format.suite import Row, Suite
from edgesafe.machine import allowed_cores

_PROCESSES = 2
Lines = list[dict[str, Any]]


@contextmanager
def recorded() -> Iterator[list[list[int]]]:
    """The tokens of every answer that is made meanwhile, in their order."""
    answered: list[list[int]] = []
    plain = Session.tokens

    def tokens(self: Session, *args: Any, **options: Any) -> Iterator[int]:
        answered.append(mine := [])
        for token in plain(self, *args, **options):
            mine.append(int(token))
            yield token

    Session.tokens = tokens  # type: ignore[method-assign,assignment]
    try:
        yield answered
    finally:
        Session.tokens = plain  # type: ignore[method-assign]


def ask(session: Session, suite: Suite, rows: Sequence[Row], exits: Sequence[Exit], label: str) -> Lines:
    """Every answer's exit, row, tokens and text."""
    with recorded() as answered:
        texts = ask_all(session, suite, rows, exits, label)
    # It asks row by row, and each row at one exit after the other.
    asked = zip(product(rows, exits), answered, strict=True)
    return [{"exit": str(e), "id": row.id, "tokens": tokens, "text": texts[e][row.id]} for (row, e), tokens in asked]


def run_smoke(bundle: str, file: Path, every: int) -> int:
    """`edgesafe smoke`, whose answers to every so many-th row are made by this process and its helpers."""
    cores = allowed_cores()[:_PROCESSES]

    def in_parts(session: Session, suite: Suite, rows: Sequence[Row], exits: Iterable[Exit], label: str) -> Answers:
        exits, count = tuple(exits), max(1, len(cores))
        parts = [file.with_suffix(f".{i}") for i in range(1, count)]
        helpers = [_helper(bundle, part, every, i, cores) for i, part in enumerate(parts, 1)]
        lines = ask(session, suite, rows[::every][0::count], exits, label)
        for helper, part in zip(helpers, parts, strict=True):
            if helper.wait():
                sys.exit(f"a process that answers ended with {helper.returncode}")
            lines += _read(part)
            part.unlink()
        _write(file, lines)
        return {exit: {line["id"]: line["text"] for line in lines if line["exit"] == str(exit)} for exit in exits}

    importlib.import_module("edgesafe.certify.smoke").ask_all = in_parts  # type: ignore[attr-defined]
    if cores:
        os.sched_setaffinity(0, cores[:1])
    return edgesafe(["smoke", bundle])


def main(way: str, bundle: str, file: str, every: str, part: str = "0", parts: str = "1") -> int:
    """Write the lines; all of them, or one of so many parts."""
    if way == "smoke":
        return run_smoke(bundle, Path(file), int(every))
    # Uncertified too: on a board no certificate counts before smoke has passed there.
    with Session.open(bundle, allow_uncertified=True) as session:
        suite = suite_of(session)
        rows = suite.smoke_rows()[:: int(every)][int(part) :: int(parts)]
        _write(Path(file), ask(session, suite, rows, certified_exits(session.certificate), ""))
    return 0


def _helper(bundle: str, file: Path, every: int, part: int, cores: Sequence[int]) -> subprocess.Popen[bytes]:
    os.sched_setaffinity(0, {cores[part]})
    try:
        return subprocess.Popen([sys.executable, __file__, "ask", bundle, str(file), str(every), str(part), str(len(cores))])
    finally:
        os.sched_setaffinity(0, {cores[0]})


def _write(file: Path, lines: Lines) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _read(file: Path) -> Lines:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
