"""Outputs are tried before the work: a place that can't be written is refused at once, and the trial leaves nothing there."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from edgesafe.errors import CertificateError, EdgesafeError, InputError
from edgesafe.format import targets
from edgesafe.format.files import write_atomically
from edgesafe.format.targets import check_writable
from mutants import wrong


def places(folder: Path) -> dict[str, Path]:
    """Places where no file can be written, whoever asks."""
    (folder / "a file").write_text("x")
    (folder / "a folder").mkdir()
    (folder / "dangling").symlink_to(folder / "nowhere" / "deep")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "a socket"))  # its name has to be short
    return {
        "a missing parent": folder / "missing" / "out.json",
        "two missing parents": folder / "missing" / "deeper" / "out.json",
        "a file for a parent": folder / "a file" / "out.json",
        "a folder in its place": folder / "a folder",
        "a dangling link for a parent": folder / "dangling" / "out.json",
        "a socket": folder / "a socket",
        "a name that is too long": folder / ("x" * 300),
        "a name that no file can have": folder / "a\0b",
        "a file system that is no place for files": Path("/proc/out.json"),
    }


def test_what_can_not_be_written_is_refused_as_writing_would_be(tmp_path):
    for name, path in places(tmp_path).items():
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError) as caught:
            check_writable(path)
        assert str(path) in str(caught.value) and caught.value.todo and caught.value.expected, name
        assert sorted(tmp_path.rglob("*")) == before, name
        # The oracle is the writing itself.
        with pytest.raises((OSError, ValueError)):
            write_atomically(path, b"x")


def test_what_can_be_written_is_left_as_it_was(tmp_path):
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("earlier")
    old.chmod(stat.S_IRUSR)  # replaced as a whole, so its own permissions don't matter
    stale = tmp_path / "old.json.partial"
    stale.write_text("what a killed run left")
    for path in (new, old, Path(os.path.relpath(new))):
        check_writable(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.json"] and old.read_text() == "earlier"
    write_atomically(old, b"later")
    assert old.read_bytes() == b"later"


def test_a_read_only_folder_is_refused_to_whom_the_system_refuses_it(tmp_path, read_only):
    folder = read_only(tmp_path / "closed")
    with pytest.raises(CertificateError, match="can't be written") as caught:
        check_writable(folder / "out.json", error=CertificateError, todo="copy it")
    assert caught.value.todo == "copy it" and list(folder.iterdir()) == []


def test_that_check_fails_where_permissions_are_read_instead_of_tried(tmp_path, read_only, monkeypatch):
    trial = "_try_file(place.with_name(place.name + _PARTIAL))"
    monkeypatch.setattr(targets, "check_writable", wrong(check_writable, (trial, "path.parent.stat()")))
    with pytest.raises(pytest.fail.Exception), pytest.raises(EdgesafeError):
        targets.check_writable(read_only(tmp_path / "closed") / "out.json")
