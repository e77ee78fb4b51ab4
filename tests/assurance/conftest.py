"""Keys, and the handmade bundle with a record in it, signed by the first of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from signed_bundles import PASSWORD, add_record, write_key

from edgesafe.assurance.signing import sign
from edgesafe.format.bundle import Bundle


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ours and theirs, each as .pem and .pub, and locked, which has a password."""
    folder = tmp_path_factory.mktemp("keys")
    write_key(folder, "ours")
    write_key(folder, "theirs")
    write_key(folder, "locked", password=PASSWORD)
    return folder


@pytest.fixture(scope="session")
def signed(handmade: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Signed with ours; never changed."""
    root = Path(shutil.copytree(handmade, tmp_path_factory.mktemp("signed") / "bundle"))
    add_record(Bundle.open(root))
    sign(root, keys / "ours.pem")
    return root


@pytest.fixture
def change(signed: Path, tmp_path: Path) -> Callable[[], Path]:
    """A copy of the signed bundle that a test may break."""
    return lambda: Path(shutil.copytree(signed, tmp_path / "changed", dirs_exist_ok=True))
