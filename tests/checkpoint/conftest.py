"""A checkpoint to lay out anew, and the weights that compete with its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny import make_tiny_llava


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights of the same shapes and names on disk, other numbers."""
    return load_file(make_tiny_llava(tmp_path_factory.mktemp("other") / "llava", seed=1) / "model.safetensors")


@pytest.fixture
def folder(tiny_llava, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_llava, tmp_path / "model"))
