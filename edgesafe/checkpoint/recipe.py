"""Recipes: what a model family is, as TOML, read strictly; align and export read a checkpoint through them.

A recipe says only where it differs from the one it `extends`: LLaVA-1.5's, unless it names another. A family of your own is a
TOML file in the folder that the environment variable `EDGESAFE_RECIPES` names; two keys are enough for one that is built alike:

    extends = "llava_next"
    model_type = "my_llava"

A family whose towers are built differently has a file for each: one that extends its own model type is for another tower.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgesafe.checkpoint.relatives import introduce
from edgesafe.checkpoint.weight_files import read_raw_config
from edgesafe.errors import ConfigError, UnsupportedModelError
from edgesafe.format.fields import Fields
from edgesafe.format.tiles import TileTexts

# Names a folder with recipes of one's own.
RECIPES_VARIABLE = "EDGESAFE_RECIPES"
# The recipe whose values are the defaults of all others.
_ROOT = "llava"
SELECT_STRATEGIES = ("default", "full")
CUTS = ("", "grid", "canvas")
# How an exit may see less of a picture: fewer visual tokens, or fewer tiles.
SQUARE, TILES = "square", "tiles"
FEWER = ("", SQUARE, TILES)


@dataclass(frozen=True)
class Recipe:
    """Where parts sit, what an exit hands on, how pictures are cut; `recipes/llava.toml` explains each key.

    `extends` is the model type of the recipe that it goes over; "" for the root. `others` are the same family's recipes for
    other towers.
    """

    model_type: str
    extends: str
    vision_types: tuple[str, ...]
    tower: str
    embeddings: str
    patch_mask: bool
    positions: str
    norm_before_blocks: str
    blocks: str
    norm_after_blocks: str
    map_after_norm: bool
    reference: str
    extra_tokens: int
    projector: str
    shuffle: str
    newline: str
    select_strategies: tuple[str, ...]
    cut: str
    fewer: str
    limit: str
    texts: TileTexts | None
    text_types: tuple[str, ...]
    decoder: str
    lm_head: str
    others: tuple[Recipe, ...] = ()

    def describe(self) -> str:
        """What the recipe covers, for messages: `llava (clip_vision_model or dinov2 tower, llama text)`."""
        towers = [tower for recipe in (self, *self.others) for tower in recipe.vision_types]
        return f"{self.model_type} ({' or '.join(towers)} tower, {' or '.join(self.text_types)} text)"

    def of(self, config: Any) -> Recipe:
        """The family's recipe for a checkpoint's tower; this one where there is none for it."""
        kind = config.vision_config.model_type
        return next((recipe for recipe in (self, *self.others) if kind in recipe.vision_types), self)

    def reference_layer(self, config: Any) -> Any:
        """What a checkpoint's config says that its projector reads; the last block where it does not say."""
        return getattr(config, self.reference) if self.reference else config.vision_config.num_hidden_layers

    def patches_a_token(self, config: Any) -> int:
        """How many patches the projector joins into one image token."""
        return int(getattr(config, self.shuffle)) ** 2 if self.shuffle else 1


def recipes_folder() -> Path:
    """Where the recipes lie: beside this file."""
    return Path(__file__).parent / "recipes"


def recipe_folders() -> tuple[Path, ...]:
    """The installed recipes' folder, and the one that the environment names.

    Raises:
        ConfigError: The environment names no folder with recipes in it.
    """
    named = os.environ.get(RECIPES_VARIABLE)
    if not named:
        return (recipes_folder(),)
    if not any(Path(named).glob("*.toml")):
        raise ConfigError(
            "the folder has no recipes",
            where=f"{RECIPES_VARIABLE}={named}",
            expected="a folder with one TOML file for each family",
            todo=f"name another folder, or unset {RECIPES_VARIABLE}",
        )
    return recipes_folder(), Path(named)


def load_recipes(folders: Sequence[Path] | None = None) -> dict[str, Recipe]:
    """Every recipe by the model type that it is for, those for other towers of the same type inside it.

    Args:
        folders: By default the installed ones and the environment's.

    Raises:
        ConfigError: There is none, two are for one model type and tower, or a file has a wrong or unknown key.
    """
    folders = recipe_folders() if folders is None else folders
    tables: dict[str, tuple[str, dict[str, Any]]] = {}
    towers: list[tuple[str, dict[str, Any]]] = []
    for path in (path for folder in folders for path in sorted(folder.glob("*.toml"))):
        table = _toml(path)
        name = Fields(table, str(path), ConfigError).text("model_type")
        if table.get("extends") == name:
            towers.append((str(path), table))
            continue
        if name in tables:
            raise ConfigError(f"a second recipe for {name!r}", where=str(path), todo="keep one of the two")
        tables[name] = str(path), table
    if not tables:
        raise ConfigError(
            "no recipe of a model family is installed",
            where=", ".join(map(str, folders)),
            expected="one TOML file for each family",
            todo="install edgesafe again: pip install --force-reinstall 'edgesafe[export]'",
        )
    recipes = {name: recipe_from_dict(_extended(name, tables), where=where) for name, (where, _) in tables.items()}
    for where, table in towers:
        recipes[table["model_type"]] = _with_tower(recipes, tables, where, table)
    return recipes


def _with_tower(
    recipes: Mapping[str, Recipe], tables: Mapping[str, tuple[str, dict[str, Any]]], where: str, table: dict[str, Any]
) -> Recipe:
    """A family's recipe with one more tower.

    Raises:
        ConfigError: There is no such family, or it has a recipe for that tower.
    """
    name = table["model_type"]
    if name not in recipes:
        raise ConfigError(
            f"it extends {name!r}, itself",
            where=where,
            expected="the model type of another recipe: " + ", ".join(sorted(recipes)),
            todo="correct the key 'extends'",
        )
    family, more = recipes[name], recipe_from_dict(_over(_extended(name, tables), table), where=where)
    taken = {tower for recipe in (family, *family.others) for tower in recipe.vision_types}
    if twice := sorted(taken & set(more.vision_types)):
        raise ConfigError(f"a second recipe for {name!r} with the tower {twice[0]!r}", where=where, todo="keep one of the two")
    return replace(family, others=(*family.others, more))


def _extended(name: str, tables: Mapping[str, tuple[str, dict[str, Any]]], below: tuple[str, ...] = ()) -> dict[str, Any]:
    """A recipe's table over that of the recipe which it extends, all the way down to the root's."""
    where, table = tables[name]
    if name == _ROOT:
        return table
    fields = Fields(table, where, ConfigError)
    parent = fields.text("extends") if fields.has("extends") else _ROOT
    if parent not in tables or parent in (name, *below):
        raise ConfigError(
            f"it extends {parent!r}, " + ("itself" if parent in (name, *below) else "which has no recipe"),
            where=where,
            expected="the model type of another recipe: " + ", ".join(sorted(set(tables) - {name, *below})),
            todo="correct the key 'extends'",
        )
    return {**_over(_extended(parent, tables, (*below, name)), table), "extends": parent}


def _over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """One table over another, table by table; keys that the base lacks stay, to be refused as unknown."""
    both = {
        key: _over(base[key], own[key])
        for key in base.keys() & own.keys()
        if isinstance(base[key], dict) and isinstance(own[key], dict)
    }
    return {**base, **own, **both}


def check_family(folder: Path, recipes: Mapping[str, Recipe]) -> None:
    """Refuse a family without a recipe before anything else is read; transformers is told of one that it doesn't know.

    Raises:
        UnsupportedModelError: With the reason, where an early exit would break it.
    """
    named = read_raw_config(folder)["model_type"]
    if named not in recipes:
        why = refused_families().get(named)
        own = "" if why else f", or describe the family in a recipe of your own: {RECIPES_VARIABLE}=DIR"
        raise unsupported(f"model family {named!r}", recipes.values(), str(folder), why, own)
    introduce(named, {name: recipe.extends for name, recipe in recipes.items()})


def unsupported(
    what: str, recipes: Iterable[Recipe], where: str, why: str | None = None, more: str = ""
) -> UnsupportedModelError:
    """The error for a checkpoint that no recipe covers; `more` is what else the reader can do."""
    return UnsupportedModelError(
        f"{what} is not supported" + (f": {why}" if why else ""),
        where=where,
        expected="; ".join(recipe.describe() for recipe in recipes),
        todo="use a supported checkpoint" + more,
    )


def refused_families() -> dict[str, str]:
    """Families that an early exit would break, by model type, with the reason."""
    path = recipes_folder() / "refused" / "families.toml"
    fields = Fields(_toml(path), str(path), ConfigError)
    return {name: fields.text(name) for name in fields.obj}


def _toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe can't be read: {error}", where=str(path), expected="a TOML file") from error


def recipe_from_dict(obj: Mapping[str, Any], *, where: str) -> Recipe:
    """Read a whole recipe strictly: every key known and there.

    Raises:
        ConfigError: A key is wrong, missing or unknown.
    """
    fields = Fields(obj, where, ConfigError)
    if isinstance(obj.get("vision"), Mapping) and "exit_state" in obj["vision"]:
        raise ConfigError(
            "the key exit_state was removed",
            where=f"{where}: vision",
            expected="norm_after_blocks alone: a norm that it names runs between an exit and the projector",
            todo="remove 'exit_state'",
        )
    vision, projector, pictures, text = (fields.child(key) for key in ("vision", "projector", "pictures", "text"))
    texts = TileTexts(*(pictures.text(key) for key in ("tile", "row_end", "whole", "alone")))
    recipe = Recipe(
        model_type=fields.text("model_type"),
        extends=fields.text("extends") if fields.has("extends") else "",
        vision_types=vision.texts("model_types"),
        tower=vision.text("tower"),
        embeddings=vision.text("embeddings"),
        patch_mask=vision.flag("patch_mask"),
        positions=vision.text("positions"),
        norm_before_blocks=vision.text("norm_before_blocks"),
        blocks=vision.text("blocks"),
        norm_after_blocks=vision.text("norm_after_blocks"),
        map_after_norm=vision.flag("map_after_norm"),
        reference=vision.text("reference"),
        extra_tokens=vision.integer("extra_tokens"),
        projector=projector.text("module"),
        shuffle=projector.text("shuffle"),
        newline=projector.text("newline"),
        select_strategies=projector.texts("select_strategies"),
        cut=pictures.choice("cut", CUTS),
        fewer=pictures.choice("fewer", FEWER),
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
    if (recipe.cut == "grid") != (recipe.texts is not None):
        raise ConfigError("cut and the texts around tiles disagree", where=where, expected="texts for the cut 'grid' alone")
    if (recipe.fewer == TILES) > bool(recipe.cut):
        raise ConfigError("a picture with fewer tiles is cut into some", where=f"{where}: pictures.fewer", expected="a cut")
    if recipe.fewer == SQUARE and (recipe.cut or recipe.shuffle or recipe.newline):
        raise ConfigError(
            "a picture with fewer visual tokens is one square of them",
            where=f"{where}: pictures.fewer",
            expected="no cut, no shuffle and no newline beside it",
        )
    unknown = sorted(set(recipe.select_strategies) - set(SELECT_STRATEGIES))
    if unknown:
        raise ConfigError(
            f"unknown select strategy {unknown[0]!r}", where=where, expected="one of " + ", ".join(SELECT_STRATEGIES)
        )
