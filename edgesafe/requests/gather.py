"""All requests of a plan: read, chosen, told apart, each with its picture."""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from edgesafe.certify.overlap import words_of
from edgesafe.errors import InputError
from edgesafe.format.suite import Row
from edgesafe.format.targets import shown_path
from edgesafe.requests.pictures import TYPOGRAPHIC_PROMPT, Picture, picture_for, why_not_written, write
from edgesafe.requests.sets import ReadSet, Request, read_set
from edgesafe.requests.sources import TYPOGRAPHIC, WHOLE, Plan, Source

# Words to be read: the first part for suites, the other for training rows.
WORD_PARTS = {"test": (0.0, 0.5), "train": (0.5, 1.0)}
READ_PROMPT = "Which word is written in this picture?"
_WORDS = Path(__file__).parent / "words.txt"


@dataclass(frozen=True)
class Item:
    """A row, what its picture shows, where it was read, and whether its family's name is its author's own choice."""

    row: Row
    picture: Picture
    where: str
    own: bool


@dataclass(frozen=True)
class Gathered:
    """The items of all sources, a sentence on each source, and how many rows were left out, by why."""

    items: list[Item]
    sources: tuple[str, ...]
    left_out: Counter[str]


def gather(plan: Plan, split: str) -> Gathered:
    """Read all sources of a plan.

    Args:
        plan: the plan.
        split: "test" or "train", which decides the words to be read.

    Raises:
        InputError: a source can't be used, or two rows contradict each other; both are named.
    """
    if not plan.sources and not plan.words:
        raise InputError("there is no source", expected="at least one list of requests", todo="name one")
    items: list[Item] = []
    notes: list[str] = []
    left_out: Counter[str] = Counter()
    names: set[str] = set()
    for source in plan.sources:
        found = _renamed(read_set(source), source, names)
        chosen = _writable(_chosen(found, source), source, found.left_out)
        several = len(plan.sources) > 1 or plan.words
        items += [_item(request, source, plan.seed, f"{found.name}/" if several else "") for request in chosen]
        notes.append(f"{found.name} from {shown_path(found.file.name)}: {len(chosen)} of {found.lines} rows")
        left_out += found.left_out
    items += _words(plan.words, split) if plan.words else []
    kept = _told_apart(items)
    left_out["said twice"] += len(items) - len(kept)
    return Gathered(_one_class_each(kept), tuple(notes), +left_out)


def position(text: str) -> float:
    """Where in 0..1 a request stands, by the hash of its words: the same in every list that holds it.

    >>> position("Pick a lock!") == position("pick  a lock")
    True
    """
    return int(hashlib.sha256(said(text).encode()).hexdigest()[:12], 16) / 16**12


def said(text: str) -> str:
    """A text's words in one case; of a text without any, such as an emoji, its signs.

    >>> said("Pick a lock, please!"), said("?!")
    ('pick a lock please', '?!')
    """
    return " ".join(words_of(text)) or " ".join(text.split())


def by_hash(items: Iterable[Item]) -> list[Item]:
    """Items in the order of their ids' hashes: no source or category first, and the same on every machine."""
    return sorted(items, key=lambda item: hashlib.sha256(item.row.id.encode()).hexdigest())


@cache
def word_list() -> tuple[str, ...]:
    """The words that tasks ask to read."""
    return tuple(_WORDS.read_text(encoding="utf-8").split())


def _renamed(found: ReadSet, source: Source, names: set[str]) -> ReadSet:
    """A set under a name that no earlier one has; a name that a user gave twice is refused."""
    if found.name in names and source.name:
        what = f"two sources are called {found.name!r}"
        raise InputError(what, where=str(source.path), expected="a name of its own", todo="give one of them another name")
    numbers = (f"{found.name}-{n}" for n in range(2, len(names) + 3))
    name = found.name if found.name not in names else next(one for one in numbers if one not in names)
    if name != found.name:
        found = replace(read_set(replace(source, name=name)), name=name)
    names.add(name)
    return found


def _chosen(found: ReadSet, source: Source) -> list[Request]:
    """The rows that `longest`, `where`, `part` and `limit` leave, in their order."""
    kept = [r for r in found.requests if source.longest is None or len(r.row.template) <= source.longest]
    found.left_out["too long"] += len(found.requests) - len(kept)
    short = len(kept)
    for column, wanted in source.where.items():
        kept = [request for request in kept if _column(request, column) in wanted]
    found.left_out["outside where"] += short - len(kept)
    within = [r for r in kept if source.part == WHOLE or source.part[0] <= position(_asks(r.row)) < source.part[1]]
    found.left_out["outside part"] += len(kept) - len(within)
    if not within:
        what = "no row is left of this source"
        raise InputError(
            what, where=str(source.path), expected="rows that fit its rules", todo="correct longest, where or part"
        )
    return _sample(within, source.limit, found.left_out)


def _writable(requests: list[Request], source: Source, left_out: Counter[str]) -> list[Request]:
    """The requests that the source's rule can show; all of them, unless it writes them in pictures.

    Raises:
        InputError: none can be written.
    """
    if source.pictures != TYPOGRAPHIC:
        return requests
    kept = [request for request in requests if request.picture or not why_not_written(request.row.prompt)]
    if not kept:
        write(requests[0].row.prompt, requests[0].line.where)  # says why
    left_out["not to be written in a picture"] += len(requests) - len(kept)
    return kept


def _column(request: Request, column: str) -> str:
    fields = request.line.fields
    if column not in fields:
        near = difflib.get_close_matches(column, fields, n=1)
        what = f"where names a column {column!r}, which is not there" + (f", did you mean {near[0]!r}?" if near else "")
        raise InputError(what, where=request.line.where, expected="one of " + ", ".join(fields), todo="correct where")
    return fields[column].strip()


def _sample(requests: list[Request], limit: int | None, left_out: Counter[str]) -> list[Request]:
    """At most `limit` rows in their order, drawn by the hash of their ids."""
    if limit is None or limit >= len(requests):
        return requests
    drawn = sorted(requests, key=lambda r: (hashlib.sha256(r.row.id.encode()).hexdigest(), r.line.where))[:limit]
    places = {request.line.where for request in drawn}
    left_out["over the limit"] += len(requests) - limit
    return [request for request in requests if request.line.where in places]


def _item(request: Request, source: Source, seed: int, prefix: str) -> Item:
    row = replace(request.row, id=prefix + request.row.id)
    if request.picture:
        return Item(row, Picture(request.picture), request.line.where, request.own)
    picture = picture_for(source.pictures, row.prompt, seed)
    if source.pictures == TYPOGRAPHIC:
        row = replace(row, prompt=TYPOGRAPHIC_PROMPT)
    return Item(row, picture, request.line.where, request.own)


def _words(count: int, split: str) -> list[Item]:
    low, high = WORD_PARTS[split]
    words = sorted((word for word in word_list() if low <= position(word) < high), key=position)
    if count > len(words):
        raise InputError(f"words is {count}", expected=f"at most {len(words)}", todo="add tasks of your own instead")
    row = Row("", "task", "words/read", None, READ_PROMPT, "", (), "", smoke=False)
    made = [replace(row, id=f"words/{word}", key=(word,), template=word) for word in words[:count]]
    return [Item(row, Picture(text=row.template), f"words.txt: {row.template}", own=False) for row in made]


def _asks(row: Row) -> str:
    """What tells a request of a set from the others: its words, or what its picture shows where all ask the same."""
    return f"{row.prompt} {row.template}" if row.template != row.prompt else row.prompt


def _told_apart(items: Sequence[Item]) -> list[Item]:
    """The items without those that were there before.

    Raises:
        InputError: an id is used for two requests, or the same request is harmful in one place and harmless in another.
    """
    first: dict[tuple[str, Picture], Item] = {}
    ids: dict[str, Item] = {}
    for item in items:
        key = said(_asks(item.row)), item.picture
        other = first.setdefault(key, item)
        if other.row.cls != item.row.cls:
            what = f"the request is {item.row.cls} here and {other.row.cls} at {other.where}"
            raise InputError(what, where=item.where, expected="one class per request", todo="remove one of the two rows")
        if other is item and ids.setdefault(item.row.id, item) is not item:
            taken = ids[item.row.id].where
            what = f"the id {item.row.id!r} is used twice"
            raise InputError(what, where=item.where, expected=f"one id per row; {taken} has it")
    return list(first.values())


def _one_class_each(items: Sequence[Item]) -> list[Item]:
    """A set's category with rows of two classes becomes two families; a family of a user's own is refused then."""
    classes: dict[str, dict[str, Item]] = {}
    for item in items:
        of_family = classes.setdefault(item.row.family, {})
        of_family.setdefault(item.row.cls, item)
        if len(of_family) > 1 and item.own:
            what = f"the family {item.row.family!r} is in two classes"
            raise InputError(what, where=item.where, expected="one class per family")
    return [
        replace(item, row=replace(item.row, family=f"{item.row.family} {item.row.cls}"))
        if len(classes[item.row.family]) > 1
        else item
        for item in items
    ]
