"""From a picture to ``pixel_values``, as transformers' CLIP image processor makes them.

Source: transformers 5.23 ``image_processing_backends.PilBackend`` and ``image_transforms.py``.
Differs: pictures are opened by ``edgesafe.format.pictures``: EXIF rotation is applied first and 16-bit grey is scaled, not
clipped; transformers' processor ignores the tag and sees nearly all of such a picture as white.
"""

from __future__ import annotations

import math
import os
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgesafe.errors import InputError
from edgesafe.format import pictures
from edgesafe.format.specs import ImageSpec

Picture: TypeAlias = "pictures.Source | npt.NDArray[np.uint8] | npt.NDArray[np.uint16]"
Floats: TypeAlias = npt.NDArray[np.float32]

_CHANNELS = (1, 3, 4)
_EIGHT_BITS = np.frombuffer(pictures.EIGHT_BITS, np.uint8)


def preprocess(picture: Picture, spec: ImageSpec) -> Floats:
    """The picture as ``pixel_values``.

    Args:
        picture: A file's path or bytes, a PIL image, or an array [H,W], [H,W,1], [H,W,3] or [H,W,4], uint8 (white is 255)
            or uint16 (white is 65535).
        spec: The manifest's ``image`` table.

    Returns:
        float32 [1,3,height,width].

    Raises:
        InputError: There is no picture, it can't be read, or it has too many pixels.
    """
    image = load_picture(picture)
    if spec.resize != "none":
        width, height = _resized(image.size, spec)
        pictures.refuse_bomb(width, height, f"the picture would be resized to {width} x {height}")
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
        InputError: There is no picture, it can't be read, or it has more than ``pictures.MAX_PIXELS``.
    """
    return pictures.open_picture(_from_array(picture) if isinstance(picture, np.ndarray) else picture)


def picture_size(picture: Picture | None) -> tuple[int, int]:
    """The upright picture's height and width, from the head of its file where that says it.

    Raises:
        InputError: As by ``load_picture``.
    """
    return pictures.picture_size(_from_array(picture) if isinstance(picture, np.ndarray) else picture)


def is_encoded(picture: Picture) -> bool:
    """Whether a picture's file, or its bytes, has to be decoded before it is looked at."""
    return isinstance(picture, str | bytes | os.PathLike)


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    bits = 8 * array.itemsize if array.dtype.kind == "u" else 0
    if bits not in (8, 16) or array.ndim not in (2, 3) or channels not in _CHANNELS or not array.size:
        expected = "uint8 or uint16 [height, width, 3], not empty"
        raise InputError(f"the array is {array.dtype} {list(array.shape)}", expected=expected)
    pictures.refuse_bomb(array.shape[1], array.shape[0], "the array")
    flat = array[:, :, 0] if channels == 1 and array.ndim == 3 else array
    return Image.fromarray(np.ascontiguousarray(_EIGHT_BITS[flat] if bits == 16 else flat))


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
