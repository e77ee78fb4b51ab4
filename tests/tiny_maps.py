"""Random exit maps for tiny checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

FULL = 0


def random_maps(width: int, ranks: Mapping[int, int], seed: int = 0) -> dict:
    """Maps by depth, far from the identity and from each other; a rank of `FULL` is none."""
    import torch

    from edgesafe.checkpoint.exit_maps import full_map, low_rank_map

    made, maker = {}, torch.Generator().manual_seed(seed)
    for depth, rank in ranks.items():
        bias = torch.randn(width, generator=maker)
        if rank == FULL:
            made[depth] = full_map(torch.randn(width, width, generator=maker) / width**0.5, bias)
        else:
            down, up = torch.randn(rank, width, generator=maker), torch.randn(width, rank, generator=maker)
            made[depth] = low_rank_map(down / width**0.5, up / rank**0.5, bias)
    return made


def write_maps(folder: Path, maps: Mapping) -> Path:
    """Put maps beside a checkpoint's weights; the folder is returned."""
    from safetensors.torch import save_file

    from edgesafe.checkpoint.exit_maps import tensors
    from edgesafe.checkpoint.weight_files import MAPS

    save_file(tensors(maps), folder / MAPS)
    return folder


def mapped_copy(folder: Path, to: Path, ranks: Mapping[int, int], width: int = 32) -> Path:
    """A copy of a checkpoint, with random maps of these ranks by depth."""
    return write_maps(Path(shutil.copytree(folder, to)), random_maps(width, ranks))
