"""One view of a checkpoint's sizes: depths, token counts, which tokens are dropped, and what is refused.

Align, evaluate and export hold the same `Geometry`, so that they can't disagree about an exit. Tier 1: no torch is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from edgesafe.checkpoint.recipe import SQUARE, TILES, Recipe, unsupported
from edgesafe.errors import ConfigError, InputError
from edgesafe.format.exits import Exit, pool_windows, reference_depth
from edgesafe.format.specs import ImageSpec
from edgesafe.format.tiles import TilesSpec, caps

_WHERE = "config.json"
# What processors need to count a picture's tokens; an older processor_config.json may lack them.
_COUNTS = ("patch_size", "num_image_tokens", "vision_feature_select_strategy", "image_seq_len")


@dataclass(frozen=True)
class Geometry:
    """A checkpoint's sizes.

    Attributes:
        n_blocks: Blocks of the vision tower.
        reference_depth: How many of them the model was trained to use.
        image_size: Side of the tower's picture or tile, in pixels.
        patch_size: Side of a patch, in pixels.
        vision_width: Width of a state.
        vision_inner: Width inside a block's MLP.
        tokens: T, the tower's tokens of a picture or tile, the extra ones (CLS) among them.
        dropped: How many of them, all in front, the projector does not read.
        image_tokens: N, image tokens that the projector makes of a picture or tile.
        newline_rows: Rows behind them that hold the embedding which ends a row of a picture's features: 0 or 1.
        image_token_id: The token in whose places they stand.
        text_width: D, width of the language model.
        head_dim: Width of one of its attention heads.
        context_length: Tokens that fit.
    """

    n_blocks: int
    reference_depth: int
    image_size: int
    patch_size: int
    vision_width: int
    vision_inner: int
    tokens: int
    dropped: int
    image_tokens: int
    newline_rows: int
    image_token_id: int
    text_width: int
    head_dim: int
    context_length: int

    @property
    def reference(self) -> Exit:
        """The exit that the model was trained to use."""
        return Exit(self.reference_depth)

    @property
    def states(self) -> int:
        """P, the tokens of an exit's state that the projector reads."""
        return self.tokens - self.dropped

    @property
    def rows(self) -> int:
        """Rows of a tile's image features, with the newline's own, which comes last."""
        return self.image_tokens + self.newline_rows


def picture_side(config: Any, recipe: Recipe, image_processor: Any) -> int:
    """Side in pixels of the pictures that the tower gets: the processor's where it takes any size, else its config's.

    Args:
        config: transformers' config of the whole model.
        recipe: Its family's.
        image_processor: The checkpoint's.

    Raises:
        UnsupportedModelError: The processor does not lead to one size.
    """
    if recipe.positions:
        return ImageSpec.from_hf(image_processor.to_dict()).height
    return _size(config.vision_config, "image_size", "vision_config")


def read_geometry(config: Any, recipe: Recipe, side: int | None = None) -> Geometry:
    """A checkpoint's sizes by its config.

    Args:
        config: transformers' config of the whole model.
        recipe: Its family's.
        side: The tower's picture, as `picture_side` says; None: its config's.

    Raises:
        UnsupportedModelError: A member of the family that can't be cut.
        InputError: A number is missing, or the sizes contradict each other.
    """
    _check_member(config, recipe)
    vision, text = config.vision_config, config.text_config
    n_blocks, built, patch = (_size(vision, key, "vision_config") for key in ("num_hidden_layers", "image_size", "patch_size"))
    side = built if side is None else side
    tokens = (side // patch) ** 2 + recipe.extra_tokens
    dropped = 0 if _strategy(config) == "full" else recipe.extra_tokens
    joined = recipe.patches_a_token(config)
    if side < patch or (tokens - dropped) % joined:
        raise InputError(
            f"{tokens - dropped} patches can't be joined by {joined}",
            where=f"{_WHERE}: vision_config.image_size and patch_size",
            expected="a picture of whole image tokens",
            todo="use the config.json that belongs to these weights",
        )
    width = _size(text, "hidden_size", "text_config")
    return Geometry(
        n_blocks=n_blocks,
        reference_depth=reference_depth(n_blocks, recipe.reference_layer(config)),
        image_size=side,
        patch_size=patch,
        vision_width=_size(vision, "hidden_size", "vision_config"),
        vision_inner=_inner(vision),
        tokens=tokens,
        dropped=dropped,
        image_tokens=(tokens - dropped) // joined,
        newline_rows=int(bool(recipe.newline)),
        image_token_id=int(config.image_token_id),
        text_width=width,
        head_dim=int(getattr(text, "head_dim", None) or width // _size(text, "num_attention_heads", "text_config")),
        context_length=_size(text, "max_position_embeddings", "text_config"),
    )


def check_exits(exits: Iterable[Exit], recipe: Recipe, geometry: Geometry, tiles: TilesSpec | None = None) -> None:
    """Refuse exits with visual tokens or tiles that this checkpoint's pictures can't have.

    Args:
        exits: Which ones.
        recipe: The family's.
        geometry: The checkpoint's.
        tiles: How it cuts pictures; without it one tile stands for a picture, and no exit has fewer.

    Raises:
        ConfigError: The family has no square of tokens, or it has no smaller square of so many; likewise with tiles.
    """
    for exit in exits:
        if exit.tiles is not None:
            _check_tiles(exit, recipe, geometry, tiles)
        if exit.visual_tokens is None:
            continue
        if recipe.fewer != SQUARE:
            raise ConfigError(
                f"exit {exit} has fewer visual tokens, which pictures of the family {recipe.model_type!r} can't have",
                where="exits",
                expected="a depth alone: only a picture that is one square of tokens can be made smaller",
                todo=f"write {exit.depth} in its place",
            )
        pool_windows(geometry.image_tokens, exit.visual_tokens)


def _check_tiles(exit: Exit, recipe: Recipe, geometry: Geometry, tiles: TilesSpec | None) -> None:
    """Refuse an exit with fewer tiles where pictures can't have so many."""
    if recipe.fewer != TILES:
        found = f"exit {exit} has fewer tiles, and pictures of the family {recipe.model_type!r} aren't cut into any"
        expected = "a depth alone, or with fewer visual tokens where the family has a square of them"
    elif tiles is None:
        found = f"exit {exit} has fewer tiles, and one tile stands for a picture here"
        expected = "a depth alone: tiles are a matter of edgesafe export and edgesafe certify"
    else:
        known = caps(tiles, geometry.image_size)
        if exit.tiles in known:
            return
        found = f"no smaller picture of this checkpoint has {exit.tiles} tiles at most"
        expected = f"one of {', '.join(map(str, known))}" if known else "a depth alone: a picture is one tile"
    raise ConfigError(found, where="exits", expected=expected, todo=f"write {exit.depth} in place of {exit}")


def _check_member(config: Any, recipe: Recipe) -> None:
    """Refuse a member of a family that reads its tower otherwise, or has other parts.

    Raises:
        UnsupportedModelError: With what is supported.
    """
    layer, strategy, window = recipe.reference_layer(config), _strategy(config, None), _window(config.text_config)
    problem = ""
    if config.vision_config.model_type not in recipe.vision_types:
        problem = f"a {config.vision_config.model_type!r} tower"
    elif config.text_config.model_type not in recipe.text_types:
        problem = f"a {config.text_config.model_type!r} language model"
    elif isinstance(layer, bool) or not isinstance(layer, int):
        problem = f"a projector that reads several vision layers ({layer})"
    elif strategy not in (recipe.select_strategies or (None,)):
        problem = f"the select strategy {strategy!r}"
    elif window is not None:
        problem = f"a decoder that sees no more than the last {window} tokens"
    if problem:
        raise unsupported(problem, [recipe], _WHERE)


def check_processor(processor: Any, text: str) -> None:
    """Refuse a processor that can't read a picture: some files leave out what others name, such as `num_image_tokens`.

    Args:
        processor: The checkpoint's.
        text: A prompt with one image token.

    Raises:
        InputError: With the key that is missing, where that is the reason.
    """
    try:
        processor(images=[Image.new("RGB", (8, 8))], text=text, return_tensors="pt")
    except Exception as error:  # each family's processor fails in its own way
        missing = [key for key in _COUNTS if hasattr(processor, key) and getattr(processor, key) is None]
        raise InputError(
            f"the checkpoint's processor can't read a picture: {type(error).__name__}: {error}"
            + (f"; {' and '.join(missing)} is missing" if missing else ""),
            where="processor_config.json and preprocessor_config.json",
            expected="what this family's published checkpoints say there",
            todo=f"add {missing[0]!r} to processor_config.json"
            if missing
            else "use the processor files that belong to this checkpoint",
        ) from error


def _strategy(config: Any, default: str | None = "full") -> Any:
    return getattr(config, "vision_feature_select_strategy", default)


def _inner(vision: Any) -> int:
    """Width inside a block's MLP: DINOv2's config has a ratio of widths in its place."""
    if getattr(vision, "intermediate_size", None) is None and getattr(vision, "mlp_ratio", None):
        return int(_size(vision, "hidden_size", "vision_config") * vision.mlp_ratio)
    return _size(vision, "intermediate_size", "vision_config")


def _window(text: Any) -> int | None:
    """Tokens that the decoder sees, where that is fewer than its context."""
    window = getattr(text, "sliding_window", None)
    return None if window is None or window >= text.max_position_embeddings else window


def _size(part: Any, key: str, table: str) -> int:
    """A whole number above 0 out of a part of a config."""
    value = getattr(part, key, None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(
            f"{key} is {value!r}" if value is not None else f"{key} is missing",
            where=f"{_WHERE}: {table}.{key}",
            expected="a whole number of at least 1",
            todo="use the config.json that belongs to these weights",
        )
    return value
