"""What a board is asked to do once edgesafe is installed there: measure, smoke, the wheel's tests, and answers to compare."""

from __future__ import annotations

import time
from dataclasses import dataclass

from edgesafe.errors import CertificationFailedError
from edgesafe_boards.facts import FOLDER
from edgesafe_boards.install import EDGESAFE, PYTHON
from edgesafe_boards.shell import Shell

FAILED = CertificationFailedError.exit_code
ANSWERS = "answers.jsonl"
_PYTEST_FAILED = 1


@dataclass(frozen=True)
class Outcome:
    """What a task gave: the code that it ended with, what it printed, and how long it took."""

    code: int
    text: str
    seconds: float


def measure(shell: Shell, prefix: tuple[str, ...] = (), show: bool = False, seconds: float | None = None) -> Outcome:
    """`edgesafe measure` on the board."""
    words = f"{EDGESAFE} measure bundle" + (f" --seconds {seconds:g}" if seconds else "")
    return _run(shell, words, "edgesafe measure", prefix, show)


def smoke(shell: Shell, prefix: tuple[str, ...] = (), show: bool = False) -> Outcome:
    """`edgesafe smoke` on the board; its verdict may be a failure."""
    return _run(shell, f"{EDGESAFE} smoke bundle", "edgesafe smoke", prefix, show, (0, FAILED))


def smoke_by_token(shell: Shell, every: int) -> Outcome:
    """The same on every so many-th row; the tokens of the answers that it judges are in ``ANSWERS`` on the board."""
    words = f"{PYTHON} tests/answers.py smoke bundle {ANSWERS} {every}"
    return _run(shell, words, "edgesafe smoke", (), True, (0, FAILED))


def tests(shell: Shell, prefix: tuple[str, ...] = (), show: bool = False) -> Outcome:
    """The wheel's tests on the board; some may fail."""
    words = f"cd tests && PYTHONPATH=$HOME/{FOLDER}/tests ../{PYTHON} -m pytest ."
    return _run(shell, words, "the wheel's tests", prefix, show, (0, _PYTEST_FAILED))


def _run(shell: Shell, words: str, what: str, prefix: tuple[str, ...], show: bool, may_end: tuple[int, ...] = (0,)) -> Outcome:
    start = time.perf_counter()
    done = shell.run(f"cd {FOLDER} && {words}", what, may_end=may_end, show=show, prefix=prefix)
    return Outcome(done.code, done.text.strip(), time.perf_counter() - start)
