"""MODEL on the command line: a folder, or an id on the Hugging Face hub.

Differs: optimum's TasksManager is left out. Importing it needs `requests`, which optimum 2.3 does not ask for and
huggingface_hub no longer brings; of what it does (list the files, infer library and task), `model_type` is all that is needed.
"""

from __future__ import annotations

import re
from pathlib import Path

from edgesafe.errors import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What an export reads; a repository's other weight formats stay where they are.
_WANTED = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


def resolve_model(model: str | Path) -> tuple[Path, str]:
    """The checkpoint's folder and its name. A folder is taken as it is and touches no network.

    Raises:
        InputError: neither a folder nor a hub id that can be had, here or from the hub.
    """
    path = Path(model)
    if path.exists() or not _HUB_ID.fullmatch(str(model)):
        return path, path.resolve().name
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(str(model), allow_patterns=list(_WANTED)))
    except Exception as error:  # httpx, hub and cache errors share no base class
        raise InputError(
            f"the model can't be had from the Hugging Face hub: {type(error).__name__}",
            where=str(model),
            expected="a checkpoint folder, or a hub id that is cached or reachable",
            todo="check the name and the network, or download it and name its folder",
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise InputError("the repository has no safetensors", where=str(model), expected="weights as safetensors")
    return folder, str(model).rpartition("/")[2]
