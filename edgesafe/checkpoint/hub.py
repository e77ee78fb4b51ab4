"""MODEL on the command line: a folder, or an id on the Hugging Face hub.

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

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What an export reads; a repository's other weight formats stay where they are.
_SMALL = ("*.json", "*.model", "*.jinja", "*.txt")
_WEIGHTS = "*.safetensors"


def resolve_model(model: str | Path) -> tuple[Path, str]:
    """The checkpoint's folder and its name. A folder is taken as it is and touches no network.

    Raises:
        InputError: neither a folder nor a hub id that can be had, here or from the hub.
    """
    if not _on_hub(model):
        return Path(model), Path(model).resolve().name
    folder = _download(str(model), [*_SMALL, _WEIGHTS])
    if not any(folder.glob(_WEIGHTS)):
        raise _no_weights(str(model), _WEIGHTS)
    return folder, str(model).rpartition("/")[2]


def resolve_outline(model: str | Path) -> tuple[Path, str, Callable[[Path], dict[str, Stored]]]:
    """As `resolve_model` for who needs no weights, and what reads the header of one of its files of weights.

    Of a model on the hub the small files are fetched; files of weights that are not in the hub's cache have their headers
    fetched, of gigabytes some kilobytes.

    Raises:
        InputError: as `resolve_model`; the function raises it too.
    """
    if not _on_hub(model):
        return *resolve_model(model), read_header
    return _download(str(model), [*_SMALL]), str(model).rpartition("/")[2], partial(_hub_header, str(model))


def _on_hub(model: str | Path) -> bool:
    return not Path(model).exists() and bool(_HUB_ID.fullmatch(str(model)))


def _download(model: str, patterns: list[str]) -> Path:
    """A snapshot of the repository, from the cache where there is no network."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # httpx, hub and cache errors share no base class
        raise _out_of_reach(model, error) from error


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
        todo="check the name and the network, or download it and name its folder",
    )
