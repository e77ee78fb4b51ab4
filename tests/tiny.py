"""A tiny random LLaVA checkpoint in transformers' own layout, with the reference model's tokenizer and processor files."""

from __future__ import annotations

from pathlib import Path


def make_tiny_llava(folder: Path, seed: int = 0, *, blocks: int = 4, layers: int = 2, dtype: str = "float32") -> Path:
    """Write the checkpoint: CLIP with `blocks` blocks of width 32 on 72 px, Llama with `layers` layers of width 64."""
    import torch
    from transformers import LlavaForConditionalGeneration

    from edgesafe.reference.recipe import Recipe, make_config
    from edgesafe.reference.tokenizer import write_processor

    folder.mkdir(parents=True, exist_ok=True)
    processor = write_processor(folder)
    recipe = Recipe(blocks=blocks, vision_width=32, vision_heads=2, text_layers=layers, text_width=64, text_heads=2)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(make_config(recipe, processor.tokenizer))
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "embed_tokens" not in name:
            weight.data.mul_(3.0)  # far enough from zero that depths and answers differ
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
