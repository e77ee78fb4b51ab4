"""Which rows a smoke run asks at which exits, and in which order where its time is limited."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from typing import TypeVar

from edgesafe.certify.ask import Answers, ask_all, check_prompts
from edgesafe.format.exits import Exit
from edgesafe.format.suite import CLASSES, Row, Suite
from edgesafe.progress import bar
from edgesafe.runtime.deadline import Clock
from edgesafe.runtime.session import Session

# So few rows show little: with 95 % confidence that at most 14 % of answers are other ones here. Fewer certify nothing.
LEAST_ROWS = 20
T = TypeVar("T")
Unit = tuple[Row, tuple[Exit, ...]]


def ask_in_time(
    session: Session,
    suite: Suite,
    subset: Sequence[Row],
    exits: Sequence[Exit],
    minutes: float,
    clock: Clock = time.perf_counter,
) -> Answers:
    """Greedy answers {exit: {row id: text}} of as many rows as fit into the time, and of one in any case.

    Args:
        session: the opened bundle.
        suite: its suite.
        subset: the rows that are asked first.
        exits: those that are certified, ascending.
        minutes: the time.
        clock: seconds of a clock that never goes back.

    Raises:
        InputError: a row's prompt can't be asked; said before any row is.
    """
    units = plan(suite, subset, exits, session.manifest.reference)
    check_prompts(session, suite, [row for row, _ in units], exits)
    answered: Answers = {exit: {} for exit in exits}
    for row, some in bar(_in_time(units, 60 * minutes, clock), label=f"smoke for {minutes:g} min: row"):
        for exit, texts in ask_all(session, suite, [row], some, "").items():
            answered[exit].update(texts)
    return answered


def plan(suite: Suite, subset: Sequence[Row], exits: Sequence[Exit], reference: Exit) -> list[Unit]:
    """Every row of the suite with the exits to ask it at, the most telling first.

    The subset comes first, at the reference exit (where that is certified, else the deepest) and the shallowest. Together they
    run nearly every graph. Then come the other exits, and last the suite's other rows at all exits.
    """
    first = tuple(sorted({reference if reference in exits else exits[-1], exits[0]}))
    later = tuple(exit for exit in exits if exit not in first)
    chosen = {row.id for row in subset}
    rest = [row for row in suite.counted if row.id not in chosen]
    units = [(row, first) for row in mixed(subset)]
    units += [(row, later) for row in mixed(subset) if later]
    return units + [(row, tuple(exits)) for row in mixed(rest)]


def mixed(rows: Sequence[Row]) -> list[Row]:
    """The rows with classes and families taking turns, so that a few of them speak for all.

    >>> rows = [Row(c + f + str(i), c, f, None, "p", "t", (), "t", True) for c, f in (("harmful", "a"), ("harmful", "b"),
    ...     ("task", "c")) for i in range(2)]
    >>> " ".join(row.id for row in mixed(rows))
    'harmfula0 taskc0 harmfulb0 taskc1 harmfula1 harmfulb1'
    """
    by_class = []
    for cls in CLASSES:
        own = [row for row in rows if row.cls == cls]
        by_class.append(_in_turns([[r for r in own if r.family == family] for family in dict.fromkeys(r.family for r in own)]))
    return _in_turns(by_class)


def _in_turns(lists: Sequence[Sequence[T]]) -> list[T]:
    return [one for one in chain.from_iterable(zip_longest(*lists)) if one is not None]


def _in_time(units: Sequence[Unit], seconds: float, clock: Clock) -> Iterator[Unit]:
    """The units, until the next one would take too long if each of its exits took as long as the slowest so far."""
    start, slowest = clock(), 0.0
    for unit in units:
        began = clock()
        if slowest and began - start + slowest * len(unit[1]) > seconds:
            return
        yield unit
        slowest = max(slowest, (clock() - began) / len(unit[1]))
