"""Recipes: what a model family is, as TOML, read strictly."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesafe.errors import ConfigError
from edgesafe.records import Fields

EXIT_STATES = ("raw",)
SELECT_STRATEGIES = ("default", "full")


@dataclass(frozen=True)
class Recipe:
    """Where a family's parts sit and what an exit hands on; `export/recipes/llava.toml` explains each key."""

    title: str
    model_type: str
    vision_types: tuple[str, ...]
    tower: str
    embeddings: str
    norm_before_blocks: str
    blocks: str
    exit_state: str
    extra_tokens: int
    projector: str
    select_strategies: tuple[str, ...]
    text_types: tuple[str, ...]
    decoder: str
    lm_head: str

    def describe(self) -> str:
        """What the recipe covers, for messages: `llava (clip_vision_model tower, llama text)`."""
        return f"{self.model_type} ({' or '.join(self.vision_types)} tower, {' or '.join(self.text_types)} text)"


def recipes_folder() -> Path:
    """Where the recipes lie: inside the wheel, or beside the package in a checkout."""
    inside = Path(__file__).parent / "_recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


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


def _read(path: Path) -> Recipe:
    try:
        with path.open("rb") as file:
            obj = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe can't be read: {error}", where=str(path), expected="a TOML file") from error
    return recipe_from_dict(obj, where=str(path))


def recipe_from_dict(obj: Mapping[str, Any], *, where: str) -> Recipe:
    """Read a recipe strictly: every key known and there.

    Raises:
        ConfigError: A key is wrong, missing or unknown.
    """
    fields = Fields(obj, where, ConfigError)
    vision, projector, text = fields.child("vision"), fields.child("projector"), fields.child("text")
    recipe = Recipe(
        title=fields.text("title"),
        model_type=fields.text("model_type"),
        vision_types=vision.texts("model_types"),
        tower=vision.text("tower"),
        embeddings=vision.text("embeddings"),
        norm_before_blocks=vision.text("norm_before_blocks"),
        blocks=vision.text("blocks"),
        exit_state=vision.choice("exit_state", EXIT_STATES),
        extra_tokens=vision.integer("extra_tokens"),
        projector=projector.text("module"),
        select_strategies=projector.texts("select_strategies"),
        text_types=text.texts("model_types"),
        decoder=text.text("decoder"),
        lm_head=text.text("lm_head"),
    )
    for part in (vision, projector, text, fields):
        part.done()
    unknown = sorted(set(recipe.select_strategies) - set(SELECT_STRATEGIES))
    if unknown:
        raise ConfigError(
            f"unknown select strategy {unknown[0]!r}", where=where, expected="one of " + ", ".join(SELECT_STRATEGIES)
        )
    return recipe
