"""A tiny checkpoint and a few training rows of the reference world."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 rows of the train split."""
    from edgesafe.reference.data import write_training

    folder = tmp_path_factory.mktemp("data") / "train"
    write_training(folder, 48, seed=3)
    return folder


@pytest.fixture(scope="session")
def llava(tiny_llava: Path):
    """The tiny checkpoint, loaded as the align room loads it."""
    from edgesafe.align.model import load

    return load(tiny_llava)
