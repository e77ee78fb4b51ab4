"""MODEL and outputs that send people the wrong way, at the command line of the commands that need an extra."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edgesafe import cli
from edgesafe.checkpoint import hub as hub_module
from edgesafe.errors import ConfigError, InputError
from fakehub import COMMIT, hub

LATIN = os.fsdecode(b"caf\xe9")
REPO, REVISION = "someone/tiny-llava", "refs/pr/1"
WORDS = {
    "plan": ["plan", "MODEL", "--device", "host"],
    "export": ["export", "MODEL", "--device", "host", "--out", "OUT"],
    "align": ["align", "MODEL", "--data", "DATA", "--out", "OUT"],
    "evaluate": ["evaluate", "MODEL", "--suite", "SUITE", "--out", "OUT"],
    "ship": ["ship", "MODEL", "--device", "host", "--data", "DATA", "--suite", "SUITE", "--out", "OUT"],
}


@pytest.fixture
def words(tmp_path):
    """A command's words, with places of this test's for those in capitals."""

    def make(command, **places):
        return [str(places.get(word, tmp_path / word)) if word.isupper() else word for word in WORDS[command]]

    return make


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", WORDS)
@pytest.mark.parametrize(
    ("name", "todo"),
    [
        ("llava.gguf", "original checkpoint"),
        ("model.ZIP", "unpack it"),
        ("model.tar.gz", "unpack it"),
        ("pytorch_model.bin", "name the folder that it lies in"),
        ("model.safetensors", "name the folder that it lies in"),
        ("decoder.onnx", "exported already"),
        ("weights", "name a folder"),
    ],
)
def test_a_model_that_is_a_file(words, tmp_path, capsys, command, name, todo):
    (tmp_path / name).write_bytes(b"x")
    before = tree(tmp_path)
    assert cli.main(words(command, MODEL=tmp_path / name)) == InputError.exit_code
    err = capsys.readouterr().err
    assert "MODEL is a file" in err and todo in err and str(tmp_path / name) in err and "ORG/NAME@REVISION" in err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", WORDS)
def test_a_model_that_is_a_web_address(words, capsys, command):
    assert cli.main(words(command, MODEL="https://huggingface.co/someone/tiny-llava")) == InputError.exit_code
    assert "name ORG/NAME" in capsys.readouterr().err


@pytest.mark.parametrize("command", WORDS)
@pytest.mark.parametrize("place", ["MODEL", "OUT", "DATA", "SUITE"])
def test_a_path_that_is_not_utf8(words, tmp_path, capsys, command, place):
    if place not in WORDS[command]:
        return
    (tmp_path / LATIN).mkdir()
    assert cli.main(words(command, **{place: tmp_path / LATIN})) == ConfigError.exit_code
    out, err = capsys.readouterr()
    assert out == "" and "not UTF-8" in err and r"caf\xe9" in err
    assert [path.name for path in tmp_path.iterdir()] == [LATIN]


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("plan", "--device"),
        ("ship", "--device"),
        ("evaluate", "--second-judge"),
        ("evaluate", "--toxicity"),
        ("evaluate", "--before"),
    ],
)
def test_an_option_that_is_not_utf8(words, tmp_path, capsys, command, option):
    line = words(command)
    assert cli.main([*line, option, f"{tmp_path}/{LATIN}.toml"]) == ConfigError.exit_code
    assert "not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["", "new", "new/deeper"])
@pytest.mark.parametrize(
    ("command", "place"),
    [(c, p) for c, line in WORDS.items() for p in ("MODEL", "DATA", "SUITE") if c != "plan" and p in line],
)
def test_an_output_that_is_an_input_or_in_one(words, tmp_path, capsys, tiny_llava, command, place, inside):
    source = tmp_path / place
    source.mkdir()
    (source / "rows.jsonl").write_text("{}\n")
    (tmp_path / "link").symlink_to(source)
    given = {"MODEL": tiny_llava} | {place: source}
    for out in (source, tmp_path / "link", tmp_path / "x" / ".." / place):
        assert cli.main(words(command, OUT=out / inside, **given)) == InputError.exit_code
        assert "which this command only reads" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"link", place})
    assert tree(source) == {"rows.jsonl": b"{}\n"}


def test_a_bundle_does_not_go_into_its_suite(words, tmp_path, tiny_llava, capsys):
    (tmp_path / "SUITE").mkdir()
    line = words("export", MODEL=tiny_llava, OUT=tmp_path / "SUITE" / "bundle")
    assert cli.main([*line, "--suite", str(tmp_path / "SUITE")]) == InputError.exit_code
    assert "--out lies in --suite" in capsys.readouterr().err and not list((tmp_path / "SUITE").iterdir())


def test_a_reward_model_does_not_go_into_its_base(tmp_path, capsys):
    (tmp_path / "base").mkdir()
    words = ["reward-model", str(tmp_path / "base"), "--data", str(tmp_path / "pairs"), "--out", str(tmp_path / "base" / "x")]
    assert cli.main(words) == InputError.exit_code and "--out lies in BASE" in capsys.readouterr().err


def test_the_helps_name_every_scheme_and_family(capsys):
    from edgesafe.checkpoint.recipe import load_recipes
    from edgesafe_export.quantize import TEXT_SCHEMES, VISION_SCHEMES

    for command in ("align", "evaluate", "plan", "export", "ship"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert all(name in shown for name in load_recipes()) and "LLaVA-1.5" not in shown
        if command in ("plan", "export"):
            assert all(scheme in shown for scheme in (*VISION_SCHEMES, *TEXT_SCHEMES))


def test_an_unknown_scheme_is_refused_before_the_model_is_read(words, capsys):
    assert cli.main([*words("plan"), "--text-scheme", "int3"]) == ConfigError.exit_code
    assert "unknown text scheme 'int3'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("org/name", ("org/name", None)),
        ("org/name@v1.0", ("org/name", "v1.0")),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("org/na.me-2@" + "a" * 40, ("org/na.me-2", "a" * 40)),
        ("org/name@", None),
        ("org/name@@x", None),
        ("org/name@../x", None),
        ("org/name/x", None),
        ("./name", None),
        ("/org/name", None),
        ("name", None),
        ("name@x", None),
    ],
)
def test_a_hub_id_and_its_revision(text, found):
    assert hub_module.split_revision(text) == found


def test_a_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "org" / "name@x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_module.resolve_model("org/name@x") == (Path("org/name@x"), "name@x")


@pytest.fixture
def repository(tiny_llava, tmp_path, monkeypatch):
    """The tiny checkpoint on a hub that has it at one revision alone."""
    from huggingface_hub import constants

    with hub(REPO, tiny_llava, REVISION) as (endpoint, _):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        yield f"{REPO}@{REVISION}"


@pytest.mark.enable_socket
def test_a_revision_is_planned_as_its_folder_is(repository, tiny_llava, words, capsys):
    assert cli.main([*words("plan", MODEL=tiny_llava), "--json"]) == 0
    wanted = json.loads(capsys.readouterr().out)
    assert cli.main([*words("plan", MODEL=repository), "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert {**got, "model": wanted["model"]} == wanted and got["model"] == "tiny-llava"


@pytest.mark.enable_socket
@pytest.mark.parametrize("command", ["export", "align", "evaluate", "ship"])
def test_a_revision_is_fetched_by_every_command(repository, words, tmp_path, monkeypatch, command):
    homes = {"export": "edgesafe_export.export", "align": "edgesafe.align.train", "evaluate": "edgesafe.evaluate.evaluate"}
    seen = []

    def stop(folder, *_, **__):
        seen.append(folder)
        raise KeyboardInterrupt

    if command == "export":
        monkeypatch.setattr(f"{homes[command]}.open_sketch", stop)
    else:
        monkeypatch.setattr("edgesafe.ship.ship" if command == "ship" else f"{homes[command]}.{command}", stop)
        monkeypatch.setattr("edgesafe.align.memory.say_need", lambda *_: None)
        monkeypatch.setattr("edgesafe.commands.evaluate._judges", lambda args: {})
    assert cli.main(words(command, MODEL=repository)) == 130
    (folder,) = seen
    assert Path(folder).name == COMMIT and (folder / "config.json").is_file() and list(folder.glob("*.safetensors"))


@pytest.mark.enable_socket
def test_another_revision_is_not_to_be_had_and_is_named(repository, words, capsys):
    assert cli.main(words("plan", MODEL=f"{REPO}@v9")) == InputError.exit_code
    err = capsys.readouterr().err
    assert f"{REPO}@v9" in err and "check the name, the revision" in err
