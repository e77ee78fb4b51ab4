"""Two machines' answers side by side, token by token. Plain functions of lines."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import zip_longest

from edgesafe.errors import DeviceError


@dataclass(frozen=True)
class Difference:
    """An answer whose tokens are not the same, and the first place where they part."""

    exit: str
    id: str
    place: int
    host: int | None
    board: int | None


def differences(host: str, board: str) -> tuple[int, list[Difference]]:
    """How many answers were compared, and those that differ.

    Args:
        host: The lines that `edgesafe_boards.answers` wrote on this machine.
        board: Those of the board.

    Raises:
        DeviceError: They are not answers to the same questions, so that some were not compared.

    >>> a = '{"exit": "6", "id": "r1", "tokens": [5, 7, 2]}'
    >>> differences(a, a.replace("7", "8"))
    (1, [Difference(exit='6', id='r1', place=1, host=7, board=8)])
    """
    mine, theirs = _answers(host), _answers(board)
    if not mine or mine.keys() != theirs.keys():
        raise DeviceError(
            f"the board answered {len(theirs)} questions, and {len(mine.keys() & theirs.keys())} of this machine's {len(mine)}",
            where="comparing answers",
            expected="an answer to each",
            todo="look at the log of the answers",
        )
    found = []
    for (exit, row), tokens in mine.items():
        pairs = enumerate(zip_longest(tokens, theirs[exit, row]))
        parted = next(((place, *pair) for place, pair in pairs if pair[0] != pair[1]), None)
        found += [Difference(exit, row, *parted)] if parted else []
    return len(mine), found


def digest(found: list[Difference]) -> str:
    """The sha256 of the list, by which two runs' differences are told apart."""
    return hashlib.sha256(json.dumps([asdict(one) for one in found], sort_keys=True).encode()).hexdigest()


def _answers(lines: str) -> dict[tuple[str, str], list[int]]:
    objs = [json.loads(line) for line in lines.splitlines() if line.strip()]
    return {(obj["exit"], obj["id"]): obj["tokens"] for obj in objs}
