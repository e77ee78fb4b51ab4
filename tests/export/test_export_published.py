"""Preprocessing and prompts with the published families' own settings, against transformers' processors, on real pictures.

The settings and photographs are public data that lies outside the project: `EDGESAFE_DATA=DIR pytest ...`, where DIR has
`photos/*.jpg` and `vlm-configs/NAME/*.json`. The same arithmetic is tested without them in test_runtime_image and
test_runtime_tiles.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from edgesafe.checkpoint.load import read_config
from edgesafe.checkpoint.recipe import load_recipes
from edgesafe.runtime import tokenizer
from edgesafe.runtime.tiles import picture_cut, pixel_values
from edgesafe_export.preprocessing import picture_specs
from tiny_families import write_text

DATA = os.environ.get("EDGESAFE_DATA", "")
pytestmark = pytest.mark.skipif(not DATA, reason="EDGESAFE_DATA names no folder of public data")
# The same Pillow resizes and the same float32 arithmetic follows: bit by bit equal, but for the last one.
ATOL = 1e-6
PHOTOS = sorted(Path(DATA, "photos").glob("*.jpg")) if DATA else []
# What a folder's processor_config.json says where no published one is at hand.
LIKE_CLIP = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
NAMES = {
    "llava-1.5-7b-hf": LIKE_CLIP,
    "llava-v1.6-vicuna-7b-hf": LIKE_CLIP,
    "llava-v1.6-mistral-7b-hf": LIKE_CLIP,
    "llava-onevision-qwen2-0.5b-ov-hf": {
        "num_image_tokens": 729,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    },
    "smolvlm-256m-instruct": {"image_seq_len": 64},
    "smolvlm2-500m-video-instruct": {"image_seq_len": 64},
}
SIZES = [(1, 1), (1, 9), (9, 1), (2, 150), (150, 2), (400, 40), (31, 500), (336, 336), (337, 335), (384, 385), (1025, 511)]
MODES = ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "I;16"]


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, channels), np.uint8)


def odd_pictures() -> dict[str, Image.Image]:
    """Sizes, modes and a lying photograph."""
    found = {f"{w}x{h}": Image.fromarray(noise(w, h)) for w, h in SIZES}
    rgba = Image.fromarray(noise(90, 70, 4))
    for mode in MODES:
        if mode == "I;16":
            found[mode] = Image.fromarray(noise(90, 70, 2).view(np.uint16)[:, :, 0])
        else:
            found[mode] = (rgba.convert("P") if mode == "PA" else rgba.convert("RGB") if mode != "RGBA" else rgba).convert(mode)
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    found["P"].info["transparency"] = 3
    Image.fromarray(noise(120, 50)).save(out, "JPEG", exif=exif)
    found["EXIF"] = Image.open(out)
    return found


@dataclass(frozen=True)
class Published:
    """A processor with published settings, and what the exporter would put into a manifest of it."""

    processor: Any
    manifest: Any
    tokenizer: Any


@pytest.fixture(scope="module", params=NAMES)
def published(request, tmp_path_factory) -> Published:
    source, folder = Path(DATA, "vlm-configs", request.param), tmp_path_factory.mktemp("published") / request.param
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    made = json.loads((folder / "preprocessor_config.json").read_text())
    for path in folder.glob("processor_config.json"):
        assert NAMES[request.param].items() <= json.loads(path.read_text()).items()
    kind = {"processor_class": made["processor_class"], "image_token": "<image>", **NAMES[request.param]}
    (folder / "processor_config.json").write_text(json.dumps(kind))
    write_text("smolvlm", folder, grid=6)  # no published tokenizer is needed to count tokens
    recipes = load_recipes()
    config, processor = read_config(folder, tuple(recipes))
    recipe = recipes[config.model_type]
    image, tiles = picture_specs(processor, config, recipe)
    side = (image.height // int(config.vision_config.patch_size)) ** 2
    manifest = SimpleNamespace(
        image=image,
        tiles=tiles,
        image_token="<image>",
        image_token_id=processor.image_token_id,
        image_tokens=side // recipe.patches_a_token(config),
        chat=SimpleNamespace(prefix="USER: <image>\n", suffix=" ASSISTANT:", add_special_tokens=True, control=()),
        text=SimpleNamespace(context_length=32768),
        tokenizer="tokenizer.json",
    )
    return Published(processor, manifest, tokenizer.load_tokenizer(folder / "tokenizer.json"))


def compare(published: Published, ours: Any, theirs: Image.Image) -> tuple[float, int, int]:
    """The largest difference of a pixel value, the number of tiles and that of ids; anything else that differs fails."""
    manifest, prompt = published.manifest, "What is this?"
    text = manifest.chat.prefix + prompt + manifest.chat.suffix
    inputs = published.processor(images=[theirs], text=text, return_tensors="np")
    want = np.asarray(inputs["pixel_values"])
    want = want.reshape(-1, *want.shape[-3:])
    got = pixel_values(ours, manifest)
    got = np.concatenate(got) if isinstance(got, list) else got
    assert got.shape == want.shape
    cut = picture_cut(ours, manifest)
    assert cut.tiles == len(want)
    ids = tokenizer.encode_prompt(published.tokenizer, manifest, prompt, cut)
    assert ids == np.asarray(inputs["input_ids"])[0].tolist()
    return float(np.abs(got - want).max()), len(got), len(ids)


def told(published: Published, kind: str, found: dict[str, tuple[float, int, int]]) -> None:
    """A line for `pytest -s`, then the verdict."""
    worst, tiles, ids = (list(column) for column in zip(*found.values(), strict=True))
    grey = max(worst) * max(published.manifest.image.std) * 255
    print(
        f"\n{kind}: {len(found)} pictures, {max(worst):.1e} ({grey:.1e} of 255), tiles {min(tiles)} to {max(tiles)},", end=" "
    )
    print(f"ids {min(ids)} to {max(ids)}, bit by bit equal {worst.count(0.0)}")
    assert [name for name, (error, *_) in found.items() if not error <= ATOL] == []


def test_photographs(published):
    assert len(PHOTOS) == 24
    told(published, "photographs", {path.name: compare(published, path, Image.open(path)) for path in PHOTOS})


def test_odd_pictures(published):
    # The documented difference: the runtime puts a lying picture upright, transformers doesn't.
    pictures = odd_pictures().items()
    told(published, "odd", {name: compare(published, p, ImageOps.exif_transpose(p)) for name, p in pictures})


def test_another_filter_is_seen(published):
    published.manifest.image = replace(right := published.manifest.image, resample="nearest")
    try:
        assert compare(published, PHOTOS[0], Image.open(PHOTOS[0]))[0] > 0.1
    finally:
        published.manifest.image = right
