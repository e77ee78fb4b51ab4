"""The tokens of every answer to the suite's rows for devices, at every certified exit, one JSON line each.

On a board, with nothing but the wheel beside it, these are the very answers that `edgesafe smoke` judges there:

  python answers.py smoke BUNDLE FILE     # runs the command and ends with its code
  python answers.py ask BUNDLE FILE       # asks the same questions without judging the answers or keeping a record
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from edgesafe import Session
from edgesafe.certify.certify import ask_all, suite_of
from edgesafe.cli import main as edgesafe
from edgesafe.format.certificate import certified_exits


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


def main(way: str, bundle: str, file: str) -> int:
    """Write the lines."""
    # Uncertified too: on a board no certificate counts before smoke has passed there.
    with Session.open(bundle, allow_uncertified=True) as session, recorded() as answered:
        suite, exits = suite_of(session), certified_exits(session.certificate)
        rows = suite.smoke_rows()
        code = edgesafe(["smoke", bundle]) if way == "smoke" else 0
        if way != "smoke":
            ask_all(session, suite, rows, exits, "")
    # Both ask row by row, and each row at one exit after the other.
    asked = list(product(rows, exits))
    if len(answered) == len(asked):
        lines = zip(asked, answered, strict=True)
        text = [json.dumps({"exit": str(exit), "id": row.id, "tokens": tokens}) for (row, exit), tokens in lines]
        Path(file).write_text("\n".join(text) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
