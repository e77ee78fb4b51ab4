"""Rows for `align`, of what the adapter was trained on: the training makers' drawings, refusals, SmolLM2's own answers.

The views are others than the adapter's, and nothing here knows the suite.
"""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from edgesafe.certify.string_judge import REFUSE, classify
from edgesafe.errors import InputError
from edgesafe.format.suite import Row, Suite, write_suite
from edgesafe.reference.smol.pictures import MAKERS, blank, fetch, on_paper, read_pictures
from edgesafe.reference.smol.rows import BLANK, HARM, NAMING, TEXT_HARM, TEXT_SAFE, Ask, Group, groups
from edgesafe.reference.smol.things import THINGS

ANSWERS = Path(__file__).parent / "answers.json.xz"
GROUPS = 300  # pictures, with some seven requests each
_OFTEN = 5  # times as often as another a dangerous thing is shown: four of ten pictures
_THINGS = {thing.emoji: thing for thing in THINGS}


def make_training(out: Path, archives: Path, *, scale: float = 1.0, seed: int = 0) -> Suite:
    """Write training rows.

    Args:
        out: New folder.
        archives: Folder of the makers' archives; missing ones are fetched into it.
        scale: Of the number of pictures.
        seed: Of makers and views.

    Raises:
        InputError: The answers are missing, or an archive can't be fetched or read.
    """
    answers = read_answers()
    makers = [name for name, maker in MAKERS.items() if not maker.held_out]
    found = fetch(archives, makers)
    pictures = {name: read_pictures(found[name], MAKERS[name], _THINGS) for name in makers}
    drawn = groups(answers, max(2, round(GROUPS * scale)), dangerous=_OFTEN)
    rows, images = draw_training(drawn, pictures, seed)
    return write_suite(out, rows, images, "smol: emoji of " + ", ".join(makers), "train")


def read_answers() -> dict[str, str]:
    """SmolLM2's own answers to harmless requests, by request, as `answer_all` left them.

    Raises:
        InputError: They are not there, as in an install of the wheel, or damaged.
    """
    try:
        answers: dict[str, str] = json.loads(lzma.decompress(ANSWERS.read_bytes()))
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise InputError(
            f"the answers that smol learns from can't be read: {error}",
            where=str(ANSWERS),
            expected="the file of a clone of the repository; the wheel leaves it out",
            todo="clone the repository and run there",
        ) from error
    return answers


def write_answers(answers: Mapping[str, str], path: Path = ANSWERS) -> None:
    """Keep answers for the clone to carry."""
    path.write_bytes(lzma.compress(json.dumps(dict(sorted(answers.items())), indent=0).encode(), preset=9))


def draw_training(
    drawn: Sequence[Group], pictures: Mapping[str, Mapping[str, Image.Image]], seed: int
) -> tuple[list[Row], dict[str, Image.Image]]:
    """Rows and pictures of groups: for each group another drawing, half of them plain and half wild.

    Args:
        drawn: Requests beside one picture.
        pictures: By maker and emoji.
        seed: Of makers and views.
    """
    rng = random.Random(f"smol align {seed}")
    rows: list[Row] = []
    images: dict[str, Image.Image] = {}
    for number, group in enumerate(drawn):
        view = rng if rng.random() < 0.5 else None
        if group.emoji == BLANK:
            picture = blank(view)
        else:
            picture = on_paper(
                rng.choice([one[group.emoji] for one in pictures.values() if group.emoji in one]), view, wild=True
            )
        images[path := f"images/{number:04d}.png"] = picture
        rows += [
            _row(f"{number:04d}-{place}", path, group.emoji, ask)
            for place, ask in enumerate(group.asks[::2] if group.emoji == BLANK else group.asks)
        ]
    return rows, images


def _row(name: str, path: str, emoji: str, ask: Ask) -> Row:
    harmful = ask.kind in HARM or classify(ask.answer, ask.request) == REFUSE
    cls = "task" if ask.kind == NAMING else "harmful" if harmful else "harmless"
    family = f"{ask.kind} {cls}"
    word = _THINGS[emoji].word if emoji != BLANK else ""
    key = (word,) if cls == "task" else ()
    # What a request wants to do something with is what its picture shows, but where it needs none.
    asked = "" if ask.kind in (TEXT_HARM, TEXT_SAFE) else word
    return Row(name, cls, family, path, ask.request, ask.answer, key, ask.request, smoke=False, asked=asked)
