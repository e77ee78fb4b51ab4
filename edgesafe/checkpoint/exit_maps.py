"""Exit maps: one linear map per exit from its state to where the reference exit's lies, as a checkpoint holds them.

An early state is not poor, it is elsewhere: the projector was trained on the reference exit's states alone. A map stands in
front of the projector, after the norm where the family has one, unless the recipe says before it. It lies in a file of its own
beside the weights, so that a checkpoint without the file is the checkpoint as it was; `edgesafe.maps` fits it.

B pictures or rows, P patches, W tower width, R rank.

Source: for language models, the tuned lens (Belrose et al. 2023, arXiv 2303.08112), which fits a map per layer by gradient.
Differs: from states of a vision tower's exits, in closed form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgesafe.checkpoint.geometry import Geometry
from edgesafe.checkpoint.recipe import Recipe
from edgesafe.checkpoint.shards import ON_DISK, Reader, Stored, read_header, read_tensor
from edgesafe.checkpoint.weight_files import MAPS
from edgesafe.errors import InputError

# The part of a model that holds them: {"6": map of depth 6}.
PART = "exit_maps"
_NAME = re.compile(rf"{PART}\.([1-9]\d*)\.(weight|bias|0\.weight|1\.weight|1\.bias)")
_KEYS = ({"weight", "bias"}, {"0.weight", "1.weight", "1.bias"})


def full_map(weight: Tensor, bias: Tensor) -> nn.Module:
    """A map of weight [W, W] and bias [W]: `x @ weight.T + bias`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return linear


def low_rank_map(down: Tensor, up: Tensor, bias: Tensor) -> nn.Module:
    """A map of two factors, [R, W] and [W, R], and a bias [W]."""
    first = nn.Linear(down.shape[1], down.shape[0], bias=False, device="meta")
    first.weight = nn.Parameter(down, requires_grad=False)
    return nn.Sequential(first, full_map(up, bias))


def attach(model: Any, maps: Mapping[int, nn.Module]) -> None:
    """Make maps, by depth, a part of a model."""
    setattr(model, PART, nn.ModuleDict({str(depth): maps[depth] for depth in sorted(maps)}))


def detach(model: Any) -> dict[int, nn.Module]:
    """Take the maps out of a model, by depth; none where it has none."""
    found = maps_of(model)
    if hasattr(model, PART):
        delattr(model, PART)
    return found


def maps_of(model: Any) -> dict[int, nn.Module]:
    """A model's maps by depth."""
    return {int(depth): module for depth, module in getattr(model, PART, nn.ModuleDict()).items()}


def projector_input(model: Any, recipe: Recipe, states: Tensor, depth: int) -> Tensor:
    """What the projector reads of raw states [B, P, W] after `depth` blocks: the family's norm and the exit's map applied."""
    for step in steps(model, recipe, depth):
        states = step(states)
    return states


def steps(model: Any, recipe: Recipe, depth: int) -> list[nn.Module]:
    """What runs between a depth's blocks and the projector, in order: the norm, the map, both or neither."""
    norm = [model.get_submodule(recipe.tower).get_submodule(recipe.norm_after_blocks)] if recipe.norm_after_blocks else []
    own = [found] if (found := maps_of(model).get(depth)) is not None else []
    return norm + own if recipe.map_after_norm else own + norm


def reads(model: Any, recipe: Recipe, states: Tensor) -> Tensor:
    """What a map reads, and what it leads to: raw states [B, P, W], or normed ones where it stands behind the norm."""
    if not (recipe.norm_after_blocks and recipe.map_after_norm):
        return states
    normed: Tensor = model.get_submodule(recipe.tower).get_submodule(recipe.norm_after_blocks)(states)
    return normed


def attach_empty(model: Any, folder: Path, geometry: Geometry, reader: Reader = ON_DISK) -> None:
    """Attach modules of the shapes of a folder's maps, without memory; nothing where the folder has none.

    Args:
        model: gets them.
        folder: the checkpoint.
        geometry: its sizes.
        reader: looks at its file of maps.

    Raises:
        InputError: the file of maps is damaged, or of another model.
    """
    path = folder / MAPS
    if reader.has(path):
        attach(model, {depth: _empty(shapes) for depth, shapes in _by_depth(path, reader.header(path), geometry).items()})


def attach_stored(model: Any, folder: Path, geometry: Geometry) -> None:
    """Attach a folder's maps in float32; nothing where it has none.

    Raises:
        InputError: the file of maps is damaged, not finite, or of another model.
    """
    path = folder / MAPS
    if not path.is_file():
        return
    stored = read_header(path)
    attach(model, {depth: _empty(shapes) for depth, shapes in _by_depth(path, stored, geometry).items()})
    for name, one in stored.items():
        owner, _, attribute = name.rpartition(".")
        weight = torch.from_numpy(read_tensor(one, name))
        setattr(model.get_submodule(owner), attribute, nn.Parameter(weight, requires_grad=False))


def tensors(maps: Mapping[int, nn.Module]) -> dict[str, Tensor]:
    """Maps as the tensors of their file, float16 where that holds them."""
    named = {f"{PART}.{depth}.{key}": weight for depth, module in maps.items() for key, weight in module.state_dict().items()}
    return {name: half(weight).contiguous() for name, weight in sorted(named.items())}


def half(weight: Tensor) -> Tensor:
    """float16, or float32 where a number does not fit."""
    small = weight.half()
    return small if bool(torch.isfinite(small).all()) else weight.float()


def _empty(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    blank = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    if "weight" in blank:
        return full_map(blank["weight"], blank["bias"])
    return low_rank_map(blank["0.weight"], blank["1.weight"], blank["1.bias"])


def _by_depth(path: Path, stored: Mapping[str, Stored], geometry: Geometry) -> dict[int, dict[str, tuple[int, ...]]]:
    """The shapes of each depth's map by key, checked against the model."""
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, one in stored.items():
        if (match := _NAME.fullmatch(name)) is None:
            raise _foreign(path, f"it holds the tensor {name}")
        found.setdefault(int(match[1]), {})[match[2]] = one.shape
    if not found:
        raise _foreign(path, "it holds no map")
    for depth, shapes in found.items():
        if depth > geometry.n_blocks or depth == geometry.reference_depth:
            raise _foreign(
                path, f"it maps depth {depth} of {geometry.n_blocks}, {geometry.reference_depth} being the reference"
            )
        width = geometry.vision_width
        rank = shapes["0.weight"][0] if shapes.get("0.weight") else 2
        wanted = {"weight": (width, width), "bias": (width,), "0.weight": (rank, width)}
        wanted |= {"1.weight": (width, rank), "1.bias": (width,)}
        # One row alone could not be told from a column where a graph's weights are found by their marks.
        if set(shapes) not in _KEYS or rank < 2 or any(shape != wanted[key] for key, shape in shapes.items()):
            raise _foreign(path, f"the map of depth {depth} has the shapes {shapes}")
    return found


def _foreign(path: Path, what: str) -> InputError:
    return InputError(
        f"the exit maps do not belong to this model: {what}",
        where=str(path),
        expected="one map a depth other than the reference, of the tower's width",
        todo=f"fit them for this model (edgesafe maps), or delete {MAPS}",
    )
