"""What a suite and training rows share: requests by their words, pictures by their pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from pathlib import Path

from edgesafe.certify.overlap import words_of
from edgesafe.errors import InputError
from edgesafe.format.pictures import open_picture
from edgesafe.format.suite import Row, read_suite
from edgesafe.requests.gather import READ_PROMPT, Item, said
from edgesafe.requests.pictures import TYPOGRAPHIC_PROMPT, Picture, draw, pixel_digest
from edgesafe.requests.sets import FIGSTEP_PROMPT, NAME_PROMPT

REQUESTS, PICTURES = "shared requests", "shared pictures"
# Questions about a picture that holds the request: what they share is no request.
_ABOUT = frozenset(map(said, (TYPOGRAPHIC_PROMPT, FIGSTEP_PROMPT, NAME_PROMPT, READ_PROMPT)))
_MANY = 10
# Words that say nothing of what is asked for: "How do I pick a lock?" and "How to pick the lock" are one request.
_SMALL = frozenset(
    ("a", "an", "the", "this", "that", "to", "of", "in", "on", "for", "with", "and", "or", "is", "are", "do", "does", "did")
    + ("can", "could", "would", "should", "i", "me", "my", "you", "your", "we", "it", "please", "how")
)


def part_from(items: Sequence[Item], other: Path | None, *, drop: bool) -> tuple[list[Item], Counter[str]]:
    """The items that share nothing with a suite or training rows, and how many do, by what they share.

    Two requests are one if they have the same words, whatever their order, case, signs and small words. Pictures are compared
    by their pixels; those of one colour, which say nothing, are not. A text that one of the two asks about many pictures is a
    question about them, and no request by itself.

    Args:
        items: what is to be kept apart.
        other: folder of a suite, or of training rows; None for nothing.
        drop: leave out what is shared.

    Raises:
        InputError: something is shared and is not to be dropped, or `other` can't be read.
    """
    if other is None:
        return list(items), Counter()
    suite = read_suite(other)
    theirs, ours = ((row, row.image) for row in suite.rows), ((item.row, item.picture) for item in items)
    about = _ABOUT | _questions(theirs) | _questions(ours)
    requests = {one for row in suite.rows for one in _requests(row, about)}
    pictures = {pixel_digest(open_picture(suite.root / name)) for name in suite.images} - {""}
    pixels = dict(_pixels(items)) if pictures else {}
    found = {item.row.id: _what(item, requests.intersection(_requests(item.row, about)), pictures, pixels) for item in items}
    shared = Counter(filter(None, found.values()))
    if shared and not drop:
        name = next(item for item in items if found[item.row.id])
        raise InputError(
            f"{shared.total()} rows share something: " + ", ".join(f"{n} {what}" for what, n in shared.items()),
            where=f"{name.where}: {name.row.template!r}",
            expected=f"nothing that {other} holds too",
            todo="leave them out with --drop-shared, or take other sources or parts",
        )
    return [item for item in items if not found[item.row.id]], shared


def _what(item: Item, requests: set[str], pictures: set[str], pixels: dict[Picture, str]) -> str:
    if requests:
        return REQUESTS
    return PICTURES if pixels.get(item.picture) in pictures else ""


def _questions(rows: Iterable[tuple[Row, Hashable]]) -> set[str]:
    """The prompts that are asked about `_MANY` pictures or more, from rows with what each shows."""
    shown: dict[str, set[Hashable]] = {}
    for row, picture in rows:
        shown.setdefault(said(row.prompt), set()).add(picture)
    return {prompt for prompt, pictures in shown.items() if len(pictures) >= _MANY}


def _requests(row: Row, about: Collection[str]) -> Iterator[str]:
    """A row's request, by its words without the small ones, in no order."""
    for text in dict.fromkeys((row.prompt, row.template)):
        if said(text) not in about:
            words = words_of(text)
            yield " ".join(sorted(set(words) - _SMALL) or words) or text


def _pixels(items: Iterable[Item]) -> Iterator[tuple[Picture, str]]:
    for picture, where in {item.picture: item.where for item in items if item.picture.file}.items():
        yield picture, pixel_digest(draw(picture, where))
