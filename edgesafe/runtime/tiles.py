"""A picture's tiles as ``pixel_values``, and the tiles' features as one sequence.

Source: transformers 5.23 ``image_processing_pil_idefics3``, ``image_processing_pil_llava_next`` and
``modeling_llava_onevision.pack_image_features``.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgesafe.format.exits import Exit
from edgesafe.format.manifest import Manifest
from edgesafe.format.specs import ImageSpec
from edgesafe.format.tiles import (
    ALONE,
    Cut,
    Size,
    TilesSpec,
    best_canvas,
    cut_of,
    fitted,
    grid_size,
    long_size,
    map_rows,
    smaller,
)
from edgesafe.runtime.image import Floats, Picture, load_picture, normalised, picture_size, preprocess


def picture_cut(picture: Picture, manifest: Manifest, exit: Exit | None = None) -> Cut:
    """How a bundle cuts a picture at an exit, by default one with all tiles; one without tiles ignores both."""
    tiles = manifest.tiles_of(exit)
    return ALONE if tiles is None else cut_of(tiles, manifest.image.height, picture_size(picture))


def pixel_values(picture: Picture, manifest: Manifest, exit: Exit | None = None) -> Floats | list[Floats]:
    """What a bundle's vision graphs take at an exit: float32 [1,3,H,W], or a list of them where it has tiles."""
    tiles = manifest.tiles_of(exit)
    return preprocess(picture, manifest.image) if tiles is None else preprocess_tiles(picture, manifest.image, tiles)


def preprocess_tiles(picture: Picture, image: ImageSpec, spec: TilesSpec) -> list[Floats]:
    """The picture's tiles in the order that the tower runs over them, float32 [1,3,height,width] each.

    Args:
        picture: As for ``preprocess``.
        image: The manifest's ``image`` table: a tile's size, filter, mean and std.
        spec: The manifest's ``tiles`` table.

    Raises:
        InputError: The picture can't be read.
    """
    whole, resample = load_picture(picture), Image.Resampling[image.resample.upper()]
    size, tile = (whole.height, whole.width), image.height
    cut = cut_of(spec, tile, size)
    if spec.cut == "canvas":
        parts = [np.asarray(_resize(whole, (tile, tile), resample))]
        if cut.rows:
            parts += _split(_on_canvas(whole, best_canvas(spec.canvases, size), resample), tile)
    else:
        large = _resize(whole, long_size(size, spec.longest_edge), resample)
        if cut.rows:
            large = _resize(large, grid_size((large.height, large.width), tile), resample)
        parts = _split(np.asarray(large), tile) if cut.rows else []
        parts.append(np.asarray(_resize(large, (tile, tile), resample)))
    return [normalised(part, image) for part in parts]


def join_tiles(features: list[Floats], cut: Cut, spec: TilesSpec) -> Floats:
    """The tiles' features as the sequence that the prompt has room for.

    Args:
        features: The head's output for each tile, float32 [N,D], with the newline behind them where ``spec.newline``.
        cut: How the picture was cut.
        spec: The manifest's ``tiles`` table.

    Returns:
        float32 [M,D].
    """
    if spec.cut != "canvas":
        return np.concatenate(features)
    newline = features[0][-1:] if spec.newline else features[0][:0]
    plain = [one[: len(one) - len(newline)] for one in features]
    if not cut.rows:
        return np.concatenate([plain[0], newline])
    side, width = math.isqrt(len(plain[0])), plain[0].shape[1]
    grid = np.stack(plain[1:]).reshape(cut.rows, cut.cols, side, side, width)
    whole = grid.transpose(0, 2, 1, 3, 4).reshape(cut.rows * side, cut.cols * side, width)
    shown = whole[map_rows(cut, side)]
    size = smaller((shown.shape[0], shown.shape[1]), side, spec.limit)
    shown = shown if size == shown.shape[:2] else bilinear(shown, size)
    lines = np.repeat(newline[None], shown.shape[0], axis=0)  # [rows, 1 or 0, D]
    return np.concatenate([plain[0], np.concatenate([shown, lines], axis=1).reshape(-1, width)])


def bilinear(values: Floats, size: Size) -> Floats:
    """A map [H,W,D] at another size, each value between its four neighbours.

    Source: torch ``interpolate(mode="bilinear", align_corners=False)``, without antialiasing.

    >>> bilinear(np.array([[[0.0], [4.0], [8.0], [12.0]]], np.float32), (1, 2))[0, :, 0]
    array([ 2., 10.], dtype=float32)
    """
    for axis, new in enumerate(size):
        old = values.shape[axis]
        at = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0.0)
        low = at.astype(np.int64)
        share = (at - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        below, above = values.take(low, axis), values.take(np.minimum(low + 1, old - 1), axis)
        values = below * (1 - share) + above * share
    return values


def _resize(image: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    return image.resize((size[1], size[0]), resample=resample)


def _on_canvas(image: Image.Image, canvas: Size, resample: Image.Resampling) -> npt.NDArray[np.uint8]:
    """The picture as large as fits, in the middle of black."""
    height, width = fitted((image.height, image.width), canvas)
    top, left = (canvas[0] - height) // 2, (canvas[1] - width) // 2
    out = np.zeros((*canvas, 3), np.uint8)
    out[top : top + height, left : left + width] = np.asarray(_resize(image, (height, width), resample))
    return out


def _split(pixels: npt.NDArray[np.uint8], tile: int) -> list[npt.NDArray[np.uint8]]:
    """Tiles row by row."""
    height, width = pixels.shape[:2]
    return [pixels[y : y + tile, x : x + tile] for y in range(0, height, tile) for x in range(0, width, tile)]
