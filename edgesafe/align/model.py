"""A LLaVA checkpoint seen from its exits: states after every block, answers at every depth.

B pictures, P patches, W tower width, D text width, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from edgesafe.checkpoint import read_checkpoint
from edgesafe.exits import reference_depth


@dataclass(frozen=True)
class Llava:
    """A loaded checkpoint. `model` is a LlavaForConditionalGeneration in float32, `processor` its LlavaProcessor."""

    model: Any
    processor: Any
    n_blocks: int
    reference_depth: int
    image_tokens: int

    @property
    def eos_id(self) -> int:
        return int(self.processor.tokenizer.eos_token_id)


def load(path: Path) -> Llava:
    """Load a checkpoint folder; weights become float32.

    Raises:
        InputError: not a whole checkpoint folder, or weights that are not finite.
        UnsupportedModelError: a family other than `llava`.
    """
    _, model, processor = read_checkpoint(path, ("llava",))
    model.set_attn_implementation("eager")  # faster than sdpa in the backward pass on CPUs, and exact
    config = model.config
    n_blocks = config.vision_config.num_hidden_layers
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return Llava(model, processor, n_blocks, reference_depth(n_blocks, config.vision_feature_layer), patches)


def pixel_values(llava: Llava, images: Sequence[Image.Image]) -> Tensor:
    """Preprocess pictures with the checkpoint's own processor: [B, 3, H, W]."""
    return llava.processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]


@torch.no_grad()
def exit_states(llava: Llava, pixels: Tensor) -> tuple[Tensor, ...]:
    """Raw residual states without CLS after 0, 1, ..., n blocks: n + 1 tensors [B, P, W]; item d is exit depth d."""
    out = llava.model.model.vision_tower(pixels, output_hidden_states=True)
    return tuple(state[:, 1:] for state in out.hidden_states)


def prompt_ids(llava: Llava, prompt: str) -> list[int]:
    """Token ids of a request with its picture, up to where the answer starts."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = llava.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = llava.processor.image_token
    return list(llava.processor.tokenizer(text.replace(image, image * llava.image_tokens))["input_ids"])


def answer_ids(llava: Llava, answer: str) -> list[int]:
    """Token ids of an answer with its end token."""
    return [*llava.processor.tokenizer(answer, add_special_tokens=False)["input_ids"], llava.eos_id]


def embed(llava: Llava, ids: Tensor, states: Tensor) -> Tensor:
    """Token embeddings with the projected exit states in the image tokens' places.

    Args:
        ids: [B, S] with P image tokens a row.
        states: [B, P, W].

    Returns:
        [B, S, D].
    """
    model = llava.model
    embeds = model.get_input_embeddings()(ids)
    features = model.model.multi_modal_projector(states)
    where = (ids == model.config.image_token_id).unsqueeze(-1).expand_as(embeds)
    return embeds.masked_scatter(where, features.to(embeds.dtype))


@torch.no_grad()
def greedy(llava: Llava, prompts: Sequence[Sequence[int]], states: Tensor, max_new_tokens: int) -> list[str]:
    """Greedy answers to a batch of prompts (ids), each with its exit states [B, P, W]."""
    from transformers import DynamicCache

    model, pad = llava.model, llava.processor.tokenizer.pad_token_id or 0
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    cache, inputs, done = DynamicCache(), embed(llava, ids, states), torch.zeros(len(prompts), dtype=torch.bool)
    answers: list[list[int]] = [[] for _ in prompts]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for _ in range(max_new_tokens):
        out = model.model.language_model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        token = model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
        done |= token == llava.eos_id
        for i in torch.nonzero(~done).flatten().tolist():
            answers[i].append(int(token[i]))
        if bool(done.all()):
            break
        inputs = model.get_input_embeddings()(token)[:, None]
        mask = torch.cat([mask, torch.ones(len(prompts), 1, dtype=mask.dtype)], 1)
        positions = positions[:, -1:] + 1
    return [llava.processor.tokenizer.decode(a, skip_special_tokens=True).strip() for a in answers]
