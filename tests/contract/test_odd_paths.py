"""Paths whose bytes are not UTF-8: a bundle there is refused by name, and a report there is written."""

from __future__ import annotations

import os
import shutil

import pytest
from chaos import small_suite

from edgesafe.cli import main
from edgesafe.errors import BundleError, ConfigError, InputError
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import write_certificate
from handmade import make_bundle, make_certificate


@pytest.mark.parametrize("command", ["measure", "smoke", "certify", "ask"])
def test_a_bundle_whose_path_is_not_utf8_is_refused_cleanly(handmade, tmp_path, capsys, command):
    folder = tmp_path / os.fsdecode(b"caf\xe9") / "bundle"
    shutil.copytree(handmade, folder)
    more = ["--image", "p.png", "--prompt", "what?"] if command == "ask" else []
    # On the command line the path is a setting; in a program it is the bundle's.
    assert main([command, str(folder), *more]) == ConfigError.exit_code
    assert "ConfigError: the path is not UTF-8" in capsys.readouterr().err
    with pytest.raises(BundleError, match=r"the path is not UTF-8 .*caf\\xe9.*ln -s"):
        Bundle.open(folder)


def test_reports_with_names_that_are_not_utf8_are_written(tmp_path):
    suite = small_suite(tmp_path / os.fsdecode(b"s\xe9"))
    bundle = make_bundle(tmp_path / "bundle", suite_from=suite)
    write_certificate(bundle, make_certificate(bundle, (1, 2)))
    xml, answers = (tmp_path / os.fsdecode(b"caf\xe9" + end) for end in (b".xml", b".jsonl"))
    main(["smoke", str(bundle.root), "--junit", str(xml)])
    main(["certify", str(bundle.root), "--answers", str(answers)])
    assert xml.read_bytes().startswith(b"<?xml") and len(answers.read_text().splitlines()) == 27


@pytest.mark.parametrize("words", [["smoke", "BUNDLE", "--junit"], ["certify", "BUNDLE", "--answers"]])
def test_a_link_to_itself_is_no_place_for_a_report(handmade, tmp_path, capsys, words):
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(handmade.rglob("*"))
    assert main([words[0], str(handmade), words[2], str(tmp_path / "loop")]) == InputError.exit_code
    assert "leads to itself" in capsys.readouterr().err and sorted(handmade.rglob("*")) == before


@pytest.mark.parametrize(
    "words", ["plan LOOP --device host", "export LOOP --device host --out OUT", "align LOOP --data D --out OUT"]
)
def test_a_link_to_itself_is_no_model(tmp_path, monkeypatch, capsys, words):
    (tmp_path / "LOOP").symlink_to("LOOP")
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == InputError.exit_code
    assert "no checkpoint here" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["LOOP"]


def test_a_model_in_a_working_folder_of_such_a_name_is_refused_before_any_work(tmp_path, monkeypatch):
    # The name of the folder becomes the bundle's: nothing could be sealed at the end.
    from edgesafe.format.targets import check_target

    (here := tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(InputError, match=r"not UTF-8 .*rename it\."):
        check_target(tmp_path / "out", "bundle", lambda folder: True, model=".")
