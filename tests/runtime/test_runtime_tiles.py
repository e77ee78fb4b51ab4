"""Tiles, and their features as one sequence, against transformers' own image processors and models."""

from __future__ import annotations

import doctest
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from edgesafe.errors import InputError
from edgesafe.format import tiles as arithmetic
from edgesafe.format.specs import ImageSpec
from edgesafe.format.tiles import Cut, TilesSpec, canvas_tokens, cut_of
from edgesafe.runtime import tiles
from edgesafe.runtime.image import load_picture, picture_size
from edgesafe.runtime.tiles import bilinear, join_tiles, preprocess_tiles
from mutants import wrong

# As in test_runtime_image: the same Pillow, the same arithmetic, the last bit may differ.
ATOL = 1e-6
FIVE = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SMALL = [[24 * h, 24 * w] for h in (1, 2, 3) for w in (1, 2, 3)]
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SIZES = [
    (64, 64),
    (63, 97),
    (97, 63),
    (1, 1),
    (1, 9),
    (9, 1),
    (337, 335),
    (640, 480),
    (480, 640),
    (17, 400),
    (24, 24),
    (48, 72),
]


def _spec(side: int, resample: str, config: dict) -> ImageSpec:
    mean, std = tuple(config["image_mean"]), tuple(config["image_std"])
    return ImageSpec(side, side, "exact", (side, side), resample, False, 1 / 255, mean, std)


def _grid(kind, tile: int, edge: int, split: bool = True):
    processor = kind(size={"longest_edge": edge}, max_image_size={"longest_edge": tile}, do_image_splitting=split, **HALF)
    spec = TilesSpec("grid" if split else "never", edge, (), None, False, None)
    return processor, _spec(tile, "lanczos", HALF), spec


def _canvas(kind, tile: int, canvases: list, config: dict, **sizes):
    processor = kind(image_grid_pinpoints=canvases, **sizes, **config)
    spec = TilesSpec("canvas", 0, tuple(map(tuple, canvases)), None, True, None)
    return processor, _spec(tile, "bicubic", config), spec


def _next(tile: int, canvases: list):
    sizes = {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}}
    return _canvas(LlavaNextImageProcessorPil, tile, canvases, CLIP, **sizes)


def _onevision(tile: int, canvases: list):
    return _canvas(LlavaOnevisionImageProcessorPil, tile, canvases, HALF, size={"height": tile, "width": tile})


MAKE = {
    "grid": lambda: _grid(Idefics3ImageProcessorPil, 24, 72),
    "grid, edge between tiles": lambda: _grid(SmolVLMImageProcessorPil, 24, 55),
    "grid, one tile at most": lambda: _grid(SmolVLMImageProcessorPil, 24, 24),
    "uncut": lambda: _grid(SmolVLMImageProcessorPil, 24, 72, split=False),
    "canvas with crop": lambda: _next(24, [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]),
    "canvas": lambda: _onevision(24, SMALL),
}
PUBLISHED = {
    "SmolVLM": lambda: _grid(SmolVLMImageProcessorPil, 512, 2048),
    "LLaVA-1.6": lambda: _next(336, FIVE),
    "LLaVA-OneVision": lambda: _onevision(384, [[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)]),
}


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8))


def check(picture: Image.Image, processor, image: ImageSpec, spec: TilesSpec) -> None:
    """Tiles, their number and order, as the processor makes them."""
    ours = np.concatenate(preprocess_tiles(picture, image, spec))
    theirs = np.asarray(processor(picture, return_tensors="np")["pixel_values"])[0]
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ATOL)
    assert cut_of(spec, image.height, (picture.height, picture.width)).tiles == len(ours)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_of_odd_sizes(size, name):
    check(noise(*size), *MAKE[name]())


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("size", [(640, 480), (301, 977)], ids=str)
def test_tiles_at_the_published_sizes(size, name):
    check(noise(*size), *PUBLISHED[name]())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_tiles_of_grey_alpha_and_other_modes(mode):
    check(noise(70, 50).convert(mode), *MAKE["grid"]())


def test_every_size_up_to_a_few_tiles_is_cut_alike():
    # The cut alone, which is what the prompt depends on: 3,600 sizes, where rounding could go either way.
    processor, image, spec = MAKE["grid, edge between tiles"]()
    for height in range(1, 61):
        for width in range(1, 61):
            large = processor.resize_for_vision_encoder(
                processor.resize(np.zeros((3, height, width), np.uint8), SimpleNamespace(longest_edge=55), 1), 24, 1
            )
            frames, rows, cols = processor.split_images(large, {"longest_edge": 24}, 1)
            cut = cut_of(spec, 24, (height, width))
            assert (cut.rows, cut.cols, cut.tiles) == (rows, cols, len(frames)), (height, width)


TWINS = {
    "a tile's rows and columns turned": (
        "grid",
        "_split",
        "for y in range(0, height, tile) for x in range(0, width, tile)",
        "for x in range(0, width, tile) for y in range(0, height, tile)",
    ),
    "the other side left odd": ("uncut", "long_size", "height += height % 2", "pass"),
    "the other side rounded": (
        "uncut",
        "long_size",
        "longest_edge, int(longest_edge / ratio)",
        "longest_edge, round(longest_edge / ratio)",
    ),
    "the picture in the canvas's corner": (
        "canvas",
        "_on_canvas",
        "(canvas[0] - height) // 2, (canvas[1] - width) // 2",
        "0, 0",
    ),
    "the fit rounded down": ("canvas", "fitted", "math.ceil(size[0] * wide)", "int(size[0] * wide)"),
    "the first canvas taken": ("canvas", "best_canvas", "best, most, least = (height, width), shown, wasted", "pass"),
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_wrong_version_of_the_tiles_is_seen(twin, monkeypatch):
    name, function, old, new = TWINS[twin]
    monkeypatch.setattr(tiles, function, wrong(getattr(tiles, function), (old, new)))
    with pytest.raises((AssertionError, ValueError)):
        for size in SIZES:
            check(noise(*size), *MAKE[name]())


def _packed(size: tuple[int, int], limit: int | None, seed: int = 0):
    """A picture's tile features (4 x 4 each, width 5) and transformers' own packing of them, with and without a limit."""
    spec = TilesSpec("canvas", 0, tuple(map(tuple, SMALL)), limit, True, None)
    cut = cut_of(spec, 24, size)
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((cut.tiles, 16, 5)).astype(np.float32)
    newline = rng.standard_normal(5).astype(np.float32)
    vision = SimpleNamespace(image_size=24, patch_size=6)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=SMALL))
    made = [torch.from_numpy(features)], [list(size)]
    if limit is None:
        packed, _ = LlavaNextModel.pack_image_features(model, *made, "default", torch.from_numpy(newline))
    else:
        packed, _ = LlavaOnevisionModel.pack_image_features(model, *made, torch.from_numpy(newline), f"anyres_max_{limit}")
    ours = tiles.join_tiles([np.concatenate([one, newline[None]]) for one in features], cut, spec)
    return ours, packed[0].numpy(), canvas_tokens(spec, cut, 16)


@pytest.mark.parametrize("limit", [None, 1, 2, 9])
@pytest.mark.parametrize("size", [(h, w) for w, h in SIZES], ids=str)
def test_features_are_joined_as_transformers_packs_them(size, limit):
    ours, theirs, tokens = _packed(size, limit)
    assert ours.shape == theirs.shape and len(ours) == tokens
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


JOINS = {
    "padding kept": ("map_rows", "(height - int(round(cut.height * (width / cut.width), 7))) // 2", "0"),
    "newline left out": ("join_tiles", "np.repeat(newline[None]", "np.repeat(0 * newline[None]"),
    "rows of tiles upside down": ("join_tiles", "grid.transpose(0, 2, 1, 3, 4)", "grid[::-1].transpose(0, 2, 1, 3, 4)"),
    "another tile as the whole picture": ("join_tiles", "np.concatenate([plain[0], np", "np.concatenate([plain[1], np"),
    "values not taken from pixels' middles": (
        "bilinear",
        "(np.arange(new) + 0.5) * (old / new) - 0.5",
        "np.arange(new) * (old / new)",
    ),
    "made smaller too early": ("smaller", "ratio > 1.1", "ratio > 0.5"),
}


@pytest.mark.parametrize("twin", JOINS)
def test_a_wrong_join_is_seen(twin, monkeypatch):
    function, old, new = JOINS[twin]
    monkeypatch.setattr(tiles, function, wrong(getattr(tiles, function), (old, new)))
    with pytest.raises(AssertionError):
        for width, height in SIZES:
            test_features_are_joined_as_transformers_packs_them((height, width), 2)


@pytest.mark.parametrize(("old", "new"), [((4, 6), (3, 5)), ((5, 5), (2, 7)), ((1, 9), (1, 4))])
def test_bilinear_is_torch_s_own(old, new):
    values = np.random.default_rng(0).standard_normal((*old, 3)).astype(np.float32)
    want = torch.nn.functional.interpolate(torch.from_numpy(values).permute(2, 0, 1)[None], list(new), mode="bilinear")[0]
    np.testing.assert_allclose(bilinear(values, new), want.permute(1, 2, 0).numpy(), rtol=0, atol=1e-6)


def test_a_tile_alone_is_its_features_and_the_newline():
    features = [np.arange(6, dtype=np.float32).reshape(3, 2)]
    spec = TilesSpec("canvas", 0, ((24, 24),), None, True, None)
    np.testing.assert_array_equal(join_tiles(features, Cut(), spec), features[0])
    assert canvas_tokens(spec, Cut(), 2) == 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_size_is_that_of_the_upright_picture(orientation, kind):
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    noise(30, 20).save(out, kind, exif=exif)
    upright = load_picture(out.getvalue())
    assert picture_size(out.getvalue()) == (upright.height, upright.width)
    assert picture_size(np.zeros((4, 6, 3), np.uint8)) == (4, 6)


def test_doctests():
    for module in (arithmetic, tiles):
        assert doctest.testmod(module).failed == 0


def test_a_picture_without_a_size_is_refused():
    for picture in (None, b"no picture", Image.new("RGB", (0, 3))):
        with pytest.raises(InputError):
            picture_size(picture)
