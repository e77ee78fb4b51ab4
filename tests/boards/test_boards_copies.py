"""Copies to a board: whole or not at all, nothing twice, nothing left of what has no room, nothing half installed."""

from __future__ import annotations

import sys

import pytest

from edgesafe.errors import DeviceError
from edgesafe.format.bundle import Bundle
from edgesafe_boards import copies, facts, wheels
from edgesafe_boards.install import Cargo, install, needs, open_bundle

FOLDER = facts.FOLDER


@pytest.fixture
def files(tmp_path):
    for name in ("a", "b c", "deep/d"):
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_text(f"text of {name}", encoding="ascii")
    return {name: tmp_path / "files" / name for name in ("a", "b c", "deep/d")}


def lying(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_copy_is_whole(board, files, tmp_path):
    copies.send(board, files, "things")
    home = tmp_path / "home" / FOLDER
    assert lying(home) == {f"things/{name}": f"text of {name}" for name in files}
    copies.send(board, {"a": files["a"]}, "things")  # a later one takes its place
    assert lying(home) == {"things/a": "text of a"}
    assert copies.fetch(board, "things/a") == b"text of a"


def test_a_copy_continues(board, program, files, tmp_path):
    partial = tmp_path / "home" / FOLDER / "things.partial"
    partial.mkdir(parents=True)
    for name, text in (("a", "text of a"), ("b c", "text of"), ("stale", "x")):
        (partial / name).write_text(text, encoding="ascii")
    program("tar", f'tee {tmp_path / "sent"} | /usr/bin/tar "$@"')
    copies.send(board, files, "things")
    assert lying(partial.with_name("things")) == {name: f"text of {name}" for name in files}
    sent = (tmp_path / "sent").read_bytes()
    assert b"text of b c" in sent and b"text of a" not in sent


def test_a_damaged_copy_is_refused(board, program, files, tmp_path):
    program("tar", '/usr/bin/tar "$@" && echo more >> a')
    with pytest.raises(DeviceError, match="what arrived of the things is not what was sent"):
        copies.send(board, files, "things")
    assert lying(tmp_path / "home") == {}


def test_a_full_disk_keeps_nothing(board, program, files, tmp_path):
    program("tar", "head -c 100 > a; echo 'tar: a: Cannot write: No space left on device' >&2; exit 2")
    with pytest.raises(DeviceError, match="copying the things: the board's disk is full"):
        copies.send(board, files, "things")
    assert lying(tmp_path / "home") == {}


def cargo_of(bundle, tmp_path):
    wheel = tmp_path / "edgesafe-0-py3-none-any.whl"
    wheel.write_bytes(b"0" * 1000)
    return Cargo(open_bundle(bundle), {wheel.name: wheel})


# A Python that makes an environment whose pip does as it is told.
PYTHON = """
case "$1" in
-c) exec /usr/bin/env python3.11 "$@" 2>/dev/null || exit 1 ;;
-m) mkdir -p venv/bin wheels
    printf '#!/bin/sh\\necho "$@" >> ../pip; exit PIP\\n' > venv/bin/python
    chmod +x venv/bin/python ;;
esac
"""


def fitting(board, cargo):
    told = facts.ask(board)
    return facts.Facts("Linux", "aarch64", 64, (3, 11), True, "glibc 2.36", None, None, True, (), told.installed, told.bundle)


def test_install_once(board, program, handmade, tmp_path):
    program("python3", PYTHON.replace("PIP", "0"))
    cargo, home = cargo_of(handmade, tmp_path), tmp_path / "home"
    for _ in range(2):
        install(board, fitting(board, cargo), cargo)
    assert (home / "pip").read_text().count("--no-index --no-deps wheels/edgesafe-0-py3-none-any.whl") == 1
    assert Bundle.open(home / FOLDER / "bundle").digest == cargo.bundle.digest
    told = fitting(board, cargo)
    assert needs(cargo, told).disk < needs(cargo, facts.read("")).disk
    # A newer wheel is installed, and a measurement of the earlier one forgotten.
    (home / FOLDER / "bundle" / "latency.json").touch()
    (tmp_path / "edgesafe-0-py3-none-any.whl").write_bytes(b"1" * 1000)
    install(board, fitting(board, cargo), cargo)
    assert (home / "pip").read_text().count("--no-deps") == 2 and not (home / FOLDER / "bundle" / "latency.json").exists()


def test_nothing_is_fetched_that_tokenizers_alone_asks_for(program, tmp_path, monkeypatch):
    program("python", f'echo "$@" >> {tmp_path}/asked')
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    wheels.fetch(tmp_path / "wheels", "aarch64", "3.11", [*wheels.dependencies(), "pytest"], "-c", "constraints")
    alone, rest = [line.partition(" -d ")[2].split()[1:] for line in (tmp_path / "asked").read_text().splitlines()]
    assert alone[0] == "--no-deps" and alone[1].startswith("tokenizers>=") and len(alone) == 2
    assert [word.partition(">")[0] for word in rest] == ["numpy", "onnxruntime", "pillow", "pytest"]


def test_a_failed_pip_leaves_no_environment(board, program, handmade, tmp_path):
    program("python3", PYTHON.replace("PIP", "1"))
    cargo, home = cargo_of(handmade, tmp_path), tmp_path / "home" / FOLDER
    with pytest.raises(DeviceError, match="installing the wheel by pip ended with code 1"):
        install(board, fitting(board, cargo), cargo)
    assert not (home / "venv").exists() and not (home / "ready").exists() and not (home / "bundle").exists()


def test_a_bundle_without_a_certificate_goes_nowhere(copy_of, handmade):
    bundle = copy_of(handmade)
    (bundle / "certificate.json").unlink()
    with pytest.raises(DeviceError, match="no certificate that a board could agree with"):
        open_bundle(bundle)


def test_this_machines_measurement_stays_here(copy_of, handmade, tmp_path):
    bundle = copy_of(handmade)
    cargo = cargo_of(bundle, tmp_path)
    assert {"manifest.json", "certificate.json"} < set(cargo.bundle_files) and "latency.json" not in cargo.bundle_files
