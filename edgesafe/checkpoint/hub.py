"""MODEL on the command line: a folder, or ORG/NAME[@REVISION] on the Hugging Face hub.

Differs: optimum's TasksManager is left out. Importing it needs `requests`, which optimum 2.3 does not ask for and
huggingface_hub no longer brings; of what it does (list the files, infer library and task), `model_type` is all that is needed.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from edgesafe.checkpoint.shards import ON_DISK, Reader, Stored, read_header
from edgesafe.checkpoint.weight_files import INDEX, SINGLE, weight_files
from edgesafe.errors import InputError
from edgesafe.hub.reach import split_revision

# What an export reads; a repository's other weight formats stay where they are.
_SMALL = ("*.json", "*.model", "*.jinja", "*.txt")
_WEIGHTS = "*.safetensors"
# What to do with a file that stands where a checkpoint's folder should, by the end of its name.
_FILES = {
    (".gguf", ".ggml"): "llama.cpp's format can't be turned back; take the original checkpoint, in safetensors",
    (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".7z"): "unpack it and name the folder",
    (".onnx",): "it is exported already; take the checkpoint that it was made from",
    (".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".json"): "name the folder that it lies in, which also has config.json",
}


def resolve_model(model: str | Path) -> tuple[Path, str]:
    """The checkpoint's folder and its name. A folder is taken as it is and touches no network.

    Raises:
        InputError: a file, a web address, or a hub id that neither the cache nor the hub has.
    """
    found = _on_hub(model)
    if found is None:
        _check_local(model)
        return Path(model), Path(os.path.realpath(model)).name
    folder = _download(*found, [*_SMALL, _WEIGHTS])
    if not any(folder.glob(_WEIGHTS)):
        weight_files(folder, partial(_hub_has, found[0]))  # says what the repository has in their place
    return folder, found[0].rpartition("/")[2]


def resolve_outline(model: str | Path) -> tuple[Path, str, Reader]:
    """As `resolve_model` for who needs no weights, and what looks at its files of weights.

    Of a model on the hub the small files are fetched; files of weights that are not in the hub's cache have their headers
    fetched, of gigabytes some kilobytes.

    Raises:
        InputError: as `resolve_model`; the reader raises it too.
    """
    found = _on_hub(model)
    if found is None:
        return *resolve_model(model), ON_DISK
    folder, repo = _download(*found, [*_SMALL]), found[0]
    return folder, repo.rpartition("/")[2], Reader(partial(_hub_has, repo), partial(_hub_header, repo))


def _on_hub(model: str | Path) -> tuple[str, str | None] | None:
    return None if Path(model).exists() else split_revision(str(model))


def _check_local(model: str | Path) -> None:
    """Refuse what isn't a folder, with what to name instead; a missing folder is refused by its reader."""
    path, expected = Path(model), "a checkpoint folder, or ORG/NAME or ORG/NAME@REVISION on the Hugging Face hub"
    if path.is_file():
        hints = (todo for ends, todo in _FILES.items() if path.name.lower().endswith(ends))
        raise InputError("MODEL is a file", where=str(model), expected=expected, todo=next(hints, "name a folder"))
    if "://" in str(model):
        raise InputError("MODEL is a web address", where=str(model), expected=expected, todo="name ORG/NAME alone")


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    """A snapshot of the repository, from the cache where there is no network."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # httpx, hub and cache errors share no base class
        raise _out_of_reach(model + (f"@{revision}" if revision else ""), error) from error


def _hub_has(model: str, path: Path) -> bool:
    """Whether the repository has a file: in the cache or on the hub. Where the hub can't say, cached weights are enough."""
    if path.exists():
        return True
    from huggingface_hub import HfApi

    try:  # a snapshot's folder has its commit's name
        return bool(HfApi().file_exists(model, path.name, revision=path.parent.name))
    except Exception as error:
        if any((path.parent / name).exists() for name in (SINGLE, INDEX)):
            return False
        raise _out_of_reach(model, error) from error


def _hub_header(model: str, path: Path) -> dict[str, Stored]:
    """The tensors of a snapshot's file of weights; where it is not in the cache, its header comes from the hub."""
    if path.exists():
        return read_header(path)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    try:
        header = HfApi().parse_safetensors_file_metadata(model, path.name, revision=path.parent.name)
    except EntryNotFoundError as error:
        what = f"the repository has no {path.name}"
        todo = "name a revision that is whole: ORG/NAME@REVISION"
        raise InputError(what, where=model, expected="the files that its index names", todo=todo) from error
    except Exception as error:
        raise _out_of_reach(model, error) from error
    return {name: Stored(path, t.dtype, tuple(t.shape), t.data_offsets[0]) for name, t in header.tensors.items()}


def _out_of_reach(model: str, error: Exception) -> InputError:
    return InputError(
        f"the model can't be fetched from the Hugging Face hub: {type(error).__name__}",
        where=model,
        expected="a checkpoint folder, or a hub id that is cached or reachable",
        todo="check the name, the revision and the network, or download it and name its folder",
    )
