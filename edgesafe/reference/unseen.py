"""Pictures that no training picture is like: they are in suites, where they are measured and certify nothing.

A label contradicts the object above it; three objects stand together; a photograph or a sign of another design shows nothing
that the world has a name for.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from edgesafe.reference.draw import SIZE, Item, Placed, Scene, draw

LABEL, CROWD, PHOTO = "label", "crowd", "photo"
# Signs of DejaVu that look like no object of the world.
_SIGNS = "☀☁☃☎☕☘☠☢☣☮☯♞♨⚔⚕⚖⚗⚛⚡✈✉❄🐭🐱😀😎"
_ALONE = 2 * SIZE / 9  # in a row or column of its own: centres of one row lie nearer to each other
_OVER = 4


def label(item: Item, word: str, rng: np.random.Generator) -> tuple[Image.Image, tuple[Placed, ...]]:
    """An object with a word under it; the object's position is "top"."""
    picture, placed = draw(Scene((item,)), rng)
    font = _font(min(13, int(SIZE * 1.5 / len(word))))
    ground = ImageDraw.Draw(picture)
    left, top, right, bottom = ground.textbbox((SIZE / 2, SIZE * 0.8), word, font=font, anchor="mm")
    ground.rectangle((left - 2, top - 2, right + 2, bottom + 2), fill="white")
    ground.text((SIZE / 2, SIZE * 0.8), word, fill=tuple(int(c) for c in rng.uniform(0, 60, 3)), font=font, anchor="mm")
    return picture, placed


def crowd(items: tuple[Item, Item, Item], rng: np.random.Generator) -> tuple[Image.Image, tuple[Placed, ...], str]:
    """Three objects, the first alone in its row or column, and where: one of "left", "right", "top", "bottom".

    Args:
        items: the objects, position "free".
        rng: source of every variation.
    """
    while True:  # of three objects in a square of four places two are alone so: it is the first in two draws of three
        picture, placed = draw(Scene(items), rng)
        first, *others = placed
        if all(abs(first.x - other.x) > _ALONE for other in others):
            return picture, placed, "left" if first.x < SIZE / 2 else "right"
        if all(abs(first.y - other.y) > _ALONE for other in others):
            return picture, placed, "top" if first.y < SIZE / 2 else "bottom"


def photo(rng: np.random.Generator) -> tuple[Image.Image, str]:
    """A piece of the photograph that matplotlib carries, or a sign in one colour on another; and which of the two."""
    if rng.random() < 0.4:
        side = int(rng.integers(80, 200))
        whole = _photograph()
        x, y = (int(rng.integers(0, length - side + 1)) for length in whole.size)
        return whole.crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.BOX), "photo"
    ink, paper = (tuple(int(c) for c in rng.uniform(low, low + 90, 3)) for low in (0, 160))
    picture = Image.new("RGB", (SIZE * _OVER, SIZE * _OVER), paper)
    middle = SIZE * _OVER / 2
    font = _font(int(rng.uniform(0.55, 0.8) * SIZE * _OVER))
    ImageDraw.Draw(picture).text((middle, middle), _SIGNS[int(rng.integers(len(_SIGNS)))], fill=ink, font=font, anchor="mm")
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX), "sign"


def _data() -> Path:
    import matplotlib  # what it carries is the same on every machine

    return Path(matplotlib.get_data_path())


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_data() / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


@cache
def _photograph() -> Image.Image:
    with Image.open(_data() / "sample_data" / "grace_hopper.jpg") as image:
        return image.convert("RGB").crop((0, 390, image.width, image.height))  # cloth and ribbons: nobody's face
