"""Recipes are read strictly, say only what differs, and may come from outside the package."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from edgesafe.checkpoint.exit_model import exit_state, exit_states, greedy, load, open_images, pixel_values, prompt_ids
from edgesafe.checkpoint.recipe import RECIPES_VARIABLE, load_recipes, recipe_from_dict, recipes_folder
from edgesafe.device import load_device
from edgesafe.errors import ConfigError, UnsupportedModelError
from edgesafe.format.exits import parse_exits
from edgesafe.runtime.session import Session
from edgesafe_export import export_bundle
from edgesafe_export.family import load_family
from edgesafe_export.skeleton import open_sketch
from tiny_families import NAMES, edit, make_tiny

SINGLE = "model.safetensors"
TWO_KEYS = 'extends = "llava"\nmodel_type = "my_llava"\n'


@pytest.fixture
def llava():
    return tomllib.loads((recipes_folder() / "llava.toml").read_text(encoding="utf-8"))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of one's own recipes, named by the environment; a function that writes one there."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    monkeypatch.setenv(RECIPES_VARIABLE, str(folder))

    def write(text: str, name: str = "own.toml") -> Path:
        (folder / name).write_text(text)
        return folder

    return write


def test_the_shipped_recipes_say_what_the_families_are():
    recipes = load_recipes()
    # By transformers' model code: which of them run post_layernorm, drop CLS, end rows with a newline, join patches.
    assert {
        name: (r.norm_after_blocks, r.extra_tokens, bool(r.newline), bool(r.shuffle), r.cut) for name, r in recipes.items()
    } == {
        "llava": ("", 1, False, False, ""),
        "llava_next": ("", 1, True, False, "canvas"),
        "llava_onevision": ("", 0, True, False, "canvas"),
        "idefics3": ("post_layernorm", 0, False, True, "grid"),
        "smolvlm": ("post_layernorm", 0, False, True, "grid"),
    }


def test_a_recipe_s_keys_are_known_and_the_root_has_them_all(llava):
    recipe_from_dict(llava, where="llava.toml")
    for table in ("vision", "projector", "pictures", "text"):
        for key in llava[table]:
            less = {**llava, table: {k: v for k, v in llava[table].items() if k != key}}
            with pytest.raises(ConfigError, match=f"'{key}' is missing"):
                recipe_from_dict(less, where="llava.toml")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('model_type = "m"\n[vision]\ntowr = "x"', "unknown key 'towr', did you mean 'tower'"),
        ('model_type = "m"\nvison = 3', "unknown key 'vison', did you mean 'vision'"),
        ('model_type = "m"\nvision = 3', "vision is the int 3"),
        ('model_type = "m"\n[vision]\nextra_tokens = -1', "extra_tokens"),
        ('model_type = "m"\n[projector]\nselect_strategies = ["mean"]', "unknown select strategy 'mean'"),
        ('model_type = "m"\n[text]\nmodel_types = "llama"', "model_types"),
        ('model_type = "m"\n[pictures]\ncut = "grid"', "cut and the texts around tiles disagree"),
        ('model_type = "m"\n[vision]\nexit_state = "raw"', "the key exit_state was removed.*norm_after_blocks"),
        ('extends = "llava"', "'model_type' is missing"),
        ("model_type = 3", "model_type"),
        ('model_type = "m"\nextends = "lava"', "extends 'lava', which has no recipe.*llava"),
        ('model_type = "m"\nextends = ["llava"]', "extends"),
        ('model_type = "m"\nextends = "m"', "extends 'm', itself"),
        ('model_type = "llava"', "a second recipe for 'llava'"),
        ("= no toml", "can't be read"),
    ],
)
def test_a_recipe_of_one_s_own_is_read_as_strictly(own, text, shown):
    own(text)
    with pytest.raises(ConfigError, match=shown):
        load_recipes()


def test_a_circle_of_recipes_is_refused(own):
    own('model_type = "a"\nextends = "b"', "a.toml")
    own('model_type = "b"\nextends = "a"', "b.toml")
    with pytest.raises(ConfigError, match="itself"):
        load_recipes()


def test_a_recipe_goes_over_the_one_that_it_extends_table_by_table(own):
    own('model_type = "mine"\nextends = "smolvlm"\n[vision]\nblocks = "layers"')
    recipes = load_recipes()
    mine, base = recipes["mine"], recipes["smolvlm"]
    changed = {key for key, value in vars(mine).items() if value != getattr(base, key)}
    assert changed == {"model_type", "extends", "blocks"} and mine.blocks == "layers"


def test_a_folder_without_recipes(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no recipe of a model family is installed"):
        load_recipes([tmp_path])
    for folder in (tmp_path, tmp_path / "missing"):
        monkeypatch.setenv(RECIPES_VARIABLE, str(folder))
        with pytest.raises(ConfigError, match=f"{RECIPES_VARIABLE}=.*"):
            load_recipes()


@pytest.fixture(scope="module")
def my_llava(tiny_llava, tmp_path_factory):
    """A checkpoint of a family that edgesafe does not know, as a package of somebody else's gives it to transformers."""
    from transformers import (
        AutoConfig,
        AutoModelForImageTextToText,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    class MyConfig(LlavaConfig):
        model_type = "my_llava"

    class MyModel(LlavaForConditionalGeneration):
        config_class = MyConfig

    AutoConfig.register("my_llava", MyConfig)
    AutoModelForImageTextToText.register(MyConfig, MyModel)
    folder = Path(shutil.copytree(tiny_llava, tmp_path_factory.mktemp("my") / "my_llava"))
    known = LlavaForConditionalGeneration.from_pretrained(tiny_llava)
    config = {key: value for key, value in known.config.to_dict().items() if key != "model_type"}
    model = MyModel(MyConfig(**config))
    model.load_state_dict(known.state_dict())
    model.save_pretrained(folder)
    return folder


def test_an_unknown_family_is_told_how_to_be_described(my_llava):
    for read in (load, load_family):
        with pytest.raises(
            UnsupportedModelError, match=f"'my_llava' is not supported.*To do: .*recipe.*{RECIPES_VARIABLE}=DIR"
        ):
            read(my_llava)


def test_two_keys_from_outside_add_a_family_to_align_and_export(own, my_llava, tiny_llava, tmp_path):
    own(TWO_KEYS)
    mine, theirs = load(my_llava), load(tiny_llava)
    picture = tmp_path / "x.png"
    Image.linear_gradient("L").convert("RGB").resize((90, 60)).save(picture)
    said = []
    for exits in (mine, theirs):
        states = exit_states(exits, pixel_values(exits, open_images([picture])))
        said.append(
            [
                greedy(exits, [prompt_ids(exits, "What?")], exit_state(exits, states, e), 8)
                for e in parse_exits("all", exits.n_blocks)
            ]
        )
    assert mine.recipe.model_type == "my_llava" and mine.geometry == theirs.geometry and said[0] == said[1]
    out = tmp_path / "bundle"
    bundle = export_bundle(my_llava, out, load_device("host"), vision_scheme="fp32", text_scheme="fp32", exits="2,3")
    assert bundle.manifest.family == "my_llava"
    with Session.open(out, allow_uncertified=True) as session:
        answer = session.ask(picture, "What?", exit=2, max_new_tokens=8)
    assert [answer.text.strip()] == said[1][1]
    assert torch.equal(load_family(my_llava).model.lm_head.weight, theirs.model.lm_head.weight)


@pytest.mark.parametrize("parent", ["llava", *NAMES])
def test_two_keys_are_enough_for_a_name_that_transformers_does_not_know(own, tiny_llava, tmp_path, parent):
    """Weights under the names that they have on disk, a processor of the family's own, and a recipe of a recipe."""
    family, mine = parent.split()[0], f"unheard_{parent.replace(' ', '_')}"
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "m")) if parent == "llava" else make_tiny(parent, tmp_path / "m")
    own(f'extends = "{family}"\nmodel_type = "{mine}"\n')
    own(f'extends = "{mine}"\nmodel_type = "{mine}_2"\n', "next.toml")
    theirs = load(folder)
    for name in (f"{mine}_2", mine):
        edit(folder, "config.json", model_type=name)
        exits, sketch = load(folder), open_sketch(folder)
        want = dict(theirs.model.named_parameters())
        got = dict(exits.model.named_parameters())
        assert got.keys() == want.keys() == sketch.stored.keys() and all(torch.equal(got[n], want[n]) for n in want)
        assert (exits.chat, exits.geometry, exits.recipe.model_type) == (theirs.chat, theirs.geometry, name)
        exits.model.save_pretrained(tmp_path / name)  # as align does
        saved = json.loads((tmp_path / name / "config.json").read_text())
        assert saved["model_type"] == name and load_file(tmp_path / name / SINGLE).keys() == load_file(folder / SINGLE).keys()
