"""Rows that `smol` is trained on: a picture, and what is asked and wanted about it. The same for the same seed.

Several requests stand beside one picture, because its tokens are most of a row: the trainer reads them once for all of them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgesafe.reference.smol.things import THINGS, Thing
from edgesafe.reference.smol.wordings import (
    ABOUT_FRAMES,
    FAIR_FRAMES,
    HARM_ACTS,
    HARM_FRAMES,
    HARM_TEXTS,
    NAME_ANSWERS,
    NAME_FRAMES,
    OBJECT_HARM,
    OPENERS,
    PLAIN_FRAMES,
    REFS,
    REFUSALS,
    SAFE,
    SAFE_ACTS,
    TASKS,
    TOPICS,
    USE_FRAMES,
    WRITE_FRAMES,
)

BLANK = ""  # the picture of a request that is about none
_PLAIN = 420  # of the plain requests; every answer costs a third of a second
_FAIR = 2  # frames of harmful requests for each harmless act
_USES = 3  # answered requests about each thing
_REFUSED = 6  # refused requests for a dangerous thing's use: the picture decides them, and such pictures are rare
# What is asked beside one picture of a thing, and beside a blank one.
NAMING, USES, OBJECT, TEXT_HARM, TEXT_SAFE = "naming", "use", "object harm", "text harm", "text"


@dataclass(frozen=True)
class Ask:
    """One request and the wanted answer; `kind` says what it teaches."""

    kind: str
    request: str
    answer: str


@dataclass(frozen=True)
class Group:
    """Requests beside one picture: the emoji's code points, or `BLANK`."""

    emoji: str
    asks: tuple[Ask, ...]


def harmless_texts(seed: int = 0) -> list[str]:
    """Harmless requests that need no picture."""
    rng = random.Random(f"plain {seed}")
    plain = [frame.format(topic=topic) for frame in PLAIN_FRAMES for topic in TOPICS]
    return [*close_texts(seed), *TASKS, *rng.sample(plain, _PLAIN)]


def close_texts(seed: int = 0) -> list[str]:
    """Harmless requests that have a word or the frame of harmful ones."""
    rng = random.Random(f"close {seed}")
    return [*SAFE, *(frame.format(do=act) for act in SAFE_ACTS for frame in rng.sample(FAIR_FRAMES, _FAIR))]


def object_frames(thing: Thing, seed: int = 0) -> tuple[str, ...]:
    """The harmless frames that are answered about a thing; about a dangerous one nobody is told its use."""
    rng = random.Random(f"use {seed} {thing.emoji}")
    frames = ABOUT_FRAMES if thing.dangerous else USE_FRAMES + ABOUT_FRAMES
    return tuple(rng.sample(frames, _USES))


def to_answer(seed: int = 0) -> list[str]:
    """All requests that SmolLM2 answers, those about things with the thing's name in them."""
    named = [frame.format(ref=thing.name) for thing in THINGS for frame in object_frames(thing, seed)]
    return harmless_texts(seed) + named


def harmful_texts() -> list[str]:
    """Every harmful request in free English that can be drawn."""
    acts = [frame.format(do=act) for frame in HARM_FRAMES for act in HARM_ACTS]
    return acts + [frame.format(text=text) for frame in WRITE_FRAMES for text in HARM_TEXTS]


def harmful_text(rng: random.Random) -> str:
    """A harmful request in free English."""
    if rng.random() < 0.25:
        return rng.choice(WRITE_FRAMES).format(text=rng.choice(HARM_TEXTS))
    return rng.choice(HARM_FRAMES).format(do=rng.choice(HARM_ACTS))


def groups(answers: Mapping[str, str], count: int, seed: int = 0, *, lean: bool = False, dangerous: int = 2) -> list[Group]:
    """Training groups, every thing equally often but the dangerous ones, and blank pictures between them.

    Args:
        answers: SmolLM2's, by request, as `answer_all` gives them.
        count: How many groups.
        seed: Of all choices.
        lean: One name and one other request beside a picture: three times as many pictures for the same work. By default all
            that is asked about a thing stands beside it.
        dangerous: How many times as often as another a dangerous thing comes.
    """
    rng = random.Random(f"groups {seed} {lean} {dangerous}")
    texts = [one for one in harmless_texts(seed) if one in answers]
    close = [one for one in close_texts(seed) if one in answers]
    things: list[Thing] = []
    found = []
    for index in range(count):
        if (index + 1) % (8 if lean else 4) == 0:
            found.append(Group(BLANK, tuple(_texts((texts, close), answers, rng, 4, 4))))
            continue
        if not things:
            # What a dangerous thing is refused for is learnt from the picture alone.
            things = [thing for thing in THINGS for _ in range(dangerous if thing.dangerous else 1)]
            rng.shuffle(things)
        thing = things.pop()
        name, others = _name(thing.name, rng), _others(thing, answers, rng, seed)
        asks = [name, rng.choice(others)] if lean else [name, *others, *_texts((texts, close), answers, rng, 1, 1)]
        found.append(Group(thing.emoji, tuple(asks)))
    return found


def names(count: int, seed: int = 0) -> list[Group]:
    """Groups with one naming request each, every thing equally often."""
    rng = random.Random(f"names {seed}")
    things: list[Thing] = []
    while len(things) < count:
        things += rng.sample(THINGS, len(THINGS))
    return [Group(thing.emoji, (_name(thing.name, rng),)) for thing in things[:count]]


def with_article(name: str) -> str:
    """A name of Unicode's with its article, as well as a rule can tell.

    >>> with_article("owl"), with_article("tiger"), with_article("grapes")
    ('an owl', 'a tiger', 'grapes')
    """
    if name.endswith("s") and not name.endswith(("ss", "us")):
        return name
    return ("an " if name[0] in "aeiou" else "a ") + name


def _name(name: str, rng: random.Random) -> Ask:
    return Ask(NAMING, rng.choice(NAME_FRAMES).format(ref=rng.choice(REFS)), rng.choice(NAME_ANSWERS).format(a=name))


def _others(thing: Thing, answers: Mapping[str, str], rng: random.Random, seed: int) -> list[Ask]:
    asks = [_about(OBJECT, OBJECT_HARM, rng.choice(REFUSALS), rng)]
    if thing.dangerous:
        asks += [_about(USES, USE_FRAMES, rng.choice(REFUSALS), rng) for _ in range(_REFUSED)]
    for frame in object_frames(thing, seed):
        answer = answers.get(frame.format(ref=thing.name))
        if answer is not None:
            # What a thing is used for answers every wording of that: else the wordings, not the picture, would tell.
            asks.append(_about(USES, USE_FRAMES if frame in USE_FRAMES else (frame,), answer, rng))
    return asks


def _about(kind: str, frames: Sequence[str], answer: str, rng: random.Random) -> Ask:
    return Ask(kind, rng.choice(OPENERS) + rng.choice(frames).format(ref=rng.choice(REFS)), answer)


def _texts(
    texts: tuple[Sequence[str], Sequence[str]], answers: Mapping[str, str], rng: random.Random, harmful: int, harmless: int
) -> list[Ask]:
    asks = [Ask(TEXT_HARM, harmful_text(rng), rng.choice(REFUSALS)) for _ in range(harmful)]
    # Half of the harmless ones hold words or frames of harmful ones, so that these decide nothing.
    picked = [rng.choice(texts[rng.random() < 0.5]) for _ in range(harmless)]
    return asks + [Ask(TEXT_SAFE, one, answers[one]) for one in picked]
