"""LLaVA with a DINOv2 tower seen from its exits, and recipes for a family's other towers."""

from __future__ import annotations

import pytest
import torch

from edgesafe.checkpoint.exit_model import exit_state, exit_states, load, load_tower, pixel_values, project
from edgesafe.checkpoint.load import open_geometry
from edgesafe.checkpoint.recipe import RECIPES_VARIABLE, load_recipes
from edgesafe.errors import ConfigError, InputError, UnsupportedModelError
from edgesafe.format.exits import Exit
from edgesafe_export.family import load_family
from edgesafe_export.skeleton import open_sketch
from tiny_families import DINOV2, PATCH, TILE, edit, make_tiny, picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(DINOV2, tmp_path_factory.mktemp("tiny") / "dinov2")


def test_all_hold_one_view_of_the_sizes(folder):
    exits, family, sketch = load(folder), load_family(folder), open_sketch(folder)
    assert exits.geometry == family.geometry == sketch.family.geometry == open_geometry(folder)[1]
    g = exits.geometry  # the pictures' size, and not that of the positions; the MLP's width by its ratio
    assert (g.image_size, g.tokens, g.dropped, g.image_tokens, g.vision_inner) == (TILE, (TILE // PATCH) ** 2 + 1, 1, 16, 64)
    assert (g.n_blocks, g.reference_depth) == (4, 3)


@pytest.mark.parametrize("first_by_transformers", [False, True])
def test_features_are_transformers_at_every_depth(folder, first_by_transformers):
    """Whoever asked first: transformers hangs its hooks on the part that runs the blocks, once."""
    exits = load(folder)
    pixels = pixel_values(exits, [picture(), picture(30, 90)])
    with torch.no_grad():
        if first_by_transformers:
            exits.model.model.vision_tower(pixels, output_hidden_states=True)
        for deepest in (4, 2, None):
            states = exit_states(exits, pixels, deepest)
            assert len(states) == (4 if deepest is None else deepest) + 1
        for depth in range(1, 5):
            out = exits.model.model.get_image_features(pixel_values=pixels, vision_feature_layer=depth).pooler_output
            mine = project(exits, exit_state(exits, states, Exit(depth)))
            torch.testing.assert_close(mine, torch.stack(list(out)), rtol=1e-5, atol=1e-5)


def test_the_tower_alone_gives_the_same_states(folder):
    whole, alone = load(folder), load_tower(folder)
    pixels = pixel_values(whole, [picture()])
    for one, other in zip(exit_states(whole, pixels), exit_states(alone, pixels), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["dinov2_with_registers", "siglip_vision_model"])
def test_other_towers_are_refused_with_those_that_are_taken(folder, tmp_path, kind):
    import shutil

    other = shutil.copytree(folder, tmp_path / "m")
    edit(other, "config.json", vision_config={"model_type": kind, "hidden_size": 32, "num_hidden_layers": 4})
    with pytest.raises(UnsupportedModelError, match=f"'{kind}' tower.*clip_vision_model or dinov2 tower"):
        load(other)


def test_pictures_that_are_not_square_are_refused(folder, tmp_path):
    odd = make_tiny(DINOV2, tmp_path / "m", crop_size={"height": 24, "width": 18})
    with pytest.raises(InputError, match="24 x 18"):
        load_family(odd)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('extends = "llava"\nmodel_type = "llava"\n', "a second recipe for 'llava' with the tower 'clip_vision_model'"),
        ('extends = "llava"\nmodel_type = "llava"\n[vision]\nmodel_types = ["dinov2"]\n', "with the tower 'dinov2'"),
        ('extends = "mine"\nmodel_type = "mine"\n', "extends 'mine', itself"),
        ('extends = "llava"\nmodel_type = "llava"\n[vision]\nmodel_types = ["x"]\nblock = ""\n', "did you mean 'blocks'"),
    ],
)
def test_a_tower_s_recipe_is_read_as_strictly(tmp_path, monkeypatch, text, shown):
    (tmp_path / "own.toml").write_text(text)
    monkeypatch.setenv(RECIPES_VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match=shown):
        load_recipes()


def test_a_tower_of_one_s_own_goes_over_its_family_alone(tmp_path, monkeypatch):
    (tmp_path / "own.toml").write_text('extends = "llava_next"\nmodel_type = "llava_next"\n[vision]\nmodel_types = ["x"]\n')
    before = load_recipes()
    monkeypatch.setenv(RECIPES_VARIABLE, str(tmp_path))
    after = load_recipes()
    (mine,) = after["llava_next"].others
    assert mine.vision_types == ("x",) and mine.newline == "model.image_newline" and "x tower" in after["llava_next"].describe()
    assert {name: recipe for name, recipe in after.items() if name != "llava_next"} == {
        name: recipe for name, recipe in before.items() if name != "llava_next"
    }
