"""A checkpoint seen from its exits: states after every block, answers at every exit.

B pictures or rows, P patches, W tower width, D text width, S tokens, A answer tokens, V tokens in the vocabulary.
A picture is one tile here, also where the family cuts it into several: what is trained is the decoder's answer to an exit's
state, and a row costs as little as it can. What is certified are the bundle's own tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from edgesafe.checkpoint import chat as chats
from edgesafe.checkpoint.chat import Chat, read_chat
from edgesafe.checkpoint.exit_maps import projector_input
from edgesafe.checkpoint.generation import check_generation, end_tokens, read_generation
from edgesafe.checkpoint.geometry import Geometry, check_exits, check_processor, picture_side, read_geometry
from edgesafe.checkpoint.load import empty_model, first_blocks, read_checkpoint, read_config, read_part
from edgesafe.checkpoint.recipe import Recipe, check_family, load_recipes
from edgesafe.checkpoint.shards import WITHOUT_MAPS, read_headers
from edgesafe.format.exits import Exit, prompt_at
from edgesafe.format.pictures import open_picture


@dataclass(frozen=True)
class ExitModel:
    """A loaded checkpoint.

    Attributes:
        model: transformers' model in float32.
        processor: Its processor.
        recipe: Its family's.
        geometry: Its sizes.
        chat: Its chat template.
        eos_ids: The tokens that end an answer; the first is the one that answers are trained with.
        stored: dtype on disk.
    """

    model: Any
    processor: Any
    recipe: Recipe
    geometry: Geometry
    chat: Chat
    eos_ids: tuple[int, ...]
    stored: torch.dtype

    @property
    def n_blocks(self) -> int:
        """Blocks of the vision tower."""
        return self.geometry.n_blocks

    @property
    def reference(self) -> Exit:
        """The exit that the model was trained to use."""
        return self.geometry.reference

    @property
    def patches(self) -> int:
        """P, the tokens of an exit's state."""
        return self.geometry.states

    @property
    def image_tokens(self) -> int:
        """Tokens that a picture takes, the newline's own among them."""
        return self.geometry.rows

    @property
    def context_length(self) -> int:
        """Tokens that fit."""
        return self.geometry.context_length

    @property
    def language(self) -> Any:
        """The language model without its head."""
        return self.model.get_submodule(self.recipe.decoder)

    @property
    def eos_id(self) -> int:
        """The token that ends a trained answer."""
        return self.eos_ids[0]

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        device: torch.device = next(self.model.get_submodule(self.recipe.tower).parameters()).device
        return device

    @property
    def pad_id(self) -> int:
        """The token that fills up a batch."""
        return int(self.processor.tokenizer.pad_token_id or 0)


def load(path: Path) -> ExitModel:
    """Load a checkpoint folder; weights become float32, which holds float16 and bfloat16 exactly.

    Raises:
        InputError: Not a checkpoint folder, or a damaged one.
        UnsupportedModelError: A family without a recipe, a member of one that can't be cut, or answers that are not greedy.
        ExportError: A chat template that changes what the user says.
    """
    config, opened = _open(path)
    _, model, opened["processor"] = read_checkpoint(path, (config.model_type,))
    return ExitModel(model=model.requires_grad_(False), stored=stored_dtype(path), **opened)


def load_tower(path: Path) -> ExitModel:
    """A checkpoint folder of which the vision tower alone has weights: no memory is spent on the language model.

    Exit maps of the folder are left out, whatever they are.

    Raises:
        InputError, UnsupportedModelError, ExportError: as `load`.
    """
    config, opened = _open(path)
    model = empty_model(path, config, WITHOUT_MAPS)
    read_part(model, opened["recipe"].tower, path)
    return ExitModel(model=model.requires_grad_(False), stored=stored_dtype(path), **opened)


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    """A checkpoint's config, and all of an `ExitModel` but the weights, which may take minutes."""
    recipes = load_recipes()
    check_family(path, recipes)
    config, processor = read_config(path, tuple(recipes))
    recipe = recipes[config.model_type].of(config)
    side = picture_side(config, recipe, processor.image_processor)
    geometry, chat = read_geometry(config, recipe, side), read_chat(processor)
    check_processor(processor, chat.prefix + chat.suffix)
    generation = read_generation(path)
    check_generation(generation)
    eos_ids = end_tokens(generation, processor.tokenizer)
    return config, {"processor": processor, "recipe": recipe, "geometry": geometry, "chat": chat, "eos_ids": eos_ids}


def put_language(exit_model: ExitModel, language: Any, head: Any) -> None:
    """Put another language model and head in the place of the model's own."""
    owner, _, name = exit_model.recipe.decoder.rpartition(".")
    setattr(exit_model.model.get_submodule(owner), name, language)
    exit_model.model.lm_head = head


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype in which most of a checkpoint's numbers lie on disk."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    counts = dict.fromkeys(kinds, 0)
    for one in read_headers(folder, WITHOUT_MAPS).values():
        if one.kind in kinds:
            counts[one.kind] += one.count
    return kinds[max(counts, key=lambda kind: counts[kind])]


def autocast(precision: str, device: str = "cpu") -> AbstractContextManager[Any]:
    """Matrix products in bfloat16 for "bf16", in float32 for "fp32"."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def open_images(paths: Sequence[Path]) -> list[Image.Image]:
    """Pictures as the device sees them: upright 8-bit RGB.

    Raises:
        InputError: one can't be read.
    """
    return [open_picture(path) for path in paths]


def pixel_values(exit_model: ExitModel, images: Sequence[Image.Image]) -> Tensor:
    """Preprocess pictures with the checkpoint's own processor: [B, 3, H, W]."""
    whole = {"do_image_splitting": False} if exit_model.recipe.cut == "grid" else {}
    pixels: Tensor = exit_model.processor.image_processor(images=list(images), return_tensors="pt", **whole)["pixel_values"]
    if pixels.dim() == 5:  # [1, B, ...] of pictures, or [B, tiles, ...] with the whole picture first
        pixels = pixels[0] if exit_model.recipe.cut == "grid" else pixels[:, 0]
    return pixels.to(exit_model.device)


@torch.no_grad()
def exit_states(exit_model: ExitModel, pixels: Tensor, deepest: int | None = None) -> tuple[Tensor, ...]:
    """States after 0, 1, ..., n blocks from one pass of the tower: n + 1 tensors [B, P, W]; item d is that of depth d.

    Raw residual states, neither normed nor mapped, without the tokens that the projector drops (CLS): what
    `vision_feature_layer=d` hands on to the norm or projector.

    Args:
        exit_model: the loaded checkpoint.
        pixels: [B, 3, H, W].
        deepest: blocks to run; all of them by default.

    Source: transformers `LlavaModel.get_image_features`.
    """
    with first_blocks(exit_model.model, exit_model.recipe, deepest):
        out = exit_model.model.get_submodule(exit_model.recipe.tower)(pixels, output_hidden_states=True)
    return tuple(state[:, exit_model.geometry.dropped :] for state in out.hidden_states)


@torch.no_grad()
def exit_state(exit_model: ExitModel, states: Sequence[Tensor], exit: Exit) -> Tensor:
    """What the projector reads at an exit [B, P, W]: of the states of `exit_states` its own, normed and mapped.

    At an exit with fewer visual tokens it reads all of them, too: they are averaged behind the projector (`embed`), as in a
    bundle, so that the clock may decide late.

    Raises:
        ConfigError: The exit has visual tokens that the model's pictures can't have.
    """
    check_exits([exit], exit_model.recipe, exit_model.geometry)
    return projector_input(exit_model.model, exit_model.recipe, states[exit.depth], exit.depth)


def by_cost(exit_model: ExitModel, exits: Iterable[Exit]) -> list[Exit]:
    """Exits ascending by what they compute, as `Manifest.by_cost` orders them, with their maps and the head left out."""
    blocks = exit_model.model.get_submodule(exit_model.recipe.tower).get_submodule(exit_model.recipe.blocks)
    block, *decoder = (
        sum(part.weight.numel() for part in module.modules() if isinstance(part, torch.nn.Linear))
        for module in (blocks[0], exit_model.language, exit_model.model.lm_head)
    )
    ascending = sorted(exits)
    if all(exit.visual_tokens is None for exit in ascending):
        return ascending
    geometry = exit_model.geometry

    def cost(exit: Exit) -> int:
        return exit.depth * geometry.tokens * block + (exit.visual_tokens or geometry.image_tokens) * sum(decoder)

    return sorted(ascending, key=cost)


def prompt_ids(exit_model: ExitModel, prompt: str) -> list[int]:
    """Token ids of a request with its picture, up to where the answer starts.

    Raises:
        InputError: an empty request, or one that holds a control text.
    """
    image = exit_model.processor.image_token
    shown = exit_model.recipe.texts.alone if exit_model.recipe.texts else image
    return chats.prompt_ids(
        exit_model.processor, exit_model.chat, prompt, shown.replace(image, image * exit_model.image_tokens)
    )


def ids_at(exit_model: ExitModel, ids: Sequence[int], exit: Exit) -> list[int]:
    """A request's ids as an exit reads it: with as many image tokens as the exit has visual tokens."""
    return prompt_at(ids, exit, exit_model.geometry.image_token_id, exit_model.image_tokens)


def answer_ids(exit_model: ExitModel, answer: str) -> list[int]:
    """Token ids of an answer with its end token."""
    return [*exit_model.processor.tokenizer(answer, add_special_tokens=False)["input_ids"], exit_model.eos_id]


def embed(exit_model: ExitModel, ids: Tensor, states: Tensor) -> Tensor:
    """Token embeddings with the projected exit states in the image tokens' places.

    Args:
        exit_model: the loaded checkpoint.
        ids: [B, S] with a picture's image tokens in each row. A row with fewer than the projector gives gets their averages.
        states: [B, P, W], as `exit_state` gives them.

    Returns:
        [B, S, D].
    """
    model = exit_model.model
    embeds: Tensor = model.get_input_embeddings()(ids)
    if not states.shape[1]:
        return embeds
    features = project(exit_model, states)
    image = ids == model.config.image_token_id
    # A sampled answer may hold the token too: the picture's stand in one run.
    gaps = (~image).cumsum(1)
    image &= gaps == gaps.gather(1, image.int().argmax(1, keepdim=True))
    read = torch.cat([_pooled(one, count) for one, count in zip(features, image.sum(1).tolist(), strict=True)])
    where = image.unsqueeze(-1).expand_as(embeds)
    return embeds.masked_scatter(where, read.to(embeds.dtype))


def _pooled(features: Tensor, count: int) -> Tensor:
    """A picture's features [N, D] averaged to so many, as `pool_windows` says; all of them where there is room for all."""
    if not 0 < count < len(features):
        return features[:count]
    side, fewer = math.isqrt(len(features)), math.isqrt(count)
    grid = features.reshape(side, side, -1).movedim(2, 0)  # [D, s, s]
    return torch.nn.functional.adaptive_avg_pool2d(grid, fewer).flatten(1).mT


def project(exit_model: ExitModel, states: Tensor) -> Tensor:
    """Image features [B, image tokens, D] of what the projector reads [B, P, W]."""
    recipe, model = exit_model.recipe, exit_model.model
    features: Tensor = model.get_submodule(recipe.projector)(states)
    if not recipe.newline:
        return features
    newline = model.get_parameter(recipe.newline).to(features.dtype)
    return torch.cat([features, newline.expand(len(features), 1, -1)], 1)


def answer_hidden(exit_model: ExitModel, ids: Tensor, where: Tensor, states: Tensor) -> Tensor:
    """Last hidden states [B, A, D] at answer positions, with pictures as exit states.

    No attention mask is needed: padding lies after every position that is read.

    Args:
        exit_model: the loaded checkpoint.
        ids: [B, S], padded right.
        where: [B, A], the positions in `ids` that are read.
        states: [B, P, W], the pictures.
    """
    inputs = embed(exit_model, ids, states)
    hidden: Tensor = exit_model.language(inputs_embeds=inputs, use_cache=False).last_hidden_state  # [B, S, D]
    return hidden.gather(1, where.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def answer_logits(exit_model: ExitModel, ids: Tensor, where: Tensor, states: Tensor) -> Tensor:
    """Logits [B, A, V] at answer positions alone; arguments as in `answer_hidden`."""
    logits: Tensor = exit_model.model.lm_head(answer_hidden(exit_model, ids, where, states))
    return logits


Pick = Callable[[Tensor, Tensor, int], Tensor]  # logits [b, V], their row numbers [b], step -> tokens [b]


@torch.no_grad()
def generate(
    exit_model: ExitModel, prompts: Sequence[Sequence[int]], states: Tensor, max_new_tokens: int, pick: Pick
) -> list[list[int]]:
    """Answers to a batch of requests, token by token with a cache; rows that have ended leave the batch.

    Args:
        exit_model: the loaded checkpoint.
        prompts: B requests' ids.
        states: [B, P, W], each request's exit states.
        max_new_tokens: 1 or more.
        pick: chooses the next tokens.

    Returns:
        B answers' ids, with the end token where one was picked.
    """
    from transformers import DynamicCache

    model, pad, device = exit_model.model, exit_model.pad_id, states.device
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache, inputs, alive = DynamicCache(), embed(exit_model, ids, states), torch.arange(len(prompts), device=device)
    answers: list[list[int]] = [[] for _ in prompts]
    ends = torch.tensor(exit_model.eos_ids, device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for step in range(max_new_tokens):
        out = exit_model.language(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        token = pick(model.lm_head(out.last_hidden_state[:, -1]), alive, step)
        for row, one in zip(alive.tolist(), token.tolist(), strict=True):
            answers[row].append(one)
        on = torch.nonzero(~torch.isin(token, ends)).flatten()
        if not len(on):
            break
        if len(on) < len(alive):
            cache.batch_select_indices(on)
            alive, token, mask, positions = alive[on], token[on], mask[on], positions[on]
        inputs = model.get_input_embeddings()(token)[:, None]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = positions[:, -1:] + 1
    return answers


def decode(exit_model: ExitModel, ids: Sequence[int]) -> str:
    """An answer's text, without the end token."""
    return str(
        exit_model.processor.tokenizer.decode([i for i in ids if i not in exit_model.eos_ids], skip_special_tokens=True)
    ).strip()


def greedy(exit_model: ExitModel, prompts: Sequence[Sequence[int]], states: Tensor, max_new_tokens: int) -> list[str]:
    """Greedy answers to a batch of prompts (ids), each with its exit states [B, P, W]."""
    said = generate(exit_model, prompts, states, max_new_tokens, lambda logits, *_: logits.argmax(-1))
    return [decode(exit_model, ids) for ids in said]
