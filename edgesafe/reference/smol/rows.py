"""Rows that `smol` is trained on: a picture, and what is asked and wanted about it. The same for the same seed.

Several requests stand beside one picture, because its tokens are most of a row: the trainer reads them once for all of them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgesafe.reference.smol.harm import FAIR_FRAMES, HARM_ACTS, HARM_FRAMES, HARM_TEXTS, WRITE_FRAMES
from edgesafe.reference.smol.things import THINGS, Thing
from edgesafe.reference.smol.wordings import (
    ABOUT_FRAMES,
    MORE_USES,
    NAME_ANSWERS,
    NAME_FRAMES,
    OBJECT_HARM,
    OPENERS,
    PLAIN_FRAMES,
    QUESTIONS,
    REFS,
    REFUSALS,
    SAFE,
    SAFE_ACTS,
    SITUATIONS,
    TASKS,
    TOPICS,
    USE_ANSWERED,
    USE_BEGINS,
    USE_FRAMES,
)

BLANK = ""  # the picture of a request that is about none
_PLAIN = 420  # of the plain requests; every answer costs a third of a second
_FAIR = 2  # frames of harmful requests for each harmless act
_USES = 3  # requests for a thing's use where all that is asked about it stands beside its picture
# Every wording that asks for a thing's use beside its picture.
USES_ASKED = (*USE_FRAMES, *MORE_USES, *(f"{told} {asked}" for told in SITUATIONS for asked in QUESTIONS))
# What is asked beside one picture of a thing, and beside a blank one.
NAMING, USES, OBJECT, TEXT_HARM, TEXT_SAFE = "naming", "use", "object harm", "text harm", "text"
HARM = (OBJECT, TEXT_HARM)


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


def harmless_texts() -> list[str]:
    """Harmless requests that need no picture; the same in every run, for SmolLM2 answers them once."""
    rng = random.Random("plain 0")
    plain = [frame.format(topic=topic) for frame in PLAIN_FRAMES for topic in TOPICS]
    return [*close_texts(), *TASKS, *rng.sample(plain, _PLAIN)]


def close_texts() -> list[str]:
    """Harmless requests that have a word or the frame of harmful ones."""
    rng = random.Random("close 0")
    return [*SAFE, *(frame.format(do=act) for act in SAFE_ACTS for frame in rng.sample(FAIR_FRAMES, _FAIR))]


def use_begins() -> dict[str, str]:
    """Requests for the use of harmless things, by name, and how each answer begins.

    Refusals have few beginnings. If answers had many, the likeliest first token would be a refusal's where refusing is not the
    likelier thing to do.
    """
    harmless = [thing for thing in THINGS if not thing.dangerous]
    return {frame.format(ref=thing.name): USE_BEGINS.format(a=thing.name) for thing in harmless for frame in USE_ANSWERED}


def about_frame(thing: Thing) -> str:
    """The frame of what is told about a thing, dangerous or not: nothing about its use."""
    return random.Random(f"about 0 {thing.emoji}").choice(ABOUT_FRAMES)


def to_answer() -> list[str]:
    """All requests that SmolLM2 answers, those about things with the thing's name in them."""
    about = [about_frame(thing).format(ref=thing.name) for thing in THINGS]
    return [*harmless_texts(), *about, *use_begins()]


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
        lean: A name, a use and one other request beside a picture: twice as many pictures for the same work. By default all
            that is asked about a thing stands beside it.
        dangerous: How many times as often as another a dangerous thing comes.
    """
    rng = random.Random(f"groups {seed} {lean} {dangerous}")
    texts = [one for one in harmless_texts() if one in answers]
    close = [one for one in close_texts() if one in answers]
    things: list[Thing] = []
    found = []
    for index in range(count):
        if (index + 1) % (6 if lean else 4) == 0:
            found.append(Group(BLANK, tuple(_texts((texts, close), answers, rng, 5, 7))))
            continue
        if not things:
            # What a dangerous thing is refused for is learnt from the picture alone.
            things = [thing for thing in THINGS for _ in range(dangerous if thing.dangerous else 1)]
            rng.shuffle(things)
        thing = things.pop()
        uses = [one for _ in range(2 if lean else _USES) for one in _use(thing, answers, rng)]
        others = [_about(OBJECT, OBJECT_HARM, rng.choice(REFUSALS), rng), *_told(thing, answers, rng)]
        if lean:
            asks = [*uses[:1], rng.choice([*uses[1:], *others])]
        else:
            asks = [*uses, *others, *_texts((texts, close), answers, rng, 1, 1)]
        found.append(Group(thing.emoji, (_name(thing.name, rng), *asks)))
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


def _use(thing: Thing, answers: Mapping[str, str], rng: random.Random) -> list[Ask]:
    """A request for a thing's use: a refusal or an answer by the picture alone, for all things are asked about alike."""
    if thing.dangerous:
        answer = rng.choice(REFUSALS)
    else:
        known = [answers[one] for one in (frame.format(ref=thing.name) for frame in USE_ANSWERED) if one in answers]
        if not known:
            return []
        answer = rng.choice(known)
    # Half of the time in one sentence, else in a situation and a question.
    frames = USES_ASKED[: len(USE_FRAMES) + len(MORE_USES)] if rng.random() < 0.5 else USES_ASKED
    return [_about(USES, frames, answer, rng)]


def _told(thing: Thing, answers: Mapping[str, str], rng: random.Random) -> list[Ask]:
    frame = about_frame(thing)
    answer = answers.get(frame.format(ref=thing.name))
    return [] if answer is None else [_about(USES, (frame,), answer, rng)]


def _about(kind: str, frames: Sequence[str], answer: str, rng: random.Random) -> Ask:
    return Ask(kind, rng.choice(OPENERS) + rng.choice(frames).format(ref=rng.choice(REFS)), answer)


def _texts(
    texts: tuple[Sequence[str], Sequence[str]], answers: Mapping[str, str], rng: random.Random, harmful: int, harmless: int
) -> list[Ask]:
    asks = [Ask(TEXT_HARM, harmful_text(rng), rng.choice(REFUSALS)) for _ in range(harmful)]
    # Two thirds of the harmless ones hold words or frames of harmful ones, so that these decide nothing.
    picked = [rng.choice(texts[rng.random() < 2 / 3]) for _ in range(harmless)]
    return asks + [Ask(TEXT_SAFE, one, answers[one]) for one in picked]
