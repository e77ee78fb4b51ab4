"""Files of a run: checkpoints to resume from, metrics, and the aligned checkpoint that comes out."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from edgesafe.checkpoint.exit_maps import tensors
from edgesafe.checkpoint.weight_files import BESIDE, MAPS
from edgesafe.errors import ConfigError
from edgesafe.format.files import write_atomically
from edgesafe.format.training_record import METRICS as METRICS
from edgesafe.format.training_record import RECORD as RECORD
from edgesafe.maps.gather import STATE

CHECKPOINT = "checkpoint.pt"
WORK = (CHECKPOINT, METRICS, MAPS, STATE)  # a work folder with one of these is an earlier run's


def start_over(partial: Path) -> None:
    """A new folder for a run to write to; what an interrupted run left there is deleted and reported."""
    if partial.exists():
        if done := done_updates(partial):
            print(f"  starting over; --resume would continue after update {done}", file=sys.stderr, flush=True)
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def save_checkpoint(
    folder: Path,
    done: int,
    identity: Mapping[str, Any],
    params: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Any] | None = None,
    *,
    main: bool = True,
) -> None:
    """Write what is trained, the optimizer and the random state after `done` updates; an earlier checkpoint stays until then.

    identity: what the run is made from (config, digests); a run with another one can't resume from it.
    extra: whatever else the run needs to resume: figures, texts, lists, tensors. main: whether this process writes; with
        weights that FSDP has dealt out all of them have to call this.
    """
    state = {
        "done": done,
        "identity": json.dumps(identity, sort_keys=True),
        "params": whole([p.detach() for p in params]),
        "optimizer": whole(optimizer.state_dict()),
        "rng": torch.get_rng_state(),
        "extra": whole(dict(extra or {})),
    }
    if not main:
        return
    # Through memory, because torch turns a full disk into a RuntimeError that nobody can tell from others.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(folder / CHECKPOINT, buffer.getvalue())


def whole(tree: Any) -> Any:
    """A tree of dicts and lists with whole tensors in place of those that FSDP has dealt out."""
    return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, tree)


def placed(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor dealt out as another one is."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _place_state(state: dict[str, Any], params: Sequence[torch.nn.Parameter]) -> dict[str, Any]:
    """An optimizer's state dict, whose tensors of a parameter's shape lie as the parameter does."""
    by_param = {
        number: {
            k: placed(v, params[number]) if getattr(v, "shape", None) == params[number].shape else v for k, v in one.items()
        }
        for number, one in state["state"].items()
    }
    return {**state, "state": by_param}


def done_updates(folder: Path) -> int:
    """Updates behind the checkpoint in a folder, 0 where there is none that can be read."""
    try:
        return int(torch.load(folder / CHECKPOINT, weights_only=True)["done"])
    except Exception:  # as in load_checkpoint; the figure is only for a message, and must not stop a new run
        return 0


def _read_state(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What `save_checkpoint` wrote, if the run is the same."""
    if not path.is_file():
        raise ConfigError(
            "nothing to resume", where=str(path), expected="a checkpoint of an interrupted run", todo="run without --resume"
        )
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:  # torch.load raises whatever the damaged bytes make its parts raise
        raise ConfigError(
            "the checkpoint can't be read", where=str(path), expected="what the run wrote", todo="run without --resume"
        ) from error
    before, now = json.loads(state["identity"]), json.loads(json.dumps(identity))
    differ = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if differ:
        raise ConfigError(
            f"{', '.join(differ)} differ from the interrupted run's",
            where=str(path),
            expected="the same model, data and settings",
            todo="use the same, or run without --resume",
        )
    return state


def load_checkpoint(
    folder: Path,
    identity: Mapping[str, Any],
    params: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any] | None = None,
    *,
    main: bool = True,
) -> int:
    """Put a checkpoint's state in place and cut the metrics back to it; returns the updates behind it.

    extra: is filled with what `save_checkpoint` got. main: whether this process is the one of the run that writes files.

    Raises:
        ConfigError: there is none, it can't be read, or it is of another run.
    """
    state = _read_state(folder / CHECKPOINT, identity)
    if [p.shape for p in params] != [saved.shape for saved in state["params"]]:
        raise ConfigError(
            "the interrupted run trained other weights",
            where=str(folder / CHECKPOINT),
            expected="a checkpoint of this edgesafe's",
            todo="run without --resume",
        )
    with torch.no_grad():
        for p, saved in zip(params, state["params"], strict=True):
            p.copy_(placed(saved, p))
    optimizer.load_state_dict(_place_state(state["optimizer"], params))
    torch.set_rng_state(state["rng"])
    if extra is not None:
        extra.update(state["extra"])
    if main:
        cut_metrics(folder / METRICS, state["done"])
    return int(state["done"])


def cut_metrics(path: Path, done: int) -> None:
    """Keep the metrics of the first `done` updates; what an interrupted run wrote after its checkpoint comes again."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            early = json.loads(line)["update"] < done
        except ValueError:  # the line was being written when the run was killed
            continue
        if early:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept).encode())


def versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    return {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "numpy")}


def write_model(
    model: Any,
    model_dir: Path,
    partial: Path,
    record: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor] | None = None,
    maps: Mapping[int, torch.nn.Module] | None = None,
) -> None:
    """Write a checkpoint's weights and exit maps, its parent's tokenizer and processor files, and where it comes from.

    weights: by name, instead of the model's own. maps: by depth; they are no part of `model` here.
    """
    with disk_full_is_oserror(partial):
        model.save_pretrained(partial, state_dict=weights)
        if maps:
            save_file(tensors(maps), partial / MAPS)
    for file in sorted(model_dir.iterdir()):
        fresh = file.is_file() and file.suffix in BESIDE and not (partial / file.name).exists()
        if fresh and file.name != RECORD and not file.name.endswith(".index.json"):
            shutil.copy2(file, partial / file.name)
    write_atomically(partial / RECORD, (json.dumps(record, indent=1) + "\n").encode())
    (partial / CHECKPOINT).unlink(missing_ok=True)


@contextlib.contextmanager
def disk_full_is_oserror(path: Path) -> Iterator[None]:
    """Turn safetensors' own error of a full disk into an OSError, which the command line explains."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if f"os error {number})" in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise
