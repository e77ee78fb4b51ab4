"""A suite put to a bundle, by as many sessions at once as pays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from queue import SimpleQueue

from edgesafe.errors import InputError
from edgesafe.format.bundle import Bundle
from edgesafe.format.exits import Exit
from edgesafe.format.suite import MAX_NEW_TOKENS, Row, Suite
from edgesafe.machine import host_cores
from edgesafe.progress import bar
from edgesafe.runtime.engine import Engine
from edgesafe.runtime.sampling import GREEDY, Sampling
from edgesafe.runtime.session import Session
from edgesafe.runtime.tokenizer import encode_prompt

# Answers by exit and row id.
Answers = dict[Exit, dict[str, str]]

_MEMORY = 2**30  # bytes of bundles that may be open at once; one always may


def open_sessions(bundle: Bundle, engine: Engine | None) -> list[Session]:
    """Sessions that answer a suite fastest together: of a small bundle one a core with one thread each, else one with all.

    A small model's graphs are too short for two threads: a second one gains a tenth, a second session nearly all. An engine
    that a caller brings gets one session, as nobody knows whether it can have more.
    """
    size = sum(spec.bytes for spec in bundle.manifest.files.values())
    count = 1 if engine else max(1, min(host_cores(), _MEMORY // max(1, size)))
    threads = 1 if count > 1 else None
    return [Session.open(bundle.root, threads=threads, allow_uncertified=True, engine=engine) for _ in range(count)]


def ask_all(
    session: Session | Sequence[Session],
    suite: Suite,
    rows: Sequence[Row],
    exits: Iterable[Exit],
    label: str,
    sampling: Callable[[int], Sampling] = lambda _: GREEDY,
) -> Answers:
    """Answers {exit: {row id: text}}, as long as `ask` gives by default; shared segments run once per picture.

    Args:
        session: One, or several of the same bundle, which share the pictures.
        suite: Where the pictures are.
        rows: What is asked.
        exits: Who answers.
        label: Of the bar; "" = none.
        sampling: How a row's tokens are picked, by its place among the rows; by default greedily.

    Raises:
        InputError: A row's prompt can't be asked; said before any row is.
    """
    sessions, exits = [session] if isinstance(session, Session) else list(session), tuple(exits)
    check_prompts(sessions[0], suite, rows, exits)
    # Rows of one picture stand next to each other where a suite asks several things about it.
    pictures = [list(some) for _, some in groupby(enumerate(rows), key=lambda placed: placed[1].image)]
    free: SimpleQueue[Session] = SimpleQueue()
    for one in sessions:
        free.put(one)

    def ask(placed: Sequence[tuple[int, Row]]) -> Answers:
        mine = free.get()
        try:
            return _ask_one_picture(mine, suite, placed, exits, sampling)
        finally:
            free.put(mine)

    answered: Answers = {exit: {} for exit in exits}
    with ThreadPoolExecutor(len(sessions)) as pool:
        try:
            asked = pool.map(ask, pictures)
            for some in bar(asked, len(pictures), label, sizes=list(map(len, pictures))) if label else asked:
                for exit in exits:
                    answered[exit] |= some[exit]
        except BaseException:
            pool.shutdown(cancel_futures=True)  # a fault, or Ctrl-C, doesn't wait for the rest of the suite
            raise
    return answered


def _ask_one_picture(
    session: Session,
    suite: Suite,
    placed: Sequence[tuple[int, Row]],
    exits: Sequence[Exit],
    sampling: Callable[[int], Sampling],
) -> Answers:
    """The answers to rows with one picture, each with its place among all rows."""
    path = suite.image_path(placed[0][1])
    features, cuts = session.vision_states(path, exits), {exit: session.cut(path, exit) for exit in exits}
    return {
        exit: {
            row.id: session.answer_features(features[exit], row.prompt, MAX_NEW_TOKENS, cuts[exit], sampling(place))
            for place, row in placed
        }
        for exit in exits
    }


def check_prompts(session: Session, suite: Suite, rows: Sequence[Row], exits: Iterable[Exit]) -> None:
    """Refuse a row that can't be asked at one of these exits, with its picture cut as there.

    Raises:
        InputError: There is one; it is named.
    """
    kinds = {exit.fewer: exit for exit in map(Exit.of, exits)}.values()
    for row in rows:
        try:
            for exit in kinds:
                cut = session.cut(suite.image_path(row), exit)
                encode_prompt(session.tokenizer, session.manifest, row.prompt, cut, exit)
        except InputError as error:
            todo = "take the row out of the suite and export again"
            raise InputError(error.what, where=f"row {row.id} of the suite", expected=error.expected, todo=todo) from error
