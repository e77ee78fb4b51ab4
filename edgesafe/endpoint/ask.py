"""Asking the rows of a suite: in parallel, at a pace, several tries each, every answer kept as it comes."""

from __future__ import annotations

import base64
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from edgesafe.endpoint.client import Again, Client
from edgesafe.endpoint.kept import Kept, Run
from edgesafe.endpoint.local_guard import LocalGuard
from edgesafe.endpoint.pace import Pace, Stopped
from edgesafe.endpoint.reply import Said
from edgesafe.errors import EdgesafeError
from edgesafe.format.suite import MAX_NEW_TOKENS, Row, Suite
from edgesafe.progress import bar, clock, speaks

TRIES = 6
FIRST_WAIT_S = 1.0  # doubled from try to try: 31 s in all
PATIENCE_S = 300.0  # a row that the server puts off longer ends the run, which continues another time
_LEAST_PAUSE_S = 1.0


@dataclass(frozen=True)
class Asked:
    """What each request holds beside the row's prompt and picture.

    ``system`` is the text of a system message, or empty. ``extra`` are more fields of the API; one that is None is left out.
    """

    model: str
    max_tokens: int = MAX_NEW_TOKENS
    system: str = ""
    pictures: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self, suite: Suite, row: Row) -> dict[str, Any]:
        """A row as the API's fields: greedy, one turn, the picture before the question."""
        content: Any = row.prompt
        if self.pictures and row.image is not None:
            data = base64.b64encode(suite.image_path(row).read_bytes()).decode()
            picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
            content = [picture, {"type": "text", "text": row.prompt}]
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": content})
        fields = {"model": self.model, "messages": messages, "max_tokens": self.max_tokens, "temperature": 0, **self.extra}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Way:
    """How requests are sent: so many at once, so many a minute at most (None: no limit)."""

    parallel: int = 1
    per_minute: float | None = None


def ask_all(
    client: Client | LocalGuard, run: Run, ids: Sequence[str], body: Callable[[str], dict[str, Any]], way: Way, label: str
) -> None:
    """Ask what has no answer yet, and keep each answer as it comes.

    The first goes alone: a wrong address, key or model is said after one request, and its time tells how long the rest takes.

    Args:
        client: The server.
        run: Where answers are kept, by their ids.
        ids: What is asked, each once.
        body: The request of an id, as the API's fields.
        way: How fast.
        label: What the progress calls it.

    Raises:
        EndpointError: The server refuses, or gives no usable reply; what was answered until then is kept.
    """
    left = [name for name in ids if name not in run.kept]
    if not left:
        return
    pace = Pace(way.per_minute)

    def answer(name: str) -> Kept:
        began = time.monotonic()
        said = _insist(lambda: client.chat(body(name)), pace, name)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        return Kept(name, *said, at=at, seconds=round(time.monotonic() - began, 3))

    try:
        for one in bar(_answers(left, answer, way.parallel, pace, client), len(left), label):
            run.add(one)
            if one.id == left[0]:
                _tell_time(one.seconds, len(left) - 1, way)
    except EdgesafeError as error:
        todo = f"{error.todo}; then the same command continues" if error.todo else "the same command continues"
        where = f"{error.where}; {len(run.kept.keys() & set(ids))} of {len(ids)} answers are kept in {run.folder}"
        raise type(error)(error.what, where=where, expected=error.expected, todo=todo) from error
    finally:
        pace.stop()
        client.close()


def _answers(
    ids: Sequence[str], answer: Callable[[str], Kept], parallel: int, pace: Pace, client: Client | LocalGuard
) -> Iterator[Kept]:
    """The answers as they come, the first one before any other is asked; the first error only after those on their way."""
    yield answer(ids[0])
    failed: EdgesafeError | None = None
    with ThreadPoolExecutor(parallel, "ask") as pool:
        try:
            for future in as_completed([pool.submit(answer, name) for name in ids[1:]]):
                error = future.exception()
                if error is None:
                    yield future.result()
                elif isinstance(error, EdgesafeError):
                    failed = failed or error
                    pace.stop()
                elif not isinstance(error, Stopped):
                    raise error
        except BaseException:  # Ctrl-C waits for no reply
            pace.stop()
            client.close()
            raise
    if failed:
        raise failed


def _insist(send: Callable[[], Said], pace: Pace, name: str) -> Said:
    """Send until there is an answer. Where the server says when to come back, only the time counts, not the tries.

    Raises:
        EndpointError: None is to be had; it names the row.
        Stopped: The run ends.
    """
    tries, waited = 0, 0.0
    while True:
        pace.turn()
        tries += 1
        try:
            return send()
        except Again as again:
            if again.after_s is not None:
                waited += (pause := max(again.after_s, _LEAST_PAUSE_S))
                if waited > PATIENCE_S:
                    raise _named(again.error, name, tries, again.after_s) from again
                pace.pause(pause)
                tries -= 1
            elif tries >= TRIES:
                raise _named(again.error, name, tries) from again
            else:
                pace.wait(FIRST_WAIT_S * 2 ** (tries - 1))
        except EdgesafeError as error:
            raise _named(error, name) from error


def _named(error: EdgesafeError, name: str, tries: int = 1, after_s: float | None = None) -> EdgesafeError:
    """The error with its row, how often it was tried, and for how long the server wants to be left alone."""
    what = error.what + (f", {tries} times" if tries > 1 else "")
    what += f", and asks to wait {clock(after_s)}" if after_s is not None else ""
    return type(error)(what, where=f"{error.where}, row {name}", expected=error.expected, todo=error.todo)


def plan_text(suite: Suite, rows: Sequence[Row], left: Sequence[Row], asked: Asked, way: Way) -> str:
    """What will be sent, before it is: requests, what they may cost, and the least time if a pace is set."""
    shown = [row for row in left if asked.pictures and row.image is not None]
    size = sum(suite.image_path(row).stat().st_size for row in shown) / 2**20
    letters = sum(len(row.prompt) + len(asked.system) for row in left)
    kept = f" ({len(rows) - len(left)} of {len(rows)} are answered already)" if len(left) < len(rows) else ""
    pictures = f"{len(shown)} with a picture, {size:.1f} MiB together" if shown else "without pictures"
    lines = [
        f"{len(left)} requests{kept}, {pictures}; {letters:,} characters of text, about {letters // 4:,} tokens",
        f"answers of at most {asked.max_tokens} tokens each, {asked.max_tokens * len(left):,} together",
    ]
    if way.per_minute:
        lines.append(f"at {way.per_minute:g} a minute, at least {clock(60 * max(0, len(left) - 1) / way.per_minute)}")
    return "\n".join(lines)


def _tell_time(seconds: float, left: int, way: Way) -> None:
    if left and speaks():
        pace = 60 / way.per_minute if way.per_minute else 0.0
        rest = clock(left * max(seconds / way.parallel, pace))
        print(f"first answer after {clock(seconds)}: about {rest} for the other {left}", file=sys.stderr, flush=True)
