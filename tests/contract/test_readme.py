"""README.md says what is so: its Python runs, its commands and targets exist, its links and pictures are there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from edgesafe.cli import main
from edgesafe.runtime import measure
from handmade import ANSWER

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_the_python_runs(handmade, tmp_path, monkeypatch, capsys):
    measure(shutil.copytree(handmade, tmp_path / "build" / "rpi5" / "bundle"), seconds=0.1)
    Image.new("RGB", (9, 7)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    blocks = _blocks("python")
    assert blocks
    for code in blocks:
        exec(compile(code, "README.md", "exec"), {})
    assert ANSWER in capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(set(re.findall(r"(?:^|`|\$ )edgesafe ([a-z-]+)", README, re.M))))
def test_every_command_exists(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0 and command in capsys.readouterr().out


def test_every_target_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert {"export", "test"} <= set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.M)) <= targets


def test_every_link_within_the_project_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert len(links) > 5 and [link for link in links if not (ROOT / link).exists()] == []
