"""Killed at every step that touches the disk, a write leaves the old result or the new one; with a slice of `make chaos`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import chaos
import pytest
from killed import killed_at_every_step

from edgesafe.format import files as files_module
from edgesafe.format.bundle import LATENCY, Bundle
from edgesafe.format.files import exchange, write_atomically
from edgesafe.format.seal import seal, unseal
from edgesafe.format.suite import read_suite
from mutants import wrong

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need a POSIX system")


@pytest.fixture
def sealed(tmp_path):
    """(write, lay, which) of a sealed file."""
    path, old, new = tmp_path / LATENCY, seal({"a": "old"}), seal({"a": "new" * 9000})

    def which():
        assert path.read_bytes() in (old, new)
        return unseal(path.read_bytes(), "x")["a"][:3]

    return tmp_path, lambda: files_module.write_atomically(path, new), lambda: path.write_bytes(old), which


def test_a_sealed_file_is_old_until_it_is_new(sealed):
    seen = killed_at_every_step(*sealed)
    assert seen == sorted(seen, reverse=True) and seen[0] == "old" and seen[-1] == "new" and len(seen) >= 4


def test_that_check_fails_where_the_file_is_written_in_place(sealed, monkeypatch):
    edits = (('partial = path.with_name(path.name + ".partial")', "partial = path"), ("partial.replace(path)", "pass"))
    monkeypatch.setattr(files_module, "write_atomically", wrong(write_atomically, *edits))
    with pytest.raises((AssertionError, FileNotFoundError)):
        killed_at_every_step(*sealed)


@pytest.fixture
def folders(tmp_path):
    """(write, lay, which) of a folder that another one replaces."""
    kept, out = chaos.small_suite(tmp_path / "kept", "older"), tmp_path / "out"

    def lay():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(kept, out)

    def which():
        return {"older": "old", "newer": "new"}[read_suite(out).name]

    return tmp_path, lambda: chaos.small_suite(out, "newer"), lay, which


def test_a_folder_is_old_until_it_is_new(folders):
    seen = killed_at_every_step(*folders)
    assert seen == sorted(seen, reverse=True) and {"old", "new"} == set(seen)


def test_that_check_fails_where_the_exchange_is_two_renames(folders, monkeypatch):
    monkeypatch.setattr(files_module, "exchange", lambda new, old: False)
    with pytest.raises(Exception, match="is not a suite"):
        killed_at_every_step(*folders)


def test_exchange_swaps_and_says_where_it_cannot(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    assert exchange(tmp_path / "a", tmp_path / "b") and (tmp_path / "a" / "b").exists()
    assert not exchange(tmp_path / "a", tmp_path / "nowhere") and (tmp_path / "a" / "b").exists()


def test_a_slice_of_kills_while_measuring_and_certifying():
    for command in ("measure", "certify"):
        row = chaos.chaos(command, 2, 120)
        assert row["failures"] == [] and row[chaos.OLD] + row[chaos.NEW] == row["kills"] > 0


def test_a_mixture_is_a_failure(tmp_path):
    victim = chaos.sealed_victim(tmp_path, "certify")
    path = Path(victim.words[1]) / "certificate.json"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(Exception, match="not what was sealed"):
        victim.which()
    assert Bundle.open(path.parent, verify=False).manifest.name == "handmade"
