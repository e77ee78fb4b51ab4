"""A checkpoint's picture processor as the manifest's `image` and `tiles` tables, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgesafe.checkpoint.geometry import picture_side
from edgesafe.checkpoint.recipe import Recipe
from edgesafe.errors import InputError, UnsupportedModelError
from edgesafe.format.specs import ImageSpec
from edgesafe.format.tiles import TilesSpec

_WHERE = "preprocessor_config.json"


def picture_specs(processor: Any, config: Any, recipe: Recipe) -> tuple[ImageSpec, TilesSpec | None]:
    """How the runtime makes `pixel_values` of a picture, as this checkpoint's processor does.

    Raises:
        InputError: the processor makes pictures of another size than the tower's, or cuts them unlike the model.
        UnsupportedModelError: it does something that the runtime can't.
    """
    made = dict(processor.image_processor.to_dict())
    if not recipe.cut:
        image, tiles = ImageSpec.from_hf(made), None
    elif recipe.cut == "grid":
        image, tiles = _grid(made, recipe)
    else:
        image, tiles = _canvas(made, processor, config, recipe)
    side = picture_side(config, recipe, processor.image_processor)
    if (image.height, image.width) != (side, side):
        raise InputError(
            f"the image processor makes pictures of {image.height} x {image.width}",
            where=_WHERE,
            expected=f"{side} x {side}, which the tower was built for",
            todo="use the processor files that belong to this checkpoint",
        )
    return image, tiles


def _grid(made: Mapping[str, Any], recipe: Recipe) -> tuple[ImageSpec, TilesSpec]:
    size, tile = dict(made.get("size") or {}), dict(made.get("max_image_size") or {})
    if not made.get("do_resize", True) or not size.get("longest_edge") or not tile.get("longest_edge"):
        raise UnsupportedModelError(
            "the image processor does not lead to tiles of one size",
            where=_WHERE,
            expected="do_resize, size.longest_edge and max_image_size.longest_edge",
        )
    cut = "grid" if made.get("do_image_splitting", True) else "never"
    return _square(made, int(tile["longest_edge"])), TilesSpec(cut, int(size["longest_edge"]), (), None, False, recipe.texts)


def _canvas(made: Mapping[str, Any], processor: Any, config: Any, recipe: Recipe) -> tuple[ImageSpec, TilesSpec]:
    size, crop = dict(made.get("size") or {}), dict(made.get("crop_size") or {})
    high = size.get("height") or size.get("shortest_edge")
    sides = {high, size.get("width") or high, *(crop.values() if made.get("do_center_crop") else ())}
    if len(sides) != 1 or not high or not made.get("do_resize", True):
        raise UnsupportedModelError(
            f"the image processor makes tiles of {sorted(map(str, sides))}",
            where=_WHERE,
            expected="do_resize to one square size",
        )
    canvases = tuple((int(h), int(w)) for h, w in made["image_grid_pinpoints"])
    if canvases != tuple((int(h), int(w)) for h, w in config.image_grid_pinpoints):
        raise InputError(
            "the image processor cuts pictures differently from what the model expects",
            where=f"image_grid_pinpoints of {_WHERE} and config.json",
            expected="the same list",
            todo="use the processor files that belong to this checkpoint",
        )
    limit = None
    if recipe.limit:
        named = str(getattr(config, recipe.limit))
        number = named.rpartition("_")[2]
        if not number.isdecimal() or getattr(processor, recipe.limit, named) != named:
            raise UnsupportedModelError(
                f"{recipe.limit} is {named!r}",
                where="config.json",
                expected="anyres_max_9 or the like, as in the processor's own",
            )
        limit = int(number)
    return _square(made, int(high)), TilesSpec("canvas", 0, canvases, limit, bool(recipe.newline), None)


def _square(made: Mapping[str, Any], side: int) -> ImageSpec:
    """Every tile: exactly this size, no crop, then factor, mean and std."""
    changes = {"size": {"height": side, "width": side}, "crop_size": None, "do_center_crop": False, "do_pad": False}
    return ImageSpec.from_hf({**made, **changes})
