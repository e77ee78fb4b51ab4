"""`optimum-cli export edgesafe`: found by optimum's own registration, it asks for what `edgesafe export` would be asked for."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from edgesafe.commands import export
from edgesafe.errors import InputError
from optimum.commands import optimum_cli

SCHEMES = ["--vision-scheme", "fp32", "--text-scheme", "int8-block32"]
OPTIONS = ["--device", "rpi5", "--exits", "1,3", "--layout", "standalone", "--seed", "7", "--suite", "s", "--accept-damage"]


def asked(monkeypatch, *words: str) -> argparse.Namespace:
    """What reaches `edgesafe export` by optimum's command line."""
    got = []
    monkeypatch.setattr(export, "run", lambda args: got.append(args) or 0)
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "export", "edgesafe", *words])
    with pytest.raises(SystemExit) as ended:
        optimum_cli.main()
    assert ended.value.code == 0
    (args,) = got
    return args


@pytest.mark.parametrize("more", [["--device", "host"], [*OPTIONS, *SCHEMES, "--json"]])
def test_the_same_words_ask_for_the_same_export(monkeypatch, more):
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    ours = vars(parser.parse_args(["org/name@v1", *more, "--out", "b"]))
    theirs = vars(asked(monkeypatch, "--model", "org/name@v1", *more, "b"))
    assert {name: value for name, value in theirs.items() if name != "func"} == ours


def test_a_clone_beside_an_install_registers_it_once(monkeypatch, tmp_path):
    place = Path("optimum") / "commands" / "register"
    shutil.copytree(Path(__file__).resolve().parents[2] / "export" / place, tmp_path / place)
    monkeypatch.syspath_prepend(tmp_path)
    found = importlib.util.find_spec("optimum.commands.register").submodule_search_locations
    assert len({*found}) > 1
    assert asked(monkeypatch, "--model", "m", "--device", "host", "b").model == "m"


@pytest.mark.parametrize("words", [["--model", "m", "b"], ["--device", "host", "b"], ["--model", "m", "--device", "host"]])
def test_what_is_missing_is_named(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "export", "edgesafe", *words])
    with pytest.raises(SystemExit) as ended:
        optimum_cli.main()
    assert ended.value.code == 2 and "required" in capsys.readouterr().err


def test_an_error_of_the_tree_ends_it_with_its_own_code(monkeypatch, capsys, tmp_path):
    words = ["-m", str(tmp_path / "none"), "--device", "host", str(tmp_path / "b")]
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "export", "edgesafe", *words])
    with pytest.raises(SystemExit) as ended:
        optimum_cli.main()
    assert ended.value.code == InputError.exit_code and "InputError: no checkpoint here" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
