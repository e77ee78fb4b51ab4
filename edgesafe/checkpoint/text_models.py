"""Text models beside the checkpoint: opening guards, toxicity classifiers and reward models, and what records call them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgesafe.checkpoint.weight_files import refuse_adapter
from edgesafe.errors import ConfigError
from edgesafe.format.files import digest_folder


@contextmanager
def read_errors(source: str, auto: Any) -> Iterator[None]:
    """Refuse an adapter, and turn what transformers raises over a checkpoint that can't be fetched or read into our error.

    Args:
        source: folder or hub id.
        auto: one of transformers' `AutoModelFor...`.

    Raises:
        InputError: the folder has an adapter, whose base model transformers would load, or fetch.
        ConfigError: it can't be fetched or read.
    """
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    # An adapter does not say how many labels it was trained for.
    labels = ", num_labels=LABELS" if "Classification" in auto.__name__ else ""
    refuse_adapter(Path(source), f"{auto.__name__}.from_pretrained(BASE{labels})", "AutoTokenizer")
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, UnpicklingError) as error:
        raise ConfigError(
            f"the checkpoint can't be fetched or read: {' '.join(str(error).split())}",
            where=source,
            expected="a checkpoint folder, or the id of one on the Hugging Face hub that can be reached",
            todo="check the name and the network",
        ) from error


def open_whole(auto: Any, source: str, expected: str, **options: Any) -> tuple[Any, Any]:
    """A checkpoint's tokenizer and its model, all of whose weights lie on disk: transformers would make up missing ones.

    Args:
        auto: one of transformers' `AutoModelFor...`.
        source: folder or hub id.
        expected: what it should be, for the error.
        options: of `from_pretrained`.

    Raises:
        InputError: it is an adapter.
        ConfigError: it can't be fetched or read, or weights are missing or of another shape.
    """
    from transformers import AutoTokenizer

    with read_errors(source, auto):
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, info = auto.from_pretrained(source, output_loading_info=True, **options)
    if info["missing_keys"] or info["mismatched_keys"]:
        names = ", ".join(sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])))
        raise ConfigError(f"weights are missing or of another shape: {names}", where=source, expected=expected)
    return tokenizer, model


def display_name(source: str) -> str:
    """What records call a checkpoint: a folder's name, not this machine's path to it, or a hub id."""
    return Path(os.path.realpath(source)).name if Path(source).is_dir() else source


def content_id(source: str, model: Any) -> dict[str, Any]:
    """Which bytes it is: {"digest"} of a folder, or {"commit"} of a hub id."""
    if Path(source).is_dir():
        return {"digest": digest_folder(Path(source))}
    return {"commit": getattr(model.config, "_commit_hash", None)}


def ensure_pad_token(tokenizer: Any, source: str) -> int:
    """Pad with the end token where a tokenizer has no token to pad with; returns the pad token's id.

    Raises:
        ConfigError: it has neither.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError("the tokenizer has no pad and no end token", where=source, expected="either")
    return int(tokenizer.pad_token_id)


def context_length(model: Any, tokenizer: Any) -> int:
    """Most tokens that the model reads."""
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(min(tokenizer.model_max_length, places or tokenizer.model_max_length))
