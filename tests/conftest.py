"""Fixtures that several rooms share. The session-wide bundles are read-only: a test that changes one copies it."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The helpers beside this file (tiny, handmade) and the tools are plain modules, importable from every room's tests.
_HERE = Path(__file__).parent
_STATES = itertools.count()
sys.path[:0] = [str(_HERE), str(_HERE / "long"), str(_HERE / "tools")]


@pytest.fixture(autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds the records of smoke runs that another one, or this machine's user, left among the user's state."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / f"state-{next(_STATES)}"))


@pytest.fixture(scope="session", autouse=True)
def little_calibration_text(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny models are calibrated on little text. Only for rooms that export, since it imports torch."""
    with pytest.MonkeyPatch.context() as patch:
        if {"certify", "checkpoint", "export", "study"} & {item.path.parent.name for item in request.session.items}:
            patch.setattr("edgesafe_export.calibrate.CALIBRATION_TOKENS", 1024)
        yield


@pytest.fixture(scope="session")
def handmade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle whose numbers can be worked out on paper; depths 1 and 2 of 3 are certified."""
    from handmade import make_bundle

    return make_bundle(tmp_path_factory.mktemp("handmade") / "bundle").root


@pytest.fixture
def gate() -> Iterator[Any]:
    """Stops an engine that is `Watched` at the decoder's third run, the prompt and two tokens' worth, until it is opened."""
    from edgesafe.format import graph_io
    from engines import Gate

    made = Gate(graph_io.DECODER_PATH, 3)
    yield made
    made.go()


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a bundle where the test may change it."""

    def copy(bundle: Path) -> Path:
        return Path(shutil.copytree(bundle, tmp_path / "copy"))

    return copy


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Path]]:
    """Makes a folder in which nothing can be created or removed, not by root either; created where it isn't there."""
    closed: list[Path] = []

    def close(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        closed.append(folder)
        folder.chmod(0o555)
        if _refuses(folder):
            return folder
        # Permissions don't hold root up; the immutable flag does, where the file system has one.
        subprocess.run(["chattr", "+i", str(folder)], capture_output=True, check=False)
        if not _refuses(folder):
            _pretend(folder, monkeypatch)
        return folder

    yield close
    monkeypatch.undo()
    for folder in closed:
        subprocess.run(["chattr", "-i", str(folder)], capture_output=True, check=False)
        folder.chmod(0o755)


def _refuses(folder: Path) -> bool:
    try:
        (folder / "tried").touch()
        (folder / "tried").unlink()
    except OSError:
        return True
    return False


def _pretend(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def opened(path, flags, *more, **options):
        if flags & os.O_CREAT and Path(os.fsdecode(path)).parent == folder:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(Path, "open", lambda path, *a: open(path, *a, opener=opened))  # noqa: SIM115


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA checkpoint in transformers' own layout."""
    from tiny import make_tiny_llava

    folder = tmp_path_factory.mktemp("tiny") / "llava"
    make_tiny_llava(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That checkpoint exported in float32 for this machine, without a suite or a certificate."""
    from edgesafe.device import load_device
    from edgesafe_export import export_bundle

    out = tmp_path_factory.mktemp("exported") / "bundle"
    export_bundle(tiny_llava, out, load_device("host"), vision_scheme="fp32", text_scheme="fp32")
    return out


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 rows of the train split."""
    from edgesafe.reference.data import write_training

    folder = tmp_path_factory.mktemp("data") / "train"
    write_training(folder, 48, seed=38)
    return folder


@pytest.fixture(scope="session")
def llava(tiny_llava: Path):
    """The tiny checkpoint, loaded as the align room loads it."""
    from edgesafe.checkpoint.exit_model import load

    return load(tiny_llava)
