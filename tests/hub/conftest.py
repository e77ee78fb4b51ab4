"""A hub on this machine, a cache of the test's own, and a certified bundle with a suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chaos import small_suite

from fakehub_push import TOKEN, Hub, pushable
from handmade import make_bundle


@pytest.fixture(scope="session")
def certified(tmp_path_factory) -> Path:
    """The bundle made by hand with nine rows and, as a bundle in use has, a measurement and what an interrupted write left."""
    folder = tmp_path_factory.mktemp("certified")
    bundle = make_bundle(folder / "bundle", suite_from=small_suite(folder / "suite"))
    return bundle.root


@pytest.fixture
def hub() -> Iterator[Hub]:
    with pushable() as made:
        yield made


@pytest.fixture
def online(hub, tmp_path, monkeypatch) -> Callable[[bool], Path]:
    """Points huggingface_hub at the hub, with its token, or at no network at all; the cache's folder."""
    from huggingface_hub import constants

    def point(network: bool = True) -> Path:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not network)
        return tmp_path / "cache"

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return point
