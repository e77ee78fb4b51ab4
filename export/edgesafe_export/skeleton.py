"""A checkpoint without its weights: the model as its config builds it, marks in the weights' places, and where the weights lie.

The decoder is built with two layers, the first and any later one, because all later ones are alike;
`edgesafe_export.decoder_layers` makes the others from the second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgesafe.checkpoint.generation import read_generation
from edgesafe.checkpoint.shards import MEND, Stored, check_kind, read_header, read_headers, read_tensor
from edgesafe.errors import InputError, UnsupportedModelError
from edgesafe_export.family import Family, open_family
from edgesafe_export.placeholders import mark

TRACED_LAYERS = 2


@dataclass(frozen=True)
class Sketch:
    """A family over a marked model.

    Attributes:
        family: its pieces have the checkpoint's shapes and marks for weights.
        layers: layers of the checkpoint's decoder.
        starts: first mark and name of each weight.
        stored: where each weight lies, by its name in transformers' model, all layers.
    """

    family: Family
    layers: int
    starts: Mapping[int, str]
    stored: Mapping[str, Stored]

    def load(self, names: list[str]) -> dict[str, np.ndarray]:
        """Some weights, float32."""
        return {name: read_tensor(self.stored[name], name) for name in names}

    @property
    def count(self) -> int:
        """How many weights the model has."""
        return sum(stored.count for stored in self.stored.values())


def open_sketch(folder: Path, header: Callable[[Path], dict[str, Stored]] = read_header) -> Sketch:
    """A checkpoint's config, processor and safetensors headers, checked against each other; no weight is read.

    Args:
        folder: the checkpoint.
        header: gives the tensors of one of its files of weights.

    Raises:
        InputError: not a whole checkpoint: a shard is missing or cut short, or a weight's shape is not the config's, or its
            numbers are of a kind that can't be read.
        UnsupportedModelError: a family without a recipe, a member that can't be cut, or weights that need converting.
    """
    family, layers = open_family(folder, _empty_model)
    starts = mark(family.model)
    shapes = _all_layers({n: tuple(w.shape) for n, w in family.model.named_parameters()}, family.recipe.decoder, layers)
    stored = _match(family.model, read_headers(folder, header), shapes)
    return Sketch(family, layers, starts, stored)


def _empty_model(folder: Path, config: Any) -> tuple[Any, int]:
    """The config's model without memory for weights, and how many layers its decoder should have had."""
    from transformers import AutoModelForImageTextToText

    layers = int(config.text_config.num_hidden_layers)
    config = deepcopy(config)
    _keep_layers(config.text_config, min(TRACED_LAYERS, layers))
    with _weights_on_meta():
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.tie_weights()
    model.generation_config = read_generation(folder)
    return model.eval(), layers


def _keep_layers(text_config: Any, count: int) -> None:
    text_config.num_hidden_layers = count
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = text_config.layer_types[:count]


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without memory; buffers such as rotary frequencies are computed as usual."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, weight: nn.Parameter | None) -> None:
        # One that has no memory already is kept: two modules may share it.
        kept = weight is None or weight.is_meta
        register(module, name, weight if kept else nn.Parameter(weight.to("meta"), requires_grad=False))

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def layer_name(decoder: str, name: str, layer: int) -> str:
    """A weight's name in another layer of the decoder.

    >>> layer_name("model.text", "model.text.layers.1.mlp.up_proj.weight", 7), layer_name("model.text", "lm_head.weight", 7)
    ('model.text.layers.7.mlp.up_proj.weight', 'lm_head.weight')
    """
    return re.sub(rf"^({re.escape(decoder)}\.layers\.)\d+\.", rf"\g<1>{layer}.", name)


def _all_layers(shapes: Mapping[str, tuple[int, ...]], decoder: str, layers: int) -> dict[str, tuple[int, ...]]:
    """Every weight's shape, from those of the layers that were built."""
    last = f"{decoder}.layers.{TRACED_LAYERS - 1}."
    more = [
        (layer_name(decoder, n, i), s) for n, s in shapes.items() if n.startswith(last) for i in range(TRACED_LAYERS, layers)
    ]
    return {**shapes, **dict(more)}


def _match(model: Any, found: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """The stored tensors by transformers' own names; what is stored and not used is left alone, as transformers does."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    changes = get_model_conversion_mapping(model)
    renamings = [c for c in changes if isinstance(c, WeightRenaming)]
    converters = [c for c in changes if isinstance(c, WeightConverter)]
    stored: dict[str, Stored] = {}
    for key in found:
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, dict(shapes))
        if name not in shapes:
            continue
        if converter is not None:
            raise UnsupportedModelError(
                f"the weight {key} has to be converted",
                where=str(found[key].file),
                expected="weights as transformers' model has them",
                todo="load the checkpoint with transformers and save it again",
            )
        stored[name] = found[key]
    _check_shapes(stored, shapes, found)
    return stored


def _check_shapes(stored: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Stored]) -> None:
    where = str(next(iter(found.values())).file.parent) if found else ""
    missing = sorted(shapes.keys() - stored.keys())
    if missing:
        raise InputError(f"{len(missing)} weights are missing, e.g. {missing[0]}", where=where, todo=MEND)
    for name, shape in shapes.items():
        check_kind(stored[name], name)
        if stored[name].shape != shape:
            raise InputError(
                f"config.json contradicts the weights: {name} is stored as {list(stored[name].shape)}",
                where=str(stored[name].file),
                expected=f"{list(shape)}, by config.json",
                todo="use the config.json that belongs to these weights",
            )
