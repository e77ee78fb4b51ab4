"""A checkpoint seen from its exits: states after every block, answers at every depth.

B pictures or rows, P patches, W tower width, D text width, S tokens, A answer tokens, V tokens in the vocabulary.
A picture is one tile here, also where the family cuts it into several: what is trained is the decoder's answer to an exit's
state, and a row costs as little as it can. What is certified are the bundle's own tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from edgesafe.checkpoint.load import first_blocks, read_checkpoint
from edgesafe.checkpoint.recipe import Recipe, load_recipes
from edgesafe.checkpoint.shards import read_headers
from edgesafe.errors import InputError, UnsupportedModelError
from edgesafe.format.exits import hidden_states_index, reference_depth


@dataclass(frozen=True)
class Llava:
    """A loaded checkpoint.

    model: transformers' model in float32. processor: its processor. recipe: its family's. stored: dtype on disk.
    patches: P. image_tokens: the tokens that a picture takes. context_length: tokens that fit.
    """

    model: Any
    processor: Any
    recipe: Recipe
    n_blocks: int
    reference_depth: int
    patches: int
    image_tokens: int
    context_length: int
    stored: torch.dtype

    @property
    def language(self) -> Any:
        """The language model without its head."""
        return self.model.get_submodule(self.recipe.decoder)

    @property
    def eos_id(self) -> int:
        return int(self.processor.tokenizer.eos_token_id)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def pad_id(self) -> int:
        return int(self.processor.tokenizer.pad_token_id or 0)


def load(path: Path) -> Llava:
    """Load a checkpoint folder; weights become float32, which holds float16 and bfloat16 exactly.

    Raises:
        InputError: not a checkpoint folder, or a damaged one.
        UnsupportedModelError: a family without a recipe, or one whose exits are not single states without CLS.
    """
    recipes = load_recipes()
    family, model, processor = read_checkpoint(path, tuple(recipes))
    config, recipe = model.config, recipes[family]
    n_blocks = config.vision_config.num_hidden_layers
    layer = recipe.reference_layer(config)
    wanted = ("default",) if recipe.extra_tokens else recipe.select_strategies or (None,)
    if not isinstance(layer, int) or getattr(config, "vision_feature_select_strategy", None) not in wanted:
        raise UnsupportedModelError(
            "the projector reads several layers or the CLS token",
            where=str(path / "config.json"),
            expected=f"one vision_feature_layer and vision_feature_select_strategy {wanted[0]!r}",
            todo="use a checkpoint of this family as it was published",
        )
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return Llava(
        model.requires_grad_(False),
        processor,
        recipe,
        n_blocks,
        reference_depth(n_blocks, layer),
        patches,
        patches // recipe.patches_a_token(config) + bool(recipe.newline),
        config.text_config.max_position_embeddings,
        stored_dtype(path),
    )


def put_language(llava: Llava, language: Any, head: Any) -> None:
    """Put another language model and head in the place of the model's own."""
    owner, _, name = llava.recipe.decoder.rpartition(".")
    setattr(llava.model.get_submodule(owner), name, language)
    llava.model.lm_head = head


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype in which most of a checkpoint's numbers lie on disk."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    counts = dict.fromkeys(kinds, 0)
    for one in read_headers(folder).values():
        if one.kind in kinds:
            counts[one.kind] += one.count
    return kinds[max(counts, key=lambda kind: counts[kind])]


def autocast(precision: str, device: str = "cpu") -> AbstractContextManager[Any]:
    """Matrix products in bfloat16 for "bf16", in float32 for "fp32"."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def open_images(paths: Sequence[Path]) -> list[Image.Image]:
    """Pictures as RGB.

    Raises:
        InputError: one can't be read.
    """
    out = []
    for path in paths:
        try:
            with Image.open(path) as image:
                out.append(image.convert("RGB"))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise InputError("the picture can't be read", where=str(path), expected="a PNG file", todo=str(error)) from error
    return out


def pixel_values(llava: Llava, images: Sequence[Image.Image]) -> Tensor:
    """Preprocess pictures with the checkpoint's own processor: [B, 3, H, W]."""
    whole = {"do_image_splitting": False} if llava.recipe.cut == "grid" else {}
    pixels = llava.processor.image_processor(images=list(images), return_tensors="pt", **whole)["pixel_values"]
    if pixels.dim() == 5:  # [1, B, ...] of pictures, or [B, tiles, ...] with the whole picture first
        pixels = pixels[0] if llava.recipe.cut == "grid" else pixels[:, 0]
    return pixels.to(llava.device)


@torch.no_grad()
def exit_states(llava: Llava, pixels: Tensor, deepest: int | None = None) -> tuple[Tensor, ...]:
    """States after 0, 1, ..., n blocks from one pass of the tower: n + 1 tensors [B, P, W]; item d is exit depth d.

    Raw residual states, CLS dropped, not normed: what `vision_feature_layer=d` hands on to the norm or projector.

    Args:
        deepest: the last depth that is wanted; no later block is run. All of them by default.

    Source: transformers `LlavaModel.get_image_features`.
    """
    with first_blocks(llava.model, llava.recipe, deepest):
        out = llava.model.get_submodule(llava.recipe.tower)(pixels, output_hidden_states=True)
    return tuple(state[:, llava.recipe.extra_tokens :] for state in out.hidden_states)


def exit_state(states: Sequence[Tensor], depth: int) -> Tensor:
    """The state [B, P, W] of the exit after `depth` blocks."""
    return states[hidden_states_index(depth)]


def prompt_ids(llava: Llava, prompt: str) -> list[int]:
    """Token ids of a request with its picture, up to where the answer starts.

    Raises:
        InputError: an empty request, or one that spells the image token.
    """
    if not prompt.strip():
        raise InputError("the request is empty", where="prompt", expected="a question", todo="write one")
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = llava.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = llava.processor.image_token
    if text.count(image) != 1:
        raise InputError(f"the request spells {image!r}", where=repr(prompt), expected="text alone", todo="leave it out")
    shown = llava.recipe.texts.alone if llava.recipe.texts else image
    shown = shown.replace(image, image * llava.image_tokens)
    return list(llava.processor.tokenizer(text.replace(image, shown))["input_ids"])


def answer_ids(llava: Llava, answer: str) -> list[int]:
    """Token ids of an answer with its end token."""
    return [*llava.processor.tokenizer(answer, add_special_tokens=False)["input_ids"], llava.eos_id]


def embed(llava: Llava, ids: Tensor, states: Tensor) -> Tensor:
    """Token embeddings with the projected exit states in the image tokens' places.

    Args:
        ids: [B, S] with a picture's image tokens in each row.
        states: [B, P, W].

    Returns:
        [B, S, D].
    """
    model = llava.model
    embeds = model.get_input_embeddings()(ids)
    if not states.shape[1]:
        return embeds
    features = project(llava, states)
    image = ids == model.config.image_token_id
    image &= image.cumsum(1) <= llava.image_tokens  # a sampled answer may hold the token too
    where = image.unsqueeze(-1).expand_as(embeds)
    return embeds.masked_scatter(where, features.to(embeds.dtype))


def project(llava: Llava, states: Tensor) -> Tensor:
    """Image features [B, image tokens, D] of exit states [B, P, W]."""
    recipe, model = llava.recipe, llava.model
    if recipe.norm_after_blocks:
        states = model.get_submodule(recipe.tower).get_submodule(recipe.norm_after_blocks)(states)
    features = model.get_submodule(recipe.projector)(states)
    if not recipe.newline:
        return features
    newline = model.get_parameter(recipe.newline).to(features.dtype)
    return torch.cat([features, newline.expand(len(features), 1, -1)], 1)


def answer_hidden(llava: Llava, ids: Tensor, where: Tensor, states: Tensor) -> Tensor:
    """Last hidden states [B, A, D] at the positions `where` [B, A] of ids [B, S] (padded right), pictures seen through `states`
    [B, P, W].

    No attention mask is needed: padding lies after every position that is read.
    """
    inputs = embed(llava, ids, states)
    hidden = llava.language(inputs_embeds=inputs, use_cache=False).last_hidden_state  # [B, S, D]
    return hidden.gather(1, where.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def answer_logits(llava: Llava, ids: Tensor, where: Tensor, states: Tensor) -> Tensor:
    """Logits [B, A, V] at answer positions alone; arguments as in `answer_hidden`."""
    return llava.model.lm_head(answer_hidden(llava, ids, where, states))


Pick = Callable[[Tensor, Tensor, int], Tensor]  # logits [b, V], their row numbers [b], step -> tokens [b]


@torch.no_grad()
def generate(
    llava: Llava, prompts: Sequence[Sequence[int]], states: Tensor, max_new_tokens: int, pick: Pick
) -> list[list[int]]:
    """Answers to a batch of requests, token by token with a cache; rows that have ended leave the batch.

    Args:
        prompts: B requests' ids.
        states: [B, P, W], each request's exit states.
        max_new_tokens: 1 or more.
        pick: chooses the next tokens.

    Returns:
        B answers' ids, with the end token where one was picked.
    """
    from transformers import DynamicCache

    model, pad, device = llava.model, llava.pad_id, states.device
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache, inputs, alive = DynamicCache(), embed(llava, ids, states), torch.arange(len(prompts), device=device)
    answers: list[list[int]] = [[] for _ in prompts]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for step in range(max_new_tokens):
        out = llava.language(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        token = pick(model.lm_head(out.last_hidden_state[:, -1]), alive, step)
        for row, one in zip(alive.tolist(), token.tolist(), strict=True):
            answers[row].append(one)
        on = torch.nonzero(token != llava.eos_id).flatten()
        if not len(on):
            break
        if len(on) < len(alive):
            cache.batch_select_indices(on)
            alive, token, mask, positions = alive[on], token[on], mask[on], positions[on]
        inputs = model.get_input_embeddings()(token)[:, None]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = positions[:, -1:] + 1
    return answers


def decode(llava: Llava, ids: Sequence[int]) -> str:
    """An answer's text, without the end token."""
    return str(llava.processor.tokenizer.decode([i for i in ids if i != llava.eos_id], skip_special_tokens=True)).strip()


def greedy(llava: Llava, prompts: Sequence[Sequence[int]], states: Tensor, max_new_tokens: int) -> list[str]:
    """Greedy answers to a batch of prompts (ids), each with its exit states [B, P, W]."""
    said = generate(llava, prompts, states, max_new_tokens, lambda logits, *_: logits.argmax(-1))
    return [decode(llava, ids) for ids in said]
