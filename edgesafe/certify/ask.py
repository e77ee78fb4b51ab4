"""A suite put to a bundle, by as many sessions at once as pays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby, product
from queue import SimpleQueue
from threading import Event

from edgesafe.errors import InputError
from edgesafe.format.exits import Exit
from edgesafe.format.suite import MAX_NEW_TOKENS, Row, Suite
from edgesafe.machine import host_cores
from edgesafe.progress import bar
from edgesafe.runtime.sampling import GREEDY, Sampling
from edgesafe.runtime.session import Session
from edgesafe.runtime.tokenizer import encode_prompt

# Answers by exit and row id.
Answers = dict[Exit, dict[str, str]]
# Rows with one picture, each with its place among all rows.
Part = list[tuple[int, Row]]

_ROWS = 16  # of one picture that one of several sessions takes at a time
_MEMORY = 2**30  # bytes of bundles that may be open at once; one always may


def sessions_at_once(size: int, rows: int) -> int:
    """How many sessions answer a suite of so many rows fastest: of a small bundle one a core, of a large one a single one.

    A small model's graphs are too short for two threads: a second one gains a tenth, a second session much more.

    Args:
        size: Bytes of the bundle.
        rows: Of the suite; there are no more sessions than there is work for.
    """
    return max(1, min(host_cores(), _MEMORY // max(1, size), -(-rows // _ROWS)))


def side_by_side(session: Session, suite: Suite) -> list[Session]:
    """What a suite is put to: the session, or where several are faster, these of one thread each; it is closed then."""
    count = sessions_at_once(sum(spec.bytes for spec in session.manifest.files.values()), len(suite.rows))
    if count == 1:
        return [session]
    session.close()
    return [Session(session.bundle, None, threads=1, allow_uncertified=True) for _ in range(count)]


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
        session: One, or several of the same bundle, which share the rows.
        suite: Where the pictures are.
        rows: What is asked.
        exits: Who answers.
        label: Of the bar; "" = none.
        sampling: How a row's tokens are picked, by its place among the rows; by default greedily.

    Raises:
        InputError: A row's prompt can't be asked; said before any row is.
    """
    sessions, exits, stop = [session] if isinstance(session, Session) else list(session), tuple(exits), Event()
    check_prompts(sessions[0], suite, rows, exits)

    def ask(mine: Session, part: Part) -> Answers:
        path = suite.image_path(part[0][1])
        features, cuts = mine.vision_states(path, exits), {exit: mine.cut(path, exit) for exit in exits}
        said: Answers = {exit: {} for exit in exits}
        for (place, row), exit in product(part, exits):
            if stop.is_set():
                break
            asked = (features[exit], row.prompt, MAX_NEW_TOKENS, cuts[exit], sampling(place))
            said[exit][row.id] = mine.answer_features(*asked)
        return said

    parts = _parts(rows, _ROWS if len(sessions) > 1 else len(rows))
    done = _at_once(sessions, ask, parts, stop) if len(sessions) > 1 else map(partial(ask, sessions[0]), parts)
    answered: Answers = {exit: {} for exit in exits}
    for some in bar(done, len(parts), label, sizes=list(map(len, parts))) if label else done:
        for exit in exits:
            answered[exit] |= some[exit]
    return answered


def _parts(rows: Sequence[Row], most: int) -> list[Part]:
    """The rows with their places, those of one picture together, but no more than so many; such rows stand side by side."""
    pictures = [list(some) for _, some in groupby(enumerate(rows), key=lambda placed: placed[1].image)]
    return [some[i : i + most] for some in pictures for i in range(0, len(some), most)]


def _at_once(
    sessions: Sequence[Session], ask: Callable[[Session, Part], Answers], parts: Sequence[Part], stop: Event
) -> Iterator[Answers]:
    """Each part's answers, in order; a fault in any, or Ctrl-C, ends all of them after the answer that is being given."""
    free: SimpleQueue[Session] = SimpleQueue()
    for session in sessions:
        free.put(session)

    def take(part: Part) -> Answers:
        mine = free.get()
        try:
            return ask(mine, part)
        except BaseException:
            stop.set()
            raise
        finally:
            free.put(mine)

    with ThreadPoolExecutor(len(sessions)) as pool:
        try:
            yield from pool.map(take, parts)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


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
