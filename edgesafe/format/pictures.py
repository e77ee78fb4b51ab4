"""The one way from a picture file to upright 8-bit RGB: for the device, suites, training rows, evaluation and import.

Rotation: an EXIF orientation is applied, because a phone stores its upright photo lying down and its owner asks about what
the screen shows. Transparent pixels show white, as transformers' ``convert_to_rgb`` shows them.

More than 8 bits: grey of 16 bits (modes ``I;16``, ``I;16B`` and their kin) becomes ``round(value * 255 / 65535)``; Pillow's own
conversion clips it at 255, which turns nearly all of it white. Pillow reads 16-bit colour as its high byte, less than one
level from that. Mode ``I`` is what some programs make of 16-bit grey, and is taken as such where its values say so. Mode
``F`` is refused: nothing tells whether its white is 1, 255 or 65535.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias, TypeVar

from PIL import ExifTags, Image, ImageOps

from edgesafe.errors import InputError

Source: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image"

# 50 megapixels: above any phone's default photo, and 150 MB decoded, which every profile's memory holds.
MAX_PIXELS = 50_000_000
# Pillow knows many more, some of which start other programs (EPS); a phone's photo is one of these.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# The 8-bit value of every 16-bit one: 65535 / 255 is 257, an odd number, so that no half needs a rule.
EIGHT_BITS = bytes((value + 128) // 257 for value in range(65536))
_WIDE_BY_HEAD = ("PNG", "PPM")  # whose files in mode I have 16 bits
# Pillow scales grey of 2 and 4 bits to 8, but not the value that such a PNG marks as transparent.
_FEW_BITS = {"L;2": 85, "L;4": 17}
_STRIP = 64
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
# EXIF orientations that turn a picture by a quarter.
_LYING = (5, 6, 7, 8)
T = TypeVar("T")


def open_picture(source: Source | None) -> Image.Image:
    """The picture in 8-bit RGB, upright, transparency over white.

    Args:
        source: A file's path, its bytes, or a PIL image.

    Raises:
        InputError: There is no picture, it can't be read, it has more than ``MAX_PIXELS``, or nothing tells its white.
    """
    return _opened(source, _decode)


def picture_size(source: Source | None) -> tuple[int, int]:
    """The upright picture's height and width, from the head of its file where that says it.

    Raises:
        InputError: As by ``open_picture``, as far as the head tells.
    """
    return _opened(source, _size)


def refuse_bomb(width: int, height: int, where: str) -> None:
    """Refuse more than ``MAX_PIXELS``.

    Raises:
        InputError: There are more.
    """
    if width * height > MAX_PIXELS:
        raise _bomb(f"the picture has {width} x {height} pixels", where)


def _opened(source: Source | None, use: Callable[[Image.Image, str], T]) -> T:
    if source is None:
        raise InputError("there is no picture", expected="a path, a PIL image or a uint8 array", todo="pass one")
    if isinstance(source, Image.Image):
        return use(source, "the PIL image")
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), "the picture's bytes", use)
    if not isinstance(source, str | os.PathLike):
        expected = "a path, bytes, a PIL image or a uint8 array"
        raise InputError(f"a {type(source).__name__} is not a picture", expected=expected)
    path = Path(source)
    # Only plain files: a pipe would hang and a device would never end. A name that is too long is an error of the system.
    with contextlib.suppress(OSError):
        if path.is_file():
            return _read(path, str(path), use)
    raise InputError("there is no such picture file", where=str(path), todo="check the path")


def _read(source: Path | io.BytesIO, where: str, use: Callable[[Image.Image, str], T]) -> T:
    try:
        # An error, not a warning: Pillow's own limit lies above ours, so nothing that warns is wanted.
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(source, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _bomb("the picture has far more pixels than can be decoded", where) from error
    except Exception as error:
        raise _unreadable(error, where) from error
    with image:
        clear = image.info.get("transparency")
        if isinstance(clear, int) and image.tile:
            image.info["transparency"] = clear * _FEW_BITS.get(str(image.tile[0].args), 1)
        return use(image, where)


def _size(image: Image.Image, where: str) -> tuple[int, int]:
    _check_size(image, where)
    try:
        lying = image.getexif().get(ExifTags.Base.Orientation, 1) in _LYING
    except Exception as error:
        raise _unreadable(error, where) from error
    return (image.width, image.height) if lying else (image.height, image.width)


def _check_size(image: Image.Image, where: str) -> None:
    if not image.width or not image.height:
        raise InputError("the picture is empty", where=where, expected="at least one pixel")
    refuse_bomb(image.width, image.height, where)


def _decode(image: Image.Image, where: str) -> Image.Image:
    _check_size(image, where)
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else it would be copied for nothing
            image = ImageOps.exif_transpose(image)
        if image.mode == "I" or image.mode.startswith("I;16"):
            return _from_16_bits(image, where)
        if image.mode == "F":
            raise _unknown_white("F", where)
        if _has_clear_parts(image):
            return _over_white(image)
        return image.convert("RGB")
    except InputError:
        raise
    except Exception as error:
        # Decoders raise whatever a broken file makes them trip over; to the caller it is one thing.
        raise _unreadable(error, where) from error


def _from_16_bits(image: Image.Image, where: str) -> Image.Image:
    """RGB of 16-bit grey; the value that the file marks as transparent becomes white."""
    if image.mode == "I":
        _check_is_16_bits(image, where)
    table = bytearray(EIGHT_BITS)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        table[clear] = 255
    # Mode I is the only one that Pillow looks up in a table of 65536.
    return _by_strips(image, lambda strip: strip.convert("I").point(table, "L").convert("RGB"))


def _check_is_16_bits(image: Image.Image, where: str) -> None:
    """Refuse mode I whose values don't tell where white is: 8-bit grey converted to I keeps its values, 16-bit grey too."""
    low, high = image.getextrema()
    fits = isinstance(low, int) and isinstance(high, int) and low >= 0 and high <= 65535
    dark = high in range(1, 256) and image.format not in _WIDE_BY_HEAD
    if not fits or dark:
        raise _unknown_white(f"I with values from {low} to {high}", where)


def _has_clear_parts(image: Image.Image) -> bool:
    by_palette = image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")
    return by_palette or image.mode in _WITH_ALPHA or image.info.get("transparency") is not None


def _over_white(image: Image.Image) -> Image.Image:
    """RGB of a picture with transparent parts."""
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:
        # A file of 16-bit colour names its transparent colour in 16 bits; of its pixels Pillow keeps the high bytes.
        clear = tuple(value >> 8 for value in clear)

    def composed(strip: Image.Image) -> Image.Image:
        if clear is not None:
            strip.info["transparency"] = clear
        strip = (strip.convert("LA") if strip.mode == "La" else strip).convert("RGBA")
        over = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        return Image.alpha_composite(over, strip).convert("RGB")

    return _by_strips(image, composed)


def _by_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """RGB strip by strip: whole copies of four bytes a pixel would take several times the memory."""
    whole = Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP):
        box = (0, top, image.width, min(top + _STRIP, image.height))
        whole.paste(convert(image.crop(box)), box)
    return whole


def _unknown_white(mode: str, where: str) -> InputError:
    return InputError(
        f"the picture's mode is {mode}, so its white is unknown",
        where=where,
        expected="grey or colour of 8 or 16 bits",
        todo="scale its values to 0..255 and convert it to mode L",
    )


def _unreadable(error: Exception, where: str) -> InputError:
    return InputError(
        f"the picture can't be read: {type(error).__name__}: {error}".replace("\n", " "),
        where=where,
        expected="a whole PNG, JPEG, WebP, GIF or BMP file",
        todo="open it in a viewer and save it again",
    )


def _bomb(what: str, where: str) -> InputError:
    return InputError(what, where=where, expected=f"at most {MAX_PIXELS // 1_000_000} megapixels", todo="make it smaller")
