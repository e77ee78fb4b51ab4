"""A checkpoint seen through its family's recipe: its pieces, its sizes, its chat text, and transformers as the oracle.

T vision tokens with CLS, N image tokens of a picture or tile, W tower width, D text width, S prompt tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from edgesafe.checkpoint.chat import read_chat
from edgesafe.checkpoint.exit_maps import maps_of, steps
from edgesafe.checkpoint.generation import check_generation, end_tokens
from edgesafe.checkpoint.geometry import check_processor, picture_side, read_geometry
from edgesafe.checkpoint.load import first_blocks, read_checkpoint, read_config
from edgesafe.checkpoint.recipe import Recipe, check_family, load_recipes
from edgesafe.errors import InputError
from edgesafe.format import graph_io
from edgesafe.format.exits import Exit, pool_windows, prompt_at
from edgesafe.format.specs import TextSpec
from edgesafe_export.modules import ExitMap, FewerTokens, Head, MaskedEmbeddings, Segment, Whole
from edgesafe_export.preprocessing import picture_specs

Made = TypeVar("Made")

# What a processor makes of the text.
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


class Family:
    """A loaded checkpoint, its recipe and geometry. What can't be exported is refused here, before any graph is traced."""

    def __init__(self, model: Any, processor: Any, recipe: Recipe) -> None:
        self.model, self.processor, self.recipe = model, processor, recipe
        self.geometry = read_geometry(model.config, recipe, picture_side(model.config, recipe, processor.image_processor))
        self.name = recipe.model_type
        self.text_config = model.config.text_config
        self.image_spec, self.tiles = picture_specs(processor, model.config, recipe)
        self.chat = read_chat(processor)
        check_processor(processor, self.chat.prefix + self.chat.suffix)
        check_generation(model.generation_config)
        self.eos_token_ids = end_tokens(model.generation_config, processor.tokenizer)

    def segment(self, start: int, end: int) -> Segment:
        """Blocks start..end of the tower, with the picture's embedding where start is 0."""
        recipe, tower = self.recipe, self.model.get_submodule(self.recipe.tower)
        blocks = list(tower.get_submodule(recipe.blocks))[start:end]
        if start > 0:
            return Segment(blocks, None).eval()
        embeddings = tower.get_submodule(recipe.embeddings)
        if recipe.patch_mask:
            embeddings = MaskedEmbeddings(embeddings, self.geometry.image_size, self.geometry.patch_size)
        norm = tower.get_submodule(recipe.norm_before_blocks) if recipe.norm_before_blocks else None
        return Segment(blocks, embeddings, norm).eval()

    @property
    def norm_in_maps(self) -> bool:
        """Whether the family's norm runs in every exit's map graph, as a map stands behind it, and not in the head."""
        return bool(self.recipe.norm_after_blocks and self.recipe.map_after_norm and maps_of(self.model))

    def exit_map(self, depth: int) -> ExitMap | None:
        """What runs between an exit's blocks and the head; None where nothing does."""
        own = maps_of(self.model).get(depth)
        if self.norm_in_maps:
            return ExitMap(steps(self.model, self.recipe, depth)).eval()
        return None if own is None else ExitMap([own]).eval()

    def whole(self, depth: int) -> Whole:
        """A standalone exit."""
        return Whole(self.segment(0, depth), self.head(), self.exit_map(depth)).eval()

    def head(self) -> Head:
        """What follows an exit, behind its map."""
        recipe, tower = self.recipe, self.model.get_submodule(self.recipe.tower)
        in_head = recipe.norm_after_blocks and not self.norm_in_maps
        norm = tower.get_submodule(recipe.norm_after_blocks) if in_head else None
        newline = self.model.get_parameter(recipe.newline) if recipe.newline else None
        return Head(self.model.get_submodule(recipe.projector), self.geometry.dropped, norm, newline).eval()

    def fewer_tokens(self, visual_tokens: int) -> FewerTokens:
        """What an exit with so many visual tokens runs behind the head."""
        count = self.geometry.image_tokens
        return FewerTokens(math.isqrt(count), pool_windows(count, visual_tokens)).eval()

    def prompt_at(self, ids: list[int], exit: Exit) -> list[int]:
        """A prompt's ids as an exit reads them: with fewer image tokens where it has fewer."""
        return prompt_at(ids, exit, self.geometry.image_token_id, self.geometry.image_tokens)

    def embed_tokens(self) -> nn.Module:
        """The token embedding."""
        embedding: nn.Module = self.model.get_input_embeddings()
        return embedding

    @property
    def tied(self) -> bool:
        """Whether the head is the token embedding."""
        return self.model.get_submodule(self.recipe.lm_head).weight is self.embed_tokens().weight

    def decoder(self) -> Any:
        """The language model with its head, as transformers' own causal model over the same weights."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            causal = AutoModelForCausalLM.from_config(self.text_config)  # type: ignore[no-untyped-call]  # untyped there
        causal.model = self.model.get_submodule(self.recipe.decoder)
        causal.lm_head = self.model.get_submodule(self.recipe.lm_head)
        return causal.eval()

    @torch.no_grad()
    def oracle(self, inputs: Mapping[str, Any], exit: Exit) -> Tensor:
        """Image features at an exit as transformers itself computes them, [its number of tokens, D].

        Args:
            inputs: what the checkpoint's processor makes of one picture.
            exit: which one.
        """
        with self._mapped(exit.depth), self._averaged(exit), self.fewer_tiles(exit), self._selected(exit.depth) as layer:
            out = self.model.model.get_image_features(**_of_pictures(inputs), **layer)
        out = getattr(out, "pooler_output", out)
        features: Tensor = out[0] if isinstance(out, list | tuple) or out.dim() == 3 else out
        return features

    @torch.no_grad()
    def oracle_logits(self, ids: Tensor, inputs: Mapping[str, Any], exit: Exit) -> Tensor:
        """Logits at an exit as transformers itself computes them, [S, V]: the whole model, no cache."""
        with self._mapped(exit.depth), self._averaged(exit), self.fewer_tiles(exit), self._selected(exit.depth) as layer:
            out = self.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **_of_pictures(inputs), **layer
            )
        logits: Tensor = out.logits[0]
        return logits

    def first_tile(self, made: Any, exit: Exit | None) -> Any:
        """A processor's output with its first tile alone, for an exit that sees the whole picture and no part of it.

        No option of transformers' processors of canvases leaves out the others. transformers' model reads such a tile as its
        features and one newline, and refuses any other number of image tokens. What other exits see is handed back.
        """
        if exit is None or exit.tiles != 1 or self.recipe.cut != "canvas":
            return made
        image, ids = self.geometry.image_token_id, made["input_ids"][0].tolist()
        first = ids.index(image)
        kept = [*ids[:first], *[image] * self.geometry.rows, *ids[first + ids.count(image) :]]
        pixels = made["pixel_values"][:, :1]
        rows = torch.tensor([kept])
        return {**made, "input_ids": rows, "attention_mask": torch.ones_like(rows), "pixel_values": pixels}

    @contextmanager
    def fewer_tiles(self, exit: Exit | None) -> Iterator[None]:
        """Smaller pictures by transformers' own settings: a shorter longest edge, or fewer resolutions to choose from."""
        if exit is None or exit.tiles is None:
            yield
            return
        owner, config = self.processor.image_processor, self.model.config
        changed: list[tuple[Any, str, Any]]
        if self.recipe.cut == "grid":
            sides = max(n for n in range(1, exit.tiles + 1) if n == 1 or n * n < exit.tiles)
            edge = sides * self.geometry.image_size
            changed = [(owner, "size", {"longest_edge": edge})]
        else:
            area, points = self.geometry.image_size**2, config.image_grid_pinpoints
            few = [point for point in points if point[0] * point[1] <= (exit.tiles - 1) * area]
            # The model counts no tile of a resolution of nothing; the processor has no such way, and is not asked for it.
            changed = [(config, "image_grid_pinpoints", few or [[0, 0]])]
            changed += [(owner, "image_grid_pinpoints", few)] if few else []
        before = [(holder, name, getattr(holder, name)) for holder, name, _ in changed]
        try:
            for holder, name, value in changed:
                setattr(holder, name, value)
            yield
        finally:
            for holder, name, value in before:
                setattr(holder, name, value)

    @contextmanager
    def _mapped(self, depth: int) -> Iterator[None]:
        """An exit's map, of which transformers knows nothing, in front of its module that reads what the map gives."""
        recipe, own = self.recipe, maps_of(self.model).get(depth)
        if own is None:
            yield
            return
        before_norm = recipe.norm_after_blocks and not recipe.map_after_norm
        reader = f"{recipe.tower}.{recipe.norm_after_blocks}" if before_norm else recipe.projector
        hook = self.model.get_submodule(reader).register_forward_pre_hook(lambda _, args: (own(args[0]), *args[1:]))
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _averaged(self, exit: Exit) -> Iterator[None]:
        """Fewer visual tokens, of which transformers knows nothing: its projector's output, averaged by torch."""
        if exit.visual_tokens is None:
            yield
            return
        side, fewer = math.isqrt(self.geometry.image_tokens), math.isqrt(exit.visual_tokens)

        def average(_: nn.Module, __: Any, features: Tensor) -> Tensor:
            grid = features.reshape(len(features), side, side, -1).movedim(3, 1)  # [B, D, s, s]
            return nn.functional.adaptive_avg_pool2d(grid, fewer).flatten(2).mT

        hook = self.model.get_submodule(self.recipe.projector).register_forward_hook(average)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _selected(self, depth: int) -> Iterator[dict[str, int]]:
        """How transformers itself reads the state after `depth` blocks.

        By its argument on the untruncated model, or else by its own forward over a tower that has no more blocks.
        """
        if self.recipe.reference:
            yield {self.recipe.reference: depth}
            return
        with first_blocks(self.model, self.recipe, depth):
            yield {}


def load_family(folder: Path) -> Family:
    """Load a checkpoint folder by its family's recipe.

    Raises:
        InputError: not a whole checkpoint folder.
        UnsupportedModelError: a family without a recipe, or a member of one that can't be cut.
    """
    return open_family(folder, lambda folder, config, *_: (read_checkpoint(folder, (config.model_type,))[1], None))[0]


def open_family(folder: Path, build: Callable[[Path, Any, Recipe, int], tuple[Any, Made]]) -> tuple[Family, Made]:
    """A checkpoint's family over a model that `build` makes of it, and what `build` gives with the model.

    Args:
        folder: the checkpoint.
        build: is given the folder, its config, the family's recipe, and the side of the pictures that its tower gets.

    Raises:
        InputError, UnsupportedModelError: as `load_family`, but for the weights.
    """
    recipes = load_recipes()
    check_family(folder, recipes)
    config, processor = read_config(folder, tuple(recipes))
    recipe = recipes[config.model_type].of(config)
    side = picture_side(config, recipe, processor.image_processor)
    read_geometry(config, recipe, side)
    _check_tokenizer(folder)
    model, more = build(folder, config, recipe, side)
    return Family(model, processor, recipe), more


def text_spec(family: Family, layers: int) -> TextSpec:
    """Sizes of the language side with so many layers."""
    text = family.text_config
    return TextSpec(
        embed_tokens=graph_io.EMBED_PATH,
        decoder=graph_io.DECODER_PATH,
        num_layers=layers,
        num_kv_heads=text.num_key_value_heads,
        head_dim=family.geometry.head_dim,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        context_length=text.max_position_embeddings,
        eos_token_ids=family.eos_token_ids,
    )


def _check_tokenizer(folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            "the checkpoint has no tokenizer.json",
            where=str(folder),
            expected="a fast tokenizer: the device reads this file and nothing else",
            todo="convert it: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )


def _of_pictures(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key not in _TEXT_INPUTS}
