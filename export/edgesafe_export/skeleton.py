"""A checkpoint without its weights: the model as its config builds it, marks in the weights' places, and where the weights lie.

The decoder is built with two layers, the first and any later one, because all later ones are alike;
`edgesafe_export.decoder_layers` makes the others from the second.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgesafe.checkpoint.generation import read_generation
from edgesafe.checkpoint.load import empty_model, match_weights
from edgesafe.checkpoint.positions import Positions, fit_positions, interpolate
from edgesafe.checkpoint.recipe import Recipe
from edgesafe.checkpoint.shards import ON_DISK, Reader, Stored, read_headers, read_tensor
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
        positions: the tower's table, where it is stored for pictures of another size.
    """

    family: Family
    layers: int
    starts: Mapping[int, str]
    stored: Mapping[str, Stored]
    positions: Positions | None

    def load(self, names: list[str]) -> dict[str, np.ndarray]:
        """Some weights, float32."""
        found = {name: read_tensor(self.stored[name], name) for name in names}
        if self.positions is not None and (name := self.positions.name) in found:
            embeddings = self.family.model.get_submodule(name.rpartition(".")[0])
            found[name] = interpolate(embeddings, self.positions, found[name])
        return found

    @property
    def count(self) -> int:
        """How many weights the model has."""
        return sum(stored.count for stored in self.stored.values())


def open_sketch(folder: Path, reader: Reader = ON_DISK) -> Sketch:
    """A checkpoint's config, processor and safetensors headers, checked against each other; no weight is read.

    Args:
        folder: the checkpoint.
        reader: looks at its files of weights.

    Raises:
        InputError: as `read_checkpoint`, but for weights that are not finite.
        UnsupportedModelError: a family without a recipe, a member that can't be cut, or weights that need converting.
    """
    family, (layers, positions) = open_family(folder, partial(_short_model, reader=reader))
    starts = mark(family.model)
    shapes = _all_layers({n: tuple(w.shape) for n, w in family.model.named_parameters()}, family.recipe.decoder, layers)
    if positions is not None:
        shapes[positions.name] = positions.shape
    stored = match_weights(family.model, read_headers(folder, reader), shapes)
    return Sketch(family, layers, starts, stored, positions)


def _short_model(
    folder: Path, config: Any, recipe: Recipe, side: int, reader: Reader
) -> tuple[Any, tuple[int, Positions | None]]:
    """The config's model without memory for weights, how many layers its decoder should have had, and its positions."""
    layers = int(config.text_config.num_hidden_layers)
    config, positions = fit_positions(deepcopy(config), recipe, side)
    _keep_layers(config.text_config, min(TRACED_LAYERS, layers))
    model = empty_model(folder, config, reader)
    model.generation_config = read_generation(folder)
    return model, (layers, positions)


def _keep_layers(text_config: Any, count: int) -> None:
    text_config.num_hidden_layers = count
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = text_config.layer_types[:count]


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
