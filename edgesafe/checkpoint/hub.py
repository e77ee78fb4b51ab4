"""MODEL on the command line: a folder, or ORG/NAME[@REVISION] on the Hugging Face hub.

Differs: optimum's TasksManager is left out. Importing it needs `requests`, which optimum 2.3 does not ask for and
huggingface_hub no longer brings; of what it does (list the files, infer library and task), `model_type` is all that is needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from edgesafe.checkpoint.shards import Stored, read_header
from edgesafe.errors import InputError

# A revision is a commit, a tag or a branch, whose name may have slashes.
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\w[\w./-]*))?")
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
        InputError: a file, a web address, or a hub id that can't be had, neither from the cache nor from the hub.
    """
    found = _on_hub(model)
    if found is None:
        _check_local(model)
        return Path(model), Path(model).resolve().name
    folder = _download(*found, [*_SMALL, _WEIGHTS])
    if not any(folder.glob(_WEIGHTS)):
        raise _no_weights(str(model), _WEIGHTS)
    return folder, found[0].rpartition("/")[2]


def resolve_outline(model: str | Path) -> tuple[Path, str, Callable[[Path], dict[str, Stored]]]:
    """As `resolve_model` for who needs no weights, and what reads the header of one of its files of weights.

    Of a model on the hub the small files are fetched; files of weights that are not in the hub's cache have their headers
    fetched, of gigabytes some kilobytes.

    Raises:
        InputError: as `resolve_model`; the function raises it too.
    """
    found = _on_hub(model)
    if found is None:
        return *resolve_model(model), read_header
    return _download(*found, [*_SMALL]), found[0].rpartition("/")[2], partial(_hub_header, found[0])


def split_revision(model: str) -> tuple[str, str | None] | None:
    """A hub id and its revision (None: the hub's default); None where the text is no hub id.

    >>> split_revision("org/name"), split_revision("org/name@v1.0"), split_revision("./name")
    (('org/name', None), ('org/name', 'v1.0'), None)
    """
    matched = _HUB_ID.fullmatch(model)
    return (matched[1], matched[2]) if matched else None


def _on_hub(model: str | Path) -> tuple[str, str | None] | None:
    return None if Path(model).exists() else split_revision(str(model))


def _check_local(model: str | Path) -> None:
    """Refuse what is no folder in a way that says what to name instead; a missing folder is refused by who reads it."""
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


def _hub_header(model: str, path: Path) -> dict[str, Stored]:
    """The tensors of a snapshot's file of weights; where it is not in the cache, its header comes from the hub."""
    if path.exists():
        return read_header(path)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    try:  # a snapshot's folder has its commit's name
        header = HfApi().parse_safetensors_file_metadata(model, path.name, revision=path.parent.name)
    except EntryNotFoundError as error:
        raise _no_weights(model, path.name) from error
    except Exception as error:
        raise _out_of_reach(model, error) from error
    return {name: Stored(path, t.dtype, tuple(t.shape), t.data_offsets[0]) for name, t in header.tensors.items()}


def _no_weights(model: str, name: str) -> InputError:
    return InputError(f"the repository has no {name}", where=model, expected="weights as safetensors", todo="use another one")


def _out_of_reach(model: str, error: Exception) -> InputError:
    return InputError(
        f"the model can't be had from the Hugging Face hub: {type(error).__name__}",
        where=model,
        expected="a checkpoint folder, or a hub id that is cached or reachable",
        todo="check the name, the revision and the network, or download it and name its folder",
    )
