"""The folder of commands: each module's form and help, the engine by name, paths that are not UTF-8, and the answer's line."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from chaos import small_suite
from PIL import Image

import edgesafe
from edgesafe import cli
from edgesafe.commands._shared import add_command, engine_of, folder, print_json
from edgesafe.errors import ConfigError
from edgesafe.format.targets import shown_path
from handmade import ANSWER, make_bundle

PACKAGE = Path(edgesafe.__file__).parent
COMMANDS = cli.commands()
ACTIONS = ["suite import", "devices show", "reference draw", "reference data", "reference build"]
LATIN = os.fsdecode(b"caf\xe9")
ENGINE = """
from edgesafe.runtime import OnnxRuntime

opened = []

class Counting(OnnxRuntime):
    name = "counting"

    def open(self, path, spec, threads):
        opened.append(path)
        return super().open(path, spec, threads)

made = Counting()
def make():
    return made
class Inner:
    engine = made
class Old:
    name, version, open = "old", 1, print
class Broken:
    def __init__(self):
        raise OSError("no licence")
nothing = {}
"""


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (20, 9), "red").save(path)
    return str(path)


def parser_of(name):
    module = importlib.import_module(COMMANDS[name])
    parser = add_command(argparse.ArgumentParser(prog="edgesafe").add_subparsers(), name, module.__doc__)
    module.add_arguments(parser)
    return parser


def public_names(path):
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def test_every_command_has_two_functions_and_the_folder_stays_small():
    paths = sorted((PACKAGE / "commands").rglob("*.py"))
    assert len(paths) == len(COMMANDS) + 8  # one a command, what they share, and `__init__` in each folder
    for path in paths:
        if not path.name.startswith("_"):
            assert public_names(path) == ["add_arguments", "run"], path.name
    assert set(COMMANDS) == {
        *("ask", "measure", "devices", "certify", "smoke", "serve", "plan", "export", "ladder"),
        *("align", "evaluate", "suite", "rows", "reward-model", "ship", "reference", "maps"),
        *("sign", "verify", "evidence", "compare", "push"),
    }


def test_that_check_sees_a_third_name(tmp_path):
    (tmp_path / "x.py").write_text("def add_arguments(p): ...\ndef run(a): ...\nA, _B = 1, 2\nclass C: ...\n")
    assert public_names(tmp_path / "x.py") == ["add_arguments", "run", "A", "C"]


def test_nothing_else_parses_arguments():
    roots = [PACKAGE, PACKAGE.parent / "export" / "edgesafe_export", PACKAGE.parent / "edgesafe_export"]
    found = {
        path.relative_to(root).as_posix()
        for root in roots
        for path in root.rglob("*.py")
        if re.search(r"^\s*(import|from) argparse\b", path.read_text(encoding="utf-8"), re.M)
    }
    assert {name for name in found if not name.startswith("commands/")} == {"cli.py"}


@pytest.mark.parametrize("words", [*COMMANDS, *ACTIONS])
def test_every_help_says_what_and_the_defaults_and_an_example(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words.split(), "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert re.search(rf"^Example:\n  edgesafe {words}", shown, re.M), shown
    assert re.search(r"^[A-Z].+[.]$", shown.partition("\n\n")[2], re.M), shown


@pytest.mark.parametrize("words", [*COMMANDS, *ACTIONS])
def test_every_option_has_help_and_tells_its_default(words):
    parser = parser_of(words.split()[0])
    for word in words.split()[1:]:
        (actions,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        parser = actions.choices[word]
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction | argparse._HelpAction):
            assert action.help, action.dest
            if action.default not in (None, False, [], argparse.SUPPRESS):
                assert "(default: " in action.help, action.dest


@pytest.mark.parametrize("words", [*COMMANDS, *ACTIONS])
def test_every_example_is_one_that_parses(words):
    parser = parser_of(words.split()[0])
    example = parser.epilog
    for word in words.split()[1:]:
        (actions,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        example = actions.choices[word].epilog
    line = next(line.strip() for line in example.splitlines() if line.strip().startswith("edgesafe "))
    parsed = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', line)]
    parser.parse_args(parsed[2:])


def test_the_list_of_commands_is_quick_and_loads_no_package():
    code = "import sys; from edgesafe.cli import main\ntry:\n main(['--help'])\nfinally:\n print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ}, cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and all(f"    {name} " in done.stdout or f"    {name}\n" in done.stdout for name in COMMANDS)
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "edgesafe" in loaded
    assert not loaded & {"numpy", "onnxruntime", "tokenizers", "PIL", "torch", "transformers", "onnx"}


def test_only_the_command_that_was_asked_for_is_loaded():
    code = "import sys; from edgesafe.cli import main; main(['devices'])\nprint(*[m for m in sys.modules if 'commands.' in m])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1].split() == ["edgesafe.commands._shared", "edgesafe.commands.devices"]


@pytest.fixture
def engines(tmp_path, monkeypatch):
    """The module `engines_here` in the working folder, which is not on the path."""
    (tmp_path / "engines_here.py").write_text(ENGINE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield "engines_here"
    sys.modules.pop("engines_here", None)


@pytest.mark.parametrize("name", ["Counting", "made", "make", "Inner.engine"])
def test_an_engine_is_an_object_or_what_a_name_makes(engines, name):
    assert engine_of(f"{engines}:{name}").name == "counting"


def test_ask_runs_on_the_named_engine(engines, handmade, picture, capsys):
    words = ["ask", str(handmade), "--image", picture, "--prompt", "what?"]
    assert cli.main(words) == 0
    assert cli.main([*words, "--engine", f"{engines}:Counting", "--allow-uncertified"]) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n" * 2
    assert len(sys.modules[engines].opened) == 6  # three blocks, the head, the embedding and the decoder


@pytest.mark.parametrize("command", ["ask", "measure", "smoke", "certify", "serve"])
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("engines_here", "another form"),
        ("engines_here:", "another form"),
        (":made", "another form"),
        ("engines_here:made:x", "another form"),
        ("../engines_here:made", "another form"),
        ("no_such_module:made", "no_such_module can't be imported: ModuleNotFoundError"),
        ("torch_is_missing.x:made", "can't be imported"),
        ("engines_here:none", "engines_here has no none"),
        ("engines_here:Inner.none", "engines_here has no Inner.none"),
        ("engines_here:nothing", "nothing in the module engines_here isn't an engine: it has no text name"),
        ("engines_here:Old", "it has no text version"),
        ("engines_here:Broken", "can't be made: OSError: no licence"),
    ],
)
def test_what_is_no_engine_is_refused_by_name(engines, handmade, picture, capsys, command, text, shown):
    more = ["--image", picture, "--prompt", "what?"] if command == "ask" else []
    assert cli.main([command, str(handmade), *more, "--engine", text]) == ConfigError.exit_code
    err = capsys.readouterr().err
    assert shown in err and f"--engine {text}" in err and "MODULE:NAME" in err


def test_json_is_one_document_whatever_the_terminal_and_the_path(handmade, tmp_path):
    image = tmp_path / f"{LATIN}.png"
    Image.new("RGB", (20, 9)).save(image)
    for encoding in ("ascii", "utf-8"):
        done = subprocess.run(
            [sys.executable, "-m", "edgesafe", "ask", str(handmade), "--image", image, "--prompt", "what?", "--json"],
            env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONIOENCODING": encoding},
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0 and json.loads(done.stdout)["text"] == ANSWER


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_path_that_is_not_utf8_comes_back_from_json(tmp_path, monkeypatch, encoding):
    with (tmp_path / "out").open("w", encoding=encoding, errors="replace") as out:
        monkeypatch.setattr(sys, "stdout", out)
        print_json({"path": f"/data/{LATIN}", "text": "é€"})
    assert json.loads((tmp_path / "out").read_bytes().decode(encoding)) == {"path": f"/data/{LATIN}", "text": "é€"}


@pytest.mark.parametrize("command", ["ask", "measure", "smoke", "certify", "serve"])
def test_a_bundle_whose_path_is_not_utf8_is_refused_with_what_to_do(handmade, tmp_path, picture, capsys, command):
    (tmp_path / LATIN).symlink_to(handmade)
    more = ["--image", picture, "--prompt", "what?"] if command == "ask" else []
    assert cli.main([command, str(tmp_path / LATIN), *more]) == ConfigError.exit_code
    out, err = capsys.readouterr()
    assert out == "" and "not UTF-8" in err and r"caf\xe9" in err and "link" in err


def test_a_link_with_a_plain_name_is_the_way_out(handmade, copy_of, tmp_path, picture, capsys):
    copy_of(handmade).rename(tmp_path / LATIN)
    (tmp_path / "plain").symlink_to(tmp_path / LATIN)
    assert cli.main(["ask", str(tmp_path / "plain"), "--image", picture, "--prompt", "what?"]) == 0
    assert capsys.readouterr().out == ANSWER + "\n"


def test_outputs_may_have_any_name(tmp_path, capsys):
    bundle = make_bundle(tmp_path / "bundle", suite_from=small_suite(tmp_path / "suite")).root
    (tmp_path / LATIN).mkdir()
    for command, option in (("smoke", "--junit"), ("certify", "--answers")):
        assert cli.main([command, str(bundle), option, str(tmp_path / LATIN / command), "--json"]) in (0, 42)
        json.loads(capsys.readouterr().out)
        assert (tmp_path / LATIN / command).stat().st_size


def test_a_report_does_not_go_into_the_bundle(tmp_path, capsys):
    bundle = make_bundle(tmp_path / "bundle", suite_from=small_suite(tmp_path / "suite")).root
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    (tmp_path / "link").symlink_to(bundle)
    for junit in (bundle / "manifest.json", bundle / "junit.xml", bundle, tmp_path / "link" / "j.xml"):
        assert cli.main(["smoke", str(bundle), "--junit", str(junit)]) == 11
        assert "--junit" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["bundle.zip", "bundle.tar.gz", "model.onnx"])
def test_a_bundle_that_is_a_file(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"PK\3\4")
    assert cli.main(["smoke", str(tmp_path / name)]) == 40
    err = capsys.readouterr().err
    assert "is a file" in err and ("unpack it" in err) == (name != "model.onnx")


def test_a_folder_around_the_bundle_names_the_bundle(handmade, tmp_path, capsys):
    (tmp_path / "bundle").symlink_to(handmade)
    assert cli.main(["smoke", str(tmp_path)]) == 40
    assert f"pass {tmp_path / 'bundle'}" in capsys.readouterr().err
    assert cli.main(["smoke", str(tmp_path / "none")]) == 40 and "is not a folder" in capsys.readouterr().err


def test_paths_and_their_text():
    assert folder("café/x") == Path("café/x") and shown_path(Path(LATIN)) == r"caf\xe9"
    with pytest.raises(ConfigError, match="not UTF-8"):
        folder(LATIN)
