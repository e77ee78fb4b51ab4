"""A bundle to measure with: random weights in the shape of a small model whose encoder takes most of the time."""

from __future__ import annotations

from pathlib import Path

SIDE, PATCH = 224, 16


def make_bench_bundle(folder: Path) -> Path:
    """Write the checkpoint and its bundle: CLIP of 13 blocks of width 384 on 224 px (196 tokens), Llama of 2 layers of 192.

    What it says is noise and nothing in it is certified; how long it takes depends on its shape alone.
    """
    from edgesafe.device import load_device
    from edgesafe.reference.build import Recipe
    from edgesafe_export import export_bundle

    bundle = folder / "bundle"
    if not bundle.exists():
        checkpoint = folder / "checkpoint"
        _write_checkpoint(checkpoint, Recipe(vision_width=384, vision_heads=6, text_layers=2))
        export_bundle(checkpoint, bundle, load_device("host"), vision_scheme="int8-dynamic", text_scheme="int4-block32")
    return bundle


def _write_checkpoint(folder: Path, recipe) -> None:  # type: ignore[no-untyped-def]
    import torch
    from transformers import LlavaForConditionalGeneration

    from edgesafe.reference.build import make_config
    from edgesafe.reference.tokenizer import write_processor

    folder.mkdir(parents=True, exist_ok=True)
    processor = write_processor(folder)
    processor.image_processor.size = {"shortest_edge": SIDE}
    processor.image_processor.crop_size = {"height": SIDE, "width": SIDE}
    processor.patch_size = PATCH
    processor.save_pretrained(folder)
    config = make_config(recipe, processor.tokenizer)
    config.vision_config.image_size, config.vision_config.patch_size = SIDE, PATCH
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
