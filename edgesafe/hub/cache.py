"""The Hugging Face hub's cache on this machine, where a snapshot's files are links into a folder of blobs beside it.

Source: huggingface_hub 2.4, file_download.py: ``models--ORG--NAME/blobs/ETAG`` and ``.../snapshots/COMMIT/PATH``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

HUB = "hub:"
# What every repository has, and where `hf download --local-dir` keeps its notes. Nothing of edgesafe reads them.
_EVERY_REPOSITORY, _DOWNLOADED = ("README.md", ".gitattributes"), ".cache/huggingface/"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"models--([^/]+?)--([^/]+)")


def snapshot_source(folder: Path) -> str:
    """``hub:ORG/NAME@COMMIT`` of a folder that is a snapshot, or lies in one; else empty."""
    real = Path(os.path.realpath(folder))
    for place in (real, *real.parents):
        if _COMMIT.fullmatch(place.name) and place.parent.name == "snapshots":
            repo = _REPO.fullmatch(place.parent.parent.name)
            return f"{HUB}{repo[1]}/{repo[2]}@{place.name}" if repo else ""
    return ""


def of_the_hub(folder: Path, paths: Iterable[str]) -> set[str]:
    """Those of a folder's files that the hub added: in a snapshot, or in what `hf download --local-dir` wrote."""
    if not snapshot_source(folder) and not (folder / _DOWNLOADED).is_dir():
        return set()
    return {path for path in paths if path in _EVERY_REPOSITORY or path.startswith(_DOWNLOADED)}


def is_blob(path: Path) -> bool:
    """Whether a link in a snapshot leads to a plain file among the blobs of the same repository, and to nothing else."""
    real, place = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    repo = real.parent.parent
    if real.parent.name != "blobs" or not place.is_relative_to(repo / "snapshots"):
        return False
    return bool(snapshot_source(place)) and real.is_file()
