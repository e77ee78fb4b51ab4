"""Align, evaluate and export hold one view of a checkpoint's sizes, and it is the published one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from edgesafe.checkpoint.exit_model import exit_state, exit_states, load, pixel_values, project
from edgesafe.checkpoint.geometry import read_geometry
from edgesafe.checkpoint.recipe import load_recipes
from edgesafe.errors import ConfigError, InputError, UnsupportedModelError
from edgesafe.format.exits import Exit
from edgesafe_export.family import load_family
from edgesafe_export.skeleton import open_sketch
from tiny_families import BLOCKS, NAMES, PATCH, TEXT_WIDTH, TILE, WIDTH, edit, make_tiny, picture

DATA = os.environ.get("EDGESAFE_DATA", "")
# Blocks, reference depth, picture side, tokens of a tile with CLS, dropped ones, image tokens, newline rows, head size and
# context: from the papers and model cards. Patches by hand: (336 / 14)^2 = 576, (384 // 14)^2 = 729, (512 / 16)^2 / 4^2 = 64.
PUBLISHED = {
    "llava-1.5-7b-hf": (24, 23, 336, 577, 1, 576, 0, 128, 4096),
    "llava-v1.6-vicuna-7b-hf": (24, 23, 336, 577, 1, 576, 1, 128, 4096),
    "llava-v1.6-mistral-7b-hf": (24, 23, 336, 577, 1, 576, 1, 128, 32768),
    "llava-onevision-qwen2-0.5b-ov-hf": (26, 26, 384, 729, 0, 729, 1, 64, 32768),
    "smolvlm-256m-instruct": (12, 12, 512, 1024, 0, 64, 0, 64, 8192),
    "smolvlm2-500m-video-instruct": (12, 12, 512, 1024, 0, 64, 0, 64, 8192),
}


@pytest.mark.parametrize("name", ["llava", *NAMES])
def test_align_and_export_hold_one_view_of_every_family(name, tiny_llava, tmp_path):
    folder = tiny_llava if name == "llava" else make_tiny(name, tmp_path / "m")
    exits, family, sketch = load(folder), load_family(folder), open_sketch(folder)
    assert exits.geometry == family.geometry == sketch.family.geometry
    assert exits.chat == family.chat and exits.eos_ids == family.eos_token_ids
    assert sketch.family.eos_token_ids == exits.eos_ids
    geometry = exits.geometry
    assert exits.reference == geometry.reference == Exit(geometry.reference_depth)
    # The oracles are the tensors themselves: what the tower gives, what the projector makes of it, and the configs by hand.
    states = exit_states(exits, pixel_values(exits, [picture()]))
    assert len(states) == geometry.n_blocks + 1
    assert states[0].shape == (1, geometry.states, geometry.vision_width)
    with torch.no_grad():
        assert project(exits, exit_state(exits, states, Exit(1))).shape == (1, geometry.rows, geometry.text_width)
        assert family.head()(torch.zeros(1, geometry.tokens, geometry.vision_width)).shape == (
            geometry.rows,
            geometry.text_width,
        )
    if name != "llava":
        assert (geometry.n_blocks, geometry.image_size) == (BLOCKS + name.startswith("llava_next"), TILE)
        assert (geometry.patch_size, geometry.vision_width, geometry.text_width) == (PATCH, WIDTH, TEXT_WIDTH)


@pytest.mark.skipif(not DATA, reason="EDGESAFE_DATA names no folder of public data")
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_families_have_their_published_sizes(name):
    config = AutoConfig.from_pretrained(Path(DATA, "vlm-configs", name))
    g = read_geometry(config, load_recipes()[config.model_type])
    found = (g.n_blocks, g.reference_depth, g.image_size, g.tokens, g.dropped, g.image_tokens, g.newline_rows, g.head_dim)
    assert (*found, g.context_length) == PUBLISHED[name]


@pytest.fixture(scope="module")
def next_folder(tmp_path_factory):
    return make_tiny("llava_next", tmp_path_factory.mktemp("tiny") / "next")


@pytest.mark.parametrize(
    ("change", "error", "shown"),
    [
        ({"vision_feature_layer": [-2, -1]}, UnsupportedModelError, r"several vision layers \(\[-2, -1\]\)"),
        ({"vision_feature_layer": True}, UnsupportedModelError, "several vision layers"),
        ({"vision_feature_layer": 0}, ConfigError, "isn't a block of a tower with 4"),
        ({"vision_feature_layer": -5}, ConfigError, "isn't a block of a tower with 4"),
        ({"vision_feature_select_strategy": "full"}, UnsupportedModelError, "the select strategy 'full'"),
        ({"vision_feature_select_strategy": "mean"}, UnsupportedModelError, "the select strategy 'mean'"),
        ({"vision_feature_select_strategy": None}, UnsupportedModelError, "the select strategy None"),
        ({"vision_config.patch_size": None}, InputError, "patch_size is missing.*vision_config.patch_size"),
        ({"vision_config.patch_size": 0}, InputError, "patch_size is 0"),
        ({"vision_config.image_size": [24, 24]}, InputError, r"image_size is \[24, 24\]"),
        ({"vision_config.patch_size": 48}, InputError, "can't be joined"),
        ({"text_config.max_position_embeddings": None}, InputError, "max_position_embeddings is missing"),
        ({"vision_config.model_type": "siglip_vision_model"}, UnsupportedModelError, "siglip_vision_model.*clip_vision_model"),
        ({"text_config.model_type": "qwen2"}, UnsupportedModelError, "'qwen2' language model"),
        ({"text_config.sliding_window": 128}, UnsupportedModelError, "the last 128 tokens"),
    ],
    ids=str,
)
def test_what_is_refused_is_refused_for_all_with_its_reason(next_folder, change, error, shown):
    config = AutoConfig.from_pretrained(next_folder)
    recipe = load_recipes()["llava_next"]
    read_geometry(config, recipe)
    for path, value in change.items():
        part, _, key = path.rpartition(".")
        # Straight into the table: transformers' own checks of a config's types are not what is tried here.
        vars(getattr(config, part) if part else config)[key] = value
    with pytest.raises(error, match=shown):
        read_geometry(config, recipe)


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_patches_that_are_not_joined_evenly_are_refused(tmp_path, name):
    folder = edit(make_tiny(name, tmp_path / "m"), "config.json", scale_factor=3)  # 4 x 4 patches
    for read in (load, load_family, open_sketch):
        with pytest.raises(InputError, match="16 patches can't be joined by 9"):
            read(folder)


def test_a_member_that_keeps_cls_has_the_features_of_transformers(tiny_llava, tmp_path):
    folder = shutil.copytree(tiny_llava, tmp_path / "full")
    edit(folder, "config.json", vision_feature_select_strategy="full")
    exits = load(folder)
    assert (exits.geometry.dropped, exits.patches, exits.image_tokens) == (0, 37, 37)  # 72 px in patches of 12, and CLS
    pixels = pixel_values(exits, [picture()])
    for depth in range(1, exits.n_blocks + 1):
        with torch.no_grad():
            mine = project(exits, exit_state(exits, exit_states(exits, pixels), Exit(depth)))[0]
            want = exits.model.model.get_image_features(pixel_values=pixels, vision_feature_layer=depth).pooler_output[0]
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5)
