"""The step folders of `edgesafe ship`: run once, never over somebody else's folder, nothing lost on failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgesafe.errors import InputError
from edgesafe.ship import _Steps, digest_world


def _write(text: str):
    def work(folder: Path) -> None:
        folder.mkdir()
        (folder / "f").write_text(text)

    return work


def _fail(folder: Path) -> None:
    raise KeyboardInterrupt


def test_the_same_inputs_are_not_run_again(tmp_path):
    _Steps(tmp_path).do("data", [1], _write("first"), "t")
    assert (_Steps(tmp_path).do("data", [1], _fail, "t") / "f").read_text() == "first"
    assert (_Steps(tmp_path).do("data", [2], _write("second"), "t") / "f").read_text() == "second"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "steps.json"]


def test_a_folder_of_somebody_else_is_refused_and_kept(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="not made by this command"):
        _Steps(tmp_path).do("data", [1], _write("x"), "t")
    assert (tmp_path / "data" / "thesis.txt").read_text() == "years"


def test_a_failed_step_puts_the_older_folder_back(tmp_path):
    _Steps(tmp_path).do("data", [1], _write("first"), "t")
    with pytest.raises(KeyboardInterrupt):
        _Steps(tmp_path).do("data", [2], _fail, "t")
    assert (tmp_path / "data" / "f").read_text() == "first"
    assert not (tmp_path / "data.old").exists()


def test_rows_that_an_older_world_drew_are_drawn_again(tmp_path):
    code = tmp_path / "reference"
    code.mkdir()
    (code / "draw.py").write_text("noise = 8")
    _Steps(tmp_path).do("data", [digest_world(code)], _write("old world"), "t")
    (code / "notes.txt").write_text("not code")
    assert (_Steps(tmp_path).do("data", [digest_world(code)], _fail, "t") / "f").read_text() == "old world"
    (code / "draw.py").write_text("noise = 6")
    assert (_Steps(tmp_path).do("data", [digest_world(code)], _write("new world"), "t") / "f").read_text() == "new world"
