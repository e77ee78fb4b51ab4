"""Read a Hugging Face checkpoint folder whole, or say what is wrong with it. Shared by align and export (tier 2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgesafe.checkpoint.processor import read_processor
from edgesafe.checkpoint.recipe import Recipe, refused_families
from edgesafe.errors import InputError, UnsupportedModelError

MEND = "use an intact Hugging Face checkpoint folder"


def bf16_is_fast() -> bool:
    """Whether this CPU has tiles for bfloat16 matrices (AMX). Without them float32 is faster, AVX-512's bfloat16 included:
    200 against 144 GFLOP/s seen on 2 such cores."""
    import torch

    return bool(torch.cpu._is_amx_tile_supported())


def read_checkpoint(folder: Path, supported: tuple[str, ...]) -> tuple[str, Any, Any]:
    """Load a vision-language checkpoint in float32.

    Args:
        folder: config.json, safetensors, tokenizer and processor files.
        supported: families (`model_type`) that the caller can handle.

    Returns:
        The family, the model in eval mode, and its processor.

    Raises:
        InputError: no such folder, files missing or damaged, weights missing or not finite.
        UnsupportedModelError: another family.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    config, processor = read_config(folder, supported)
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        names = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise InputError(f"{len(names)} weights are missing or of another shape, e.g. {names[0]}", where=str(folder), todo=MEND)
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise InputError(f"weight {name} is not finite", where=str(folder), expected="finite weights", todo=MEND)
    return config.model_type, model.eval(), processor


def read_config(folder: Path, supported: tuple[str, ...]) -> tuple[Any, Any]:
    """A checkpoint's config and processor; its weights are not looked at.

    Raises:
        InputError: no such folder, or files missing or damaged.
        UnsupportedModelError: another family.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()  # its warnings name packages that this path does not need; failures raise below
    logging.disable_progress_bar()
    if not (folder / "config.json").is_file():
        raise InputError(
            "no checkpoint here", where=str(folder), expected="a folder with config.json and safetensors", todo=MEND
        )
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type not in supported:
            why = refused_families().get(config.model_type)
            raise UnsupportedModelError(
                f"model family {config.model_type!r}" + (f": {why}" if why else ""),
                where=str(folder),
                expected="one of " + ", ".join(supported),
                todo="use a supported family",
            )
        return config, read_processor(folder, config.model_type)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> InputError:
    return InputError(f"the checkpoint can't be read: {error}", where=str(folder), expected="a whole checkpoint", todo=MEND)


@contextmanager
def first_blocks(model: Any, recipe: Recipe, depth: int | None) -> Iterator[None]:
    """The model with the first `depth` blocks of its tower alone (None: all), for as long as the block lasts.

    transformers hangs the hooks that collect hidden states on a tower's blocks once, when it is first asked for them: it
    is made to do so before any block is away.
    """
    from transformers.utils.output_capturing import maybe_install_capturing_hooks

    tower = model.get_submodule(recipe.tower)
    parent, _, name = recipe.blocks.rpartition(".")
    stack = tower.get_submodule(parent)
    blocks = getattr(stack, name)
    maybe_install_capturing_hooks(tower)
    setattr(stack, name, blocks[:depth])
    try:
        yield
    finally:
        setattr(stack, name, blocks)
