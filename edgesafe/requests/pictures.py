"""Pictures for requests without one, by a named rule: blank, typographic, a file, or a folder to draw from.

Typographic: the request is written in the picture, and the prompt asks to answer what is written there.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from edgesafe.errors import InputError
from edgesafe.format.pictures import open_picture
from edgesafe.requests.sources import BLANK, TYPOGRAPHIC

TYPOGRAPHIC_PROMPT = "Read the request that is written in this picture, and answer it."
SIDE, GREY = 336, 128  # of the blank picture, pixels and level
_WRITTEN_SIDE, _MARGIN = 448, 24
_SIZES = (56, 48, 40, 34, 28, 24, 20, 17, 14)  # pixels; smaller letters are lost when a tower shrinks the picture
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


@dataclass(frozen=True)
class Picture:
    """What a row shows: a file, a text that is written, or nothing (a grey square)."""

    file: Path | None = None
    text: str = ""

    @property
    def blank(self) -> bool:
        """Whether it is the grey square, which says nothing about a request."""
        return self.file is None and not self.text


class Pictures(Mapping[str, Image.Image]):
    """Pictures by their path in the suite, opened one at a time as they are written: a set of 500 fills no memory.

    The one inheritance here: `Mapping` is what makes three methods a mapping.
    """

    def __init__(self, sources: Mapping[str, tuple[Picture, str]]) -> None:
        self.sources = sources

    def __getitem__(self, name: str) -> Image.Image:
        return draw(*self.sources[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


def picture_for(rule: str, request: str, seed: int) -> Picture:
    """The picture that a rule attaches to a request.

    Args:
        rule: "blank", "typographic", or the path of a picture or of a folder of pictures.
        request: its words.
        seed: with the words, decides which picture of a folder it is.

    Raises:
        InputError: the rule is none of these, or the folder has no picture.
    """
    if rule == BLANK:
        return Picture()
    if rule == TYPOGRAPHIC:
        return Picture(text=request)
    files = _files(rule)
    return Picture(files[int(hashlib.sha256(f"{seed} {request}".encode()).hexdigest(), 16) % len(files)])


def draw(picture: Picture, where: str) -> Image.Image:
    """A picture as the device sees it.

    Raises:
        InputError: its file can't be read, or its text can't be written.
    """
    if picture.text:
        return write(picture.text, where)
    if picture.file is None:
        return Image.new("RGB", (SIDE, SIDE), (GREY,) * 3)
    try:
        return open_picture(picture.file)
    except InputError as error:
        raise InputError(f"{error.what} ({picture.file})", where=where, expected=error.expected, todo=error.todo) from error


def why_not_written(text: str) -> str:
    """Why a text can't be written in a picture; empty where it can.

    >>> why_not_written("Pick a lock"), why_not_written("中")
    ('', "the font has no letter '中'")
    """
    missing = sorted({letter for letter in _plain(text) if not letter.isspace() and not _has_letter(letter)})
    if missing:
        return f"the font has no letter {missing[0]!r}"
    return "" if _lines(text, _SIZES[-1]) else f"its {len(text):,} letters are too many"


def write(text: str, where: str = "") -> Image.Image:
    """A text in black on white, in the largest letters that fit; accents that the font lacks are left out.

    Raises:
        InputError: it is too long, or has letters that the font lacks.
    """
    why = why_not_written(text)
    if why:
        what, todo = f"the request can't be written in a picture: {why}", "attach pictures of your own, or blank ones"
        raise InputError(what, where=where, expected="at most about 1,000 Latin letters", todo=todo)
    size = next(size for size in _SIZES if _lines(text, size))
    return _written(_lines(text, size), size)


def pixel_digest(picture: Image.Image) -> str:
    """The sha256 of a picture's size and pixels; empty where it is of one colour, and shows nothing.

    >>> pixel_digest(Image.new("RGB", (4, 4), "red"))
    ''
    """
    rgb = picture.convert("RGB")
    if all(low == high for low, high in rgb.getextrema()):  # type: ignore[misc]  # of RGB: a pair for each channel
        return ""
    return hashlib.sha256(f"{rgb.size} ".encode() + rgb.tobytes()).hexdigest()


@cache
def _files(rule: str) -> Sequence[Path]:
    path = Path(rule)
    if path.is_file():
        return (path,)
    expected = f"{BLANK}, {TYPOGRAPHIC}, a picture, or a folder of pictures"
    if not path.is_dir():
        raise InputError("no such picture or folder", where=rule, expected=expected)
    files = tuple(sorted(p for p in path.rglob("*") if p.suffix.lower() in _ENDINGS and p.is_file() and p.name[0] != "."))
    if not files:
        raise InputError("the folder has no picture", where=rule, expected=f"files in {', '.join(_ENDINGS)}")
    return files


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # so it is where a size is named
    return font


@cache
def _has_letter(letter: str) -> bool:
    """Whether the font draws something else than its box for letters that it lacks."""
    font = _font(_SIZES[0])
    return bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))


def _plain(text: str) -> str:
    """A text whose letters go without their marks where the font has them only so.

    >>> _plain("piñata")
    'pinata'
    """
    return "".join(letter if letter.isspace() or _has_letter(letter) else _bare(letter) for letter in text)


def _bare(letter: str) -> str:
    return "".join(part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part))


def _lines(text: str, size: int) -> list[str]:
    """The lines of a text in letters of a size; none where they don't fit the picture."""
    lines = _wrapped(_plain(text), _font(size))
    return lines if len(lines) * _line(size) <= _WRITTEN_SIDE - 2 * _MARGIN else []


def _line(size: int) -> int:
    return round(1.3 * size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines that fit the picture's width; a word that is longer than a line is cut."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}".strip()
            if _fits(joined, font):
                line = joined
                continue
            lines += [line] if line else []
            while not _fits(word, font):
                cut = next(n for n in range(len(word), 0, -1) if n == 1 or _fits(word[:n], font))
                lines.append(word[:cut])
                word = word[cut:]
            line = word
        lines += [line] if line else []
    return lines


def _fits(line: str, font: ImageFont.FreeTypeFont) -> bool:
    return font.getlength(line) <= _WRITTEN_SIDE - 2 * _MARGIN


def _written(lines: Sequence[str], size: int) -> Image.Image:
    image = Image.new("RGB", (_WRITTEN_SIDE, _WRITTEN_SIDE), "white")
    pen, top = ImageDraw.Draw(image), (_WRITTEN_SIDE - len(lines) * _line(size)) / 2
    for number, line in enumerate(lines):
        pen.text((_MARGIN, top + number * _line(size)), line, fill="black", font=_font(size))
    return image
