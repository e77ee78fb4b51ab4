"""A retrained checkpoint as what differs from its parent: the tensors that changed, and the files that are others.

So a clone carries the reference model's alignment in a quarter of the bytes. What is put together again has the very bytes of
the checkpoint that was taken apart; the digest of every file is compared.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from edgesafe.checkpoint.weight_files import SINGLE, read_object
from edgesafe.errors import InputError, IntegrityError
from edgesafe.format.files import replacing, sha256_file, write_atomically
from edgesafe.format.targets import NEW
from edgesafe.format.training_record import METRICS

CHANGED, MADE_OF = "changed.safetensors", "made_of.json"


def is_changes(folder: Path) -> bool:
    """Whether `write_changes` wrote a folder."""
    return (folder / MADE_OF).is_file() and (folder / CHANGED).is_file()


def made_of(folder: Path) -> str:
    """The key that `write_changes` was given; empty where there is no such folder."""
    return str(read_object(folder / MADE_OF).get("key", "")) if is_changes(folder) else ""


def write_changes(parent: Path, child: Path, out: Path, key: str) -> None:
    """Write what a checkpoint has and its parent has not. The log of its training (metrics.jsonl) is left out.

    Args:
        parent: checkpoint folder with its weights in one file.
        child: the same model after training.
        out: folder; an earlier one of this kind is replaced.
        key: what the child is made of, to be read by `made_of`.

    Raises:
        InputError: weights in more than one file, or of other names or shapes.
        IntegrityError: parent and changes would not give the child's bytes.
    """
    for folder in (parent, child):
        if not (folder / SINGLE).is_file():
            raise InputError("no weights in one file", where=str(folder), expected=SINGLE, todo="save the checkpoint unsharded")
    names = [path.name for path in sorted(child.iterdir()) if path.name != METRICS]
    digests = {name: sha256_file(child / name) for name in names}
    with replacing(out, "stored alignment", is_changes) as work:
        (new := work / NEW).mkdir()
        save_file(dict(_changed(parent, child)), new / CHANGED)
        for name in names:
            same = (parent / name).is_file() and sha256_file(parent / name) == digests[name]
            if name != SINGLE and not same:
                shutil.copyfile(child / name, new / name)
        write_atomically(new / MADE_OF, (json.dumps({"key": key, "files": digests}, indent=1) + "\n").encode())
        apply_changes(parent, new, work / "again")


def apply_changes(parent: Path, changes: Path, out: Path) -> None:
    """Put the retrained checkpoint together again.

    Args:
        parent: the checkpoint that it was trained from.
        changes: what `write_changes` wrote.
        out: new folder.

    Raises:
        IntegrityError: a file does not come out as it was.
    """
    with replacing(out) as work:
        (new := work / NEW).mkdir()
        for name, digest in read_object(changes / MADE_OF)["files"].items():
            if name == SINGLE:
                _merge(parent / SINGLE, changes / CHANGED, new / SINGLE)
            else:
                shutil.copyfile((changes if (changes / name).is_file() else parent) / name, new / name)
            if sha256_file(new / name) != digest:
                raise IntegrityError(
                    f"{name} is not what was stored",
                    where=str(changes),
                    expected=f"sha256 {digest[:12]}",
                    todo=f"restore {changes.name} and {parent.name} from the repository, or align again: make align",
                )


def _changed(parent: Path, child: Path) -> Iterator[tuple[str, Any]]:
    """Tensors of other bytes: by value, minus zero would be zero."""
    with safe_open(parent / SINGLE, "pt") as old, safe_open(child / SINGLE, "pt") as new:
        if set(old.keys()) != set(new.keys()):
            raise InputError("another model", where=str(child), expected=f"the tensors of {parent}", todo="name its parent")
        for name in new.keys():  # noqa: SIM118  (safetensors' handle is no mapping)
            was, tensor = old.get_tensor(name), new.get_tensor(name)
            if was.dtype != tensor.dtype or not was.view(torch.uint8).equal(tensor.view(torch.uint8)):
                yield name, tensor


def _merge(parent: Path, changed: Path, out: Path) -> None:
    with safe_open(parent, "pt") as old, safe_open(changed, "pt") as new:
        fresh = set(new.keys())
        tensors = {name: (new if name in fresh else old).get_tensor(name) for name in old.keys()}  # noqa: SIM118
        save_file(tensors, out, metadata=old.metadata())
