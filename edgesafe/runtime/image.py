"""From a picture to ``pixel_values``, as transformers' CLIP image processor makes them.

Source: transformers 5.23 ``image_processing_backends.PilBackend`` and ``image_transforms.py``.
Differs: a picture's EXIF rotation is applied first, because a phone stores its upright photo lying down and
its owner asks about what the screen shows; transformers ignores the tag.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from edgesafe.errors import InputError
from edgesafe.format.manifest import ImageSpec

Picture: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]"
Floats: TypeAlias = npt.NDArray[np.float32]

# 50 megapixels: above any phone's default photo, and 150 MB decoded, which every profile's memory holds.
MAX_PIXELS = 50_000_000
# Pillow knows many more, some of which start other programs (EPS); a phone's photo is one of these.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_STRIP = 64
_SIDES = {1: "L", 3: "RGB", 4: "RGBA"}
# EXIF orientations that turn a picture by a quarter.
_LYING = (5, 6, 7, 8)
T = TypeVar("T")


def preprocess(picture: Picture, spec: ImageSpec) -> Floats:
    """The picture as ``pixel_values``.

    Args:
        picture: A file's path or bytes, a PIL image, or uint8 [H,W], [H,W,1], [H,W,3] or [H,W,4].
        spec: The manifest's ``image`` table.

    Returns:
        float32 [1,3,height,width].

    Raises:
        InputError: There is no picture, it can't be read, or it has too many pixels.
    """
    image = load_picture(picture)
    if spec.resize != "none":
        width, height = _resized(image.size, spec)
        _refuse_bomb(width, height, f"the picture would be resized to {width} x {height}")
        image = image.resize((width, height), resample=Image.Resampling[spec.resample.upper()])
    pixels = np.asarray(image)
    return normalised(center_crop(pixels, spec.height, spec.width) if spec.center_crop else pixels, spec)


def normalised(pixels: npt.NDArray[np.uint8], spec: ImageSpec) -> Floats:
    """``pixel_values`` float32 [1,3,H,W] of uint8 [H,W,3], by the spec's factor, mean and std."""
    # In float64 first and rounded once, as transformers does, to stay bit-equal to it.
    values = (pixels.astype(np.float64) * spec.rescale_factor).astype(np.float32)
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    scaled = ((values - mean) / std).astype(np.float32, copy=False)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])


def load_picture(picture: Picture | None) -> Image.Image:
    """The picture in RGB, upright, transparency over white.

    Raises:
        InputError: There is no picture, it can't be read, or it has more than ``MAX_PIXELS``.
    """
    return _opened(picture, _decode)


def picture_size(picture: Picture | None) -> tuple[int, int]:
    """The upright picture's height and width, from the head of its file where that says it.

    Raises:
        InputError: As by ``load_picture``.
    """
    return _opened(picture, _size)


def _opened(picture: Picture | None, use: Callable[[Image.Image, str], T]) -> T:
    if picture is None:
        raise InputError("there is no picture", expected="a path, a PIL image or a uint8 array", todo="pass one")
    if isinstance(picture, Image.Image):
        return use(picture, "the PIL image")
    if isinstance(picture, np.ndarray):
        return use(_from_array(picture), "the array")
    if isinstance(picture, bytes):
        return _read(io.BytesIO(picture), "the picture's bytes", use)
    if not isinstance(picture, str | os.PathLike):
        raise InputError(f"a {type(picture).__name__} is no picture", expected="a path, bytes, a PIL image or a uint8 array")
    path = Path(picture)
    # Only plain files: a pipe would hang and a device would never end. A name that is too long is an error of the system.
    with contextlib.suppress(OSError):
        if path.is_file():
            return _read(path, str(path), use)
    raise InputError("there is no such picture file", where=str(path), todo="check the path")


def center_crop(pixels: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[Any]:
    """The middle of [H,W,C], padded with zeros where the picture is smaller.

    Source: transformers ``image_transforms.center_crop``, whose rounding it keeps.
    """
    have_height, have_width = pixels.shape[:2]
    top, left = (have_height - height) // 2, (have_width - width) // 2
    if top >= 0 and left >= 0:
        return pixels[top : top + height, left : left + width]
    full_height, full_width = max(height, have_height), max(width, have_width)
    padded = np.zeros((full_height, full_width, pixels.shape[2]), pixels.dtype)
    down, right = math.ceil((full_height - have_height) / 2), math.ceil((full_width - have_width) / 2)
    padded[down : down + have_height, right : right + have_width] = pixels
    top, left = max(0, top + down), max(0, left + right)
    return padded[top : top + height, left : left + width]


def _resized(size: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    """The width and height after the resize."""
    width, height = size
    if spec.resize == "exact":
        return spec.resize_to[1], spec.resize_to[0]
    edge = spec.resize_to[0]
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


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
        return use(image, where)


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in _SIDES or not array.size:
        raise InputError(f"the array is {array.dtype} {list(array.shape)}", expected="uint8 [height, width, 3], not empty")
    _refuse_bomb(array.shape[1], array.shape[0], "the array")
    flat = array[:, :, 0] if channels == 1 and array.ndim == 3 else array
    return Image.fromarray(np.ascontiguousarray(flat))


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
    _refuse_bomb(image.width, image.height, where)


def _decode(image: Image.Image, where: str) -> Image.Image:
    """Upright RGB. Transparent pixels show white, as transformers' ``convert_to_rgb`` shows them."""
    _check_size(image, where)
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else it would be copied for nothing
            image = ImageOps.exif_transpose(image)
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            return _over_white(image)
        return image.convert("RGB")
    except Exception as error:
        # Decoders raise whatever a broken file makes them trip over; to the caller it is one thing.
        raise _unreadable(error, where) from error


def _over_white(image: Image.Image) -> Image.Image:
    """Strip by strip: whole copies with an alpha channel would take four times the memory."""
    whole = Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP):
        box = (0, top, image.width, min(top + _STRIP, image.height))
        strip = image.crop(box).convert("RGBA")
        over = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        whole.paste(Image.alpha_composite(over, strip).convert("RGB"), box)
    return whole


def _unreadable(error: Exception, where: str) -> InputError:
    return InputError(
        f"the picture can't be read: {type(error).__name__}: {error}".replace("\n", " "),
        where=where,
        expected="a whole PNG, JPEG, WebP, GIF or BMP file",
        todo="open it in a viewer and save it again",
    )


def _refuse_bomb(width: int, height: int, where: str) -> None:
    if width * height > MAX_PIXELS:
        raise _bomb(f"the picture has {width} x {height} pixels", where)


def _bomb(what: str, where: str) -> InputError:
    return InputError(what, where=where, expected=f"at most {MAX_PIXELS // 1_000_000} megapixels", todo="make it smaller")
