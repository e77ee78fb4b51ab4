"""MODEL on the command line: a folder, or an id on the Hugging Face hub, ORG/NAME or ORG/NAME@REVISION.

Differs: optimum's TasksManager is left out. Importing it needs `requests`, which optimum 2.3 does not ask for and
huggingface_hub no longer brings; of what it does (list the files, infer library and task), `model_type` is all that is needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgesafe.checkpoint.shards import ON_DISK, Reader, Stored, read_header
from edgesafe.checkpoint.weight_files import INDEX, weight_files
from edgesafe.errors import InputError

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w.-]+(/[\w.-]+)*))?", re.ASCII)
# What an export reads; a repository's other weight formats stay where they are.
_SMALL = ("*.json", "*.model", "*.jinja", "*.txt")
_WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class HubId:
    """A model on the hub: ORG/NAME, and a branch, tag, commit or refs/pr/N (None: the main branch)."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "")

    @property
    def name(self) -> str:
        """NAME without its owner and revision."""
        return self.repo.rpartition("/")[2]


def parse_hub_id(text: str) -> HubId | None:
    """A hub id, or None where the text is spelled like none.

    >>> parse_hub_id("llava-hf/llava-1.5-7b-hf@refs/pr/3"), parse_hub_id("models/a/b")
    (HubId(repo='llava-hf/llava-1.5-7b-hf', revision='refs/pr/3'), None)
    """
    found = _HUB_ID.fullmatch(text)
    return HubId(found["repo"], found["revision"]) if found else None


def resolve_model(model: str | Path) -> tuple[Path, str]:
    """The checkpoint's folder and its name. A folder is taken as it is and touches no network.

    Raises:
        InputError: neither a folder nor a hub id that can be had, here or from the hub.
    """
    hub = _on_hub(model)
    if hub is None:
        return Path(model), Path(model).resolve().name
    folder = _download(hub, [*_SMALL, _WEIGHTS])
    if not any(folder.glob(_WEIGHTS)):
        weight_files(folder, partial(_hub_has, hub))  # says what the repository has in their place
    return folder, hub.name


def resolve_outline(model: str | Path) -> tuple[Path, str, Reader]:
    """As `resolve_model` for who needs no weights, and what looks at its files of weights.

    Of a model on the hub the small files are fetched; files of weights that are not in the hub's cache have their headers
    fetched, of gigabytes some kilobytes.

    Raises:
        InputError: as `resolve_model`; the reader raises it too.
    """
    hub = _on_hub(model)
    if hub is None:
        return *resolve_model(model), ON_DISK
    folder = _download(hub, [*_SMALL])
    return folder, hub.name, Reader(partial(_hub_has, hub), partial(_hub_header, hub))


def _on_hub(model: str | Path) -> HubId | None:
    return None if Path(model).exists() else parse_hub_id(str(model))


def _download(hub: HubId, patterns: list[str]) -> Path:
    """A snapshot of the repository, from the cache where there is no network."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub.repo, revision=hub.revision, allow_patterns=patterns))
    except Exception as error:  # httpx, hub and cache errors share no base class
        raise _out_of_reach(hub, error) from error


def _hub_has(hub: HubId, path: Path) -> bool:
    """Whether the repository has a file: in the cache or on the hub. Where neither can say, what is in the cache counts."""
    if path.exists():
        return True
    from huggingface_hub import HfApi

    try:  # a snapshot's folder has its commit's name
        return HfApi().file_exists(hub.repo, path.name, revision=path.parent.name)
    except Exception as error:
        if (path.parent / INDEX).exists():
            return False
        raise _out_of_reach(hub, error) from error


def _hub_header(hub: HubId, path: Path) -> dict[str, Stored]:
    """The tensors of a snapshot's file of weights; where it is not in the cache, its header comes from the hub."""
    if path.exists():
        return read_header(path)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    try:
        header = HfApi().parse_safetensors_file_metadata(hub.repo, path.name, revision=path.parent.name)
    except EntryNotFoundError as error:
        raise InputError(
            f"the repository has no {path.name}",
            where=str(hub),
            expected="the files that its index names",
            todo="name a revision that is whole: ORG/NAME@REVISION",
        ) from error
    except Exception as error:
        raise _out_of_reach(hub, error) from error
    return {name: Stored(path, t.dtype, tuple(t.shape), t.data_offsets[0]) for name, t in header.tensors.items()}


def _out_of_reach(hub: HubId, error: Exception) -> InputError:
    return InputError(
        f"the model can't be had from the Hugging Face hub: {type(error).__name__}",
        where=str(hub),
        expected="a checkpoint folder, or a hub id that is cached or reachable: ORG/NAME, or ORG/NAME@REVISION",
        todo="check the name, the revision and the network, or download it and name its folder",
    )
