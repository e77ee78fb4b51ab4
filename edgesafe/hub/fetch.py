"""A bundle from the Hugging Face hub: the files that its manifest lists, of one commit, into the hub's own cache."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from edgesafe.errors import HubError, HubUnavailableError
from edgesafe.format.bundle import MANIFEST, SHIPPED, Bundle
from edgesafe.hub.cache import HUB
from edgesafe.hub.reach import hub_errors, hub_name, library


def bundle_folder(path: str | os.PathLike[str]) -> Path:
    """A bundle's folder: the path itself or, of ``hub:ORG/NAME[@REVISION]``, a snapshot that is fetched first.

    Raises:
        ConfigError, InputError, HubError, HubUnavailableError: As by ``fetch_bundle``.
    """
    name = os.fspath(path)
    return fetch_bundle(name) if name.startswith(HUB) else Path(path)


def fetch_bundle(name: str) -> Path:
    """Fetch what the cache lacks of a bundle. Of one commit: a branch that moves meanwhile mixes nothing.

    Its bytes are not compared with the manifest here; whoever opens it does that.

    Args:
        name: ``hub:ORG/NAME`` or ``hub:ORG/NAME@REVISION``; a commit is asked for at most once. Without a network, or with
            ``HF_HUB_OFFLINE``, the cache is enough where it has the whole bundle.

    Returns:
        The snapshot's folder, named after its commit.

    Raises:
        ConfigError: huggingface_hub is not installed.
        InputError: The name is malformed.
        HubError: The hub says no, or the repository holds no bundle.
        HubUnavailableError: The hub can't be reached, or the snapshot is not whole.
    """
    repo, revision = hub_name(name)
    download = library().snapshot_download
    with hub_errors(name):
        folder = Path(download(repo, revision=revision, allow_patterns=list(SHIPPED)))
    if not (folder / MANIFEST).is_file():
        todo = "name one that `edgesafe push` made"
        raise HubError("the repository holds no bundle", where=name, expected=MANIFEST, todo=todo)
    files = Bundle.open(folder, verify=False).manifest.files
    if _missing(folder, files):
        with hub_errors(name):
            download(repo, revision=folder.name, allow_patterns=[glob.escape(path) for path in files])
    if missing := _missing(folder, files):
        raise HubUnavailableError(
            f"the snapshot is not whole: {missing[0]} is missing, of {len(missing)} that are",
            where=name,
            expected="the files that manifest.json lists",
            todo="run it again with the network; if they stay missing, the repository itself is not whole",
        )
    return folder


def _missing(folder: Path, files: Iterable[str]) -> list[str]:
    return [path for path in sorted(files) if not (folder / path).is_file()]
