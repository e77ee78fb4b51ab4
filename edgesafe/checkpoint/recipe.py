"""Recipes: what a model family is, as TOML, read strictly; align and export read a checkpoint through them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesafe.errors import ConfigError
from edgesafe.format.fields import Fields
from edgesafe.format.tiles import TileTexts

EXIT_STATES = ("raw", "normed")
SELECT_STRATEGIES = ("default", "full")
CUTS = ("", "grid", "canvas")


@dataclass(frozen=True)
class Recipe:
    """Where parts sit, what an exit hands on, how pictures are cut; `recipes/llava.toml` explains each key."""

    title: str
    model_type: str
    vision_types: tuple[str, ...]
    tower: str
    embeddings: str
    patch_mask: bool
    norm_before_blocks: str
    blocks: str
    exit_state: str
    norm_after_blocks: str
    reference: str
    extra_tokens: int
    projector: str
    shuffle: str
    newline: str
    select_strategies: tuple[str, ...]
    cut: str
    limit: str
    texts: TileTexts | None
    text_types: tuple[str, ...]
    decoder: str
    lm_head: str

    def describe(self) -> str:
        """What the recipe covers, for messages: `llava (clip_vision_model tower, llama text)`."""
        return f"{self.model_type} ({' or '.join(self.vision_types)} tower, {' or '.join(self.text_types)} text)"

    def reference_layer(self, config: Any) -> Any:
        """What a checkpoint's config says that its projector reads; the last block where it does not say."""
        return getattr(config, self.reference) if self.reference else config.vision_config.num_hidden_layers

    def patches_a_token(self, config: Any) -> int:
        """How many patches the projector joins into one image token."""
        return int(getattr(config, self.shuffle)) ** 2 if self.shuffle else 1


def recipes_folder() -> Path:
    """Where the recipes lie: beside this file."""
    return Path(__file__).parent / "recipes"


def load_recipes(folder: Path | None = None) -> dict[str, Recipe]:
    """Every recipe by the model type that it is for.

    Raises:
        ConfigError: There is none, two are for one model type, or a file has a wrong, missing or unknown key.
    """
    folder = folder or recipes_folder()
    recipes: dict[str, Recipe] = {}
    for path in sorted(folder.glob("*.toml")):
        recipe = _read(path)
        if recipe.model_type in recipes:
            raise ConfigError(f"a second recipe for {recipe.model_type!r}", where=str(path), todo="keep one of the two")
        recipes[recipe.model_type] = recipe
    if not recipes:
        raise ConfigError(
            "no recipe of a model family is installed",
            where=str(folder),
            expected="one TOML file a family",
            todo="install edgesafe again: pip install --force-reinstall 'edgesafe[export]'",
        )
    return recipes


def refused_families() -> dict[str, str]:
    """Families that an early exit would break, by model type, with the reason."""
    path = recipes_folder() / "refused" / "families.toml"
    fields = Fields(_toml(path), str(path), ConfigError)
    return {name: fields.text(name) for name in fields.obj}


def _read(path: Path) -> Recipe:
    return recipe_from_dict(_toml(path), where=str(path))


def _toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe can't be read: {error}", where=str(path), expected="a TOML file") from error


def recipe_from_dict(obj: Mapping[str, Any], *, where: str) -> Recipe:
    """Read a recipe strictly: every key known and there.

    Raises:
        ConfigError: A key is wrong, missing or unknown.
    """
    fields = Fields(obj, where, ConfigError)
    vision, projector, pictures, text = (fields.child(key) for key in ("vision", "projector", "pictures", "text"))
    texts = TileTexts(*(pictures.text(key) for key in ("tile", "row_end", "whole", "alone")))
    recipe = Recipe(
        title=fields.text("title"),
        model_type=fields.text("model_type"),
        vision_types=vision.texts("model_types"),
        tower=vision.text("tower"),
        embeddings=vision.text("embeddings"),
        patch_mask=vision.flag("patch_mask"),
        norm_before_blocks=vision.text("norm_before_blocks"),
        blocks=vision.text("blocks"),
        exit_state=vision.choice("exit_state", EXIT_STATES),
        norm_after_blocks=vision.text("norm_after_blocks"),
        reference=vision.text("reference"),
        extra_tokens=vision.integer("extra_tokens"),
        projector=projector.text("module"),
        shuffle=projector.text("shuffle"),
        newline=projector.text("newline"),
        select_strategies=projector.texts("select_strategies"),
        cut=pictures.choice("cut", CUTS),
        limit=pictures.text("limit"),
        texts=texts if texts.tile else None,
        text_types=text.texts("model_types"),
        decoder=text.text("decoder"),
        lm_head=text.text("lm_head"),
    )
    for part in (vision, projector, pictures, text, fields):
        part.done()
    _check(recipe, where)
    return recipe


def _check(recipe: Recipe, where: str) -> None:
    """Refuse a recipe that contradicts itself."""
    if (recipe.exit_state == "normed") != bool(recipe.norm_after_blocks):
        raise ConfigError("exit_state and norm_after_blocks disagree", where=where, expected="a norm where the state is normed")
    if (recipe.cut == "grid") != (recipe.texts is not None):
        raise ConfigError("cut and the texts around tiles disagree", where=where, expected="texts for the cut 'grid' alone")
    unknown = sorted(set(recipe.select_strategies) - set(SELECT_STRATEGIES))
    if unknown:
        raise ConfigError(
            f"unknown select strategy {unknown[0]!r}", where=where, expected="one of " + ", ".join(SELECT_STRATEGIES)
        )
