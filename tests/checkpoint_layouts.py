"""Checkpoint folders laid out by hand, and their weights as align and export load them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from edgesafe.checkpoint.load import read_checkpoint
from edgesafe.checkpoint.recipe import load_recipes
from edgesafe_export.skeleton import open_sketch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Names on disk, as transformers writes them; the model has its own.
UP = "language_model.model.layers.1.mlp.up_proj.weight"
EMBED, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
IN_MODEL = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.", "": "model."}


def in_model(name: str) -> str:
    start = next(old for old in IN_MODEL if name.startswith(old))
    return IN_MODEL[start] + name.removeprefix(start)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / SINGLE)


def save(weights: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path, metadata={"format": "pt"})


def set_config(folder: Path, **entries: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def shard(folder: Path, weights: dict[str, torch.Tensor], index: str = INDEX) -> dict[str, str]:
    """Two shards, every other weight in the second; returns the index' weight_map."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {tensor: names[i % 2] for i, tensor in enumerate(sorted(weights))}
    for name in names:
        save({t: weights[t] for t in where if where[t] == name}, folder / name)
    write_index(folder, where, index)
    return where


def write_index(folder: Path, where: object, name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def only_shards(folder: Path) -> dict[str, str]:
    where = shard(folder, weights_of(folder))
    (folder / SINGLE).unlink()
    return where


def as_aligned(folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(folder, tuple(load_recipes()))[1].named_parameters())


def as_exported(folder: Path) -> dict[str, torch.Tensor]:
    sketch = open_sketch(folder)
    return {name: torch.from_numpy(w) for name, w in sketch.load(list(sketch.stored)).items()}
