"""A server that does as it is told, a suite of texts and one of pictures, and the command line over both."""

from __future__ import annotations

import pytest

from edgesafe.endpoint import ask
from misbehaving import MODEL, make_suite, misbehaving


@pytest.fixture
def server():
    with misbehaving() as running:
        yield running


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """No test waits for seconds between two tries."""
    monkeypatch.setattr(ask, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(ask, "_LEAST_PAUSE_S", 0.01)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    return make_suite(tmp_path_factory.mktemp("texts") / "suite")


@pytest.fixture
def words(server, texts, tmp_path):
    """The words of a command about the server."""

    def make(command: str = "certify", out: str = "run", **options: str) -> list[str]:
        given = {"endpoint": server.url, "model": MODEL, "suite": str(texts.root), "out": str(tmp_path / out), **options}
        return [command, *(word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value))]

    return make
