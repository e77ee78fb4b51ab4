"""Timed step lines, bars and tables. Progress goes to stderr, so that stdout holds results alone.

Of several processes of one run (`torchrun`, `accelerate launch`) the first one alone says anything.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_EVERY_S = 5.0
_REDRAW_S = 0.1
_WIDTH = 28


def speaks() -> bool:
    """Whether this is the process of a run that prints: the first one, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print the title now and how long the block took when it ends, whether it ended well or not."""
    if not speaks():
        yield
        return
    start = time.perf_counter()
    print(f"> {title}", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        print(f"x {title} failed after {clock(time.perf_counter() - start)}", file=sys.stderr, flush=True)
        raise
    print(f"+ {title} took {clock(time.perf_counter() - start)}", file=sys.stderr, flush=True)


def bar(
    iterable: Iterable[T], total: int | None = None, label: str = "", *, sizes: Sequence[float] | None = None
) -> Iterator[T]:
    """Pass the items through and show how far it is: a bar on a terminal, a line every 5 s elsewhere.

    The first item already says how much time is left, where that is more than a moment.

    ``sizes`` says how much work each item is, for the time left; by default all are alike.
    """
    if not speaks():
        yield from iterable
        return
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    terminal = sys.stderr.isatty()
    start = shown = time.perf_counter()
    done = 0
    for item in iterable:
        yield item
        done += 1
        now, share = time.perf_counter(), _share(done, total, sizes)
        long = done == 1 and 0 < share < 1 and _left(now - start, share) >= _EVERY_S
        if long or now - shown >= (_REDRAW_S if terminal else _EVERY_S):
            shown = now
            _show(label, done, total, share, now - start, terminal)
    _show(label, done, total, _share(done, total, sizes), time.perf_counter() - start, terminal)
    if terminal:
        print(file=sys.stderr, flush=True)


def _share(done: int, total: int | None, sizes: Sequence[float] | None) -> float:
    """How much of the work is done, 0..1.

    >>> _share(1, 4, None), _share(1, 3, (6, 1, 1)), _share(5, None, None)
    (0.25, 0.75, 0.0)
    """
    if not total:
        return 0.0
    return sum(sizes[:done]) / (sum(sizes) or 1.0) if sizes else done / total


def _left(seconds: float, share: float) -> float:
    """Seconds that the rest takes, where a share of the work took `seconds`."""
    return seconds / share * (1 - share)


def _show(label: str, done: int, total: int | None, share: float, seconds: float, terminal: bool) -> None:
    count = f"{done}/{total}" if total else str(done)
    left = f", {clock(_left(seconds, share))} left" if 0 < share < 1 else ""
    text = f"{label} {count} in {clock(seconds)}{left}".strip()
    if terminal:
        full = int(_WIDTH * share)
        drawn = f"[{'#' * full}{'.' * (_WIDTH - full)}] " if total else ""
        print(f"\r\x1b[K{drawn}{text}", end="", file=sys.stderr, flush=True)
    else:
        print(f"  {text}", file=sys.stderr, flush=True)


def table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """Rows as aligned text: numbers to the right, everything else to the left, no trailing newline.

    >>> print(table([[1, "passed"], [11, "failed"]], ["exit", "verdict"]))
    exit  verdict
    ----  -------
       1  passed
      11  failed
    """
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max([len(head)] + [len(row[i]) for row in cells]) for i, head in enumerate(headers)]
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(headers))]
    lines = [list(headers), ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _is_number(value: object) -> bool:
    if isinstance(value, str | bool):
        return False
    # An exit is not a number to Python, but it is one to whoever reads the table.
    return value is None or isinstance(value, int | float) or str(value).isdecimal()


def clock(seconds: float) -> str:
    """Seconds as people say them.

    >>> clock(0.31), clock(75), clock(3700)
    ('0.3 s', '1 min 15 s', '1 h 01 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
