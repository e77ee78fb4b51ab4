"""A tower's positions for pictures of another size than it was trained on, interpolated once instead of for each picture.

Published DINOv2 has 37 x 37 positions, for 518 px, and sees pictures of 224 px. transformers interpolates the table whenever
a picture comes; a graph on a device needs one of the pictures' own size.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from edgesafe.checkpoint.recipe import Recipe


@dataclass(frozen=True)
class Positions:
    """A table that is stored for pictures of another size.

    Attributes:
        name: The weight's name in the model.
        shape: As it is stored, [1, 1 + patches, width].
        side: Of the pictures that it is wanted for, in pixels.
    """

    name: str
    shape: tuple[int, ...]
    side: int


def fit_positions(config: Any, recipe: Recipe, side: int) -> tuple[Any, Positions | None]:
    """The config of the same model for pictures of one size, and its table; the config itself and None where it is for them.

    Args:
        config: transformers' config of the whole model.
        recipe: Its family's.
        side: Of the pictures, in pixels.
    """
    vision = config.vision_config
    if not recipe.positions or vision.image_size == side:
        return config, None
    shape = (1, (vision.image_size // vision.patch_size) ** 2 + recipe.extra_tokens, vision.hidden_size)
    fitted = copy.deepcopy(config)
    fitted.vision_config.image_size = side
    return fitted, Positions(f"{recipe.tower}.{recipe.embeddings}.{recipe.positions}", shape, side)


@torch.no_grad()
def interpolate(embeddings: nn.Module, positions: Positions, table: np.ndarray) -> np.ndarray:
    """The table [1, 1 + patches, width] for pictures of the wanted size, by the embeddings' own function.

    Args:
        embeddings: transformers' module, whose weights are not read.
        positions: What is wanted.
        table: As it is stored.
    """
    other: Any = copy.copy(embeddings)
    attribute = positions.name.rpartition(".")[2]
    weight = nn.Parameter(torch.from_numpy(table), requires_grad=False)
    other._parameters = {**embeddings._parameters, attribute: weight}
    side, patch = positions.side, other.patch_embeddings.patch_size[0]
    extra = table.shape[1] - math.isqrt(table.shape[1]) ** 2
    tokens = torch.empty(1, extra + (side // patch) ** 2, table.shape[2])  # only its shape is read
    fitted: np.ndarray = other.interpolate_pos_encoding(tokens, side, side).numpy()
    return fitted
