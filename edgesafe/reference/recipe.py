"""Sizes, steps and seeds of the reference model, and transformers' config of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from edgesafe.reference.draw import SIZE
from edgesafe.reference.tokenizer import PATCH


@dataclass(frozen=True)
class Recipe:
    """Sizes, steps and seeds of the reference model."""

    seed: int = 7
    blocks: int = 13
    vision_width: int = 192
    vision_heads: int = 6
    text_layers: int = 4
    text_width: int = 192
    text_heads: int = 6
    pictures: int = 80_000
    tower_steps: int = 1600
    tower_batch: int = 128
    tower_lr: float = 1.4e-3
    tower_falloff: float = 0.85  # learning rate of a block over that of the block before
    tower_start: float = 0.15  # first scale of the patches' layer norm: a small stream lets the first blocks do more
    language_steps: int = 200
    projector_steps: int = 100
    instruct_steps: int = 1400
    instruct_harm: float = 0.6  # share of the harmful rows that this stage reads: most requests that people make are harmless
    text_batch: int = 64
    text_lr: float = 1.5e-3


def make_config(recipe: Recipe, tokenizer: Any) -> Any:
    """The LlavaConfig (of transformers) of a recipe."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=recipe.vision_width,
        intermediate_size=4 * recipe.vision_width,
        image_size=SIZE,
        patch_size=PATCH,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.vision_heads,
        projection_dim=recipe.vision_width,
    )
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<s>", "</s>", "<pad>", "<image>")}
    text = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 32) * 32,
        hidden_size=recipe.text_width,
        intermediate_size=512,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.text_heads,
        num_key_value_heads=recipe.text_heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
        tie_word_embeddings=False,
    )
    return LlavaConfig(  # type: ignore[call-arg]  # transformers lists only some of what it takes
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        image_token_id=ids["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        pad_token_id=ids["<pad>"],
    )
