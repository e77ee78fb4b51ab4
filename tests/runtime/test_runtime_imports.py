"""The base install is enough: the runtime and the whole of ``edgesafe ask`` work where torch and its like don't exist."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from chaos import small_suite
from PIL import Image

from handmade import ANSWER, make_bundle

ROOT = Path(__file__).resolve().parents[2]
GUARD = """
import sys
class Absent:
    names = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "optimum", "peft", "accelerate", "jinja2"}
    names |= {"edgesafe_export", "safetensors", "matplotlib"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} was imported on the device", name=name)
sys.meta_path.insert(0, Absent())
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", GUARD + code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_guard_works():
    done = run("import torch")
    assert done.returncode == 1 and "was imported on the device" in done.stderr


def test_everything_of_the_device_imports_and_answers(handmade, tmp_path):
    Image.new("RGB", (9, 7)).save(tmp_path / "p.png")
    code = """
import edgesafe, edgesafe.cli, edgesafe.runtime, edgesafe.format.suite, edgesafe.certify.stats
for name in edgesafe.__all__:
    getattr(edgesafe, name)
sys.exit(edgesafe.cli.main(sys.argv[1:]))
"""
    done = run(code, "ask", str(handmade), "--image", str(tmp_path / "p.png"), "--prompt", "what?")
    assert (done.returncode, done.stdout) == (0, ANSWER + "\n"), done.stderr


def test_onnxruntime_is_kept_from_sending_usage_data(handmade, tmp_path):
    """Where it may, it lays what it will send below HOME; a CI variable keeps it from that too, so there is none here."""
    code = "import sys, edgesafe.cli; sys.exit(edgesafe.cli.main(sys.argv[1:]))"
    Image.new("RGB", (9, 7)).save(tmp_path / "p.png")
    (tmp_path / "home").mkdir()
    # Allowed, since a board's smoke record of this bundle may lie below its own HOME.
    words = ["ask", str(handmade), "--image", str(tmp_path / "p.png"), "--prompt", "what?", "--allow-uncertified"]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home"), "PYTHONUTF8": "1"}
    subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, check=True, timeout=120)
    assert [path.name for path in (tmp_path / "home").rglob("*")] == []


def test_the_commands_of_the_device_run(tmp_path):
    """`serve` up to its refusal of a port, which comes after its imports; a verdict of 42 is a result."""
    bundle = make_bundle(tmp_path / "bundle", suite_from=small_suite(tmp_path / "suite")).root
    code = """
from edgesafe.cli import main
for words in (["devices"], ["measure", "--seconds", "0.1"], ["smoke"], ["certify"], ["serve", "--port", "70000"]):
    print(main([words[0], *([sys.argv[1]] if words[0] != "devices" else []), *words[1:]]), file=sys.stderr)
"""
    done = run(code, str(bundle))
    codes = [line for line in done.stderr.splitlines() if line.isdecimal()]
    assert codes[:2] == ["0", "0"] and codes[4] == "10" and set(codes[2:4]) <= {"0", "42"}, done.stderr


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        ("plan MODEL --device rpi5", "export"),
        ("export MODEL --device rpi5 --out OUT", "export"),
        ("align MODEL --out OUT", "align"),
        ("evaluate MODEL --suite S --out OUT", "align"),
        ("reward-model MODEL --data D --out OUT", "align"),
        ("ship MODEL --device rpi5 --out OUT", "align,export"),
        ("reference build --out OUT", "align"),
    ],
)
def test_a_command_of_an_extra_names_the_extra(tmp_path, words, extra):
    (tmp_path / "MODEL").mkdir()
    code = "import edgesafe.cli, os; os.chdir(sys.argv.pop(1)); sys.exit(edgesafe.cli.main(sys.argv[1:]))"
    done = run(code, str(tmp_path), *words.split())
    assert done.returncode == 10 and f"pip install 'edgesafe[{extra}]'" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["MODEL"]


def test_ship_without_the_export_extra_says_so_before_the_alignment(tmp_path):
    (tmp_path / "MODEL").mkdir()
    (tmp_path / "MODEL" / "config.json").write_text("{}")
    code = (
        "Absent.names = {'onnx'}; import edgesafe.cli, os; os.chdir(sys.argv.pop(1)); sys.exit(edgesafe.cli.main(sys.argv[1:]))"
    )
    done = run(code, str(tmp_path), *["ship", "MODEL", "--device", "rpi5", "--out", "OUT"])
    assert done.returncode == 10 and "pip install 'edgesafe[align,export]'" in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["MODEL"]


def test_every_help_is_there_without_the_extras():
    code = """
import contextlib, io
from edgesafe import cli
for name in cli.commands():
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        cli.main([name, "--help"])
    assert "Example:" in out.getvalue(), name
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_import_edgesafe_loads_nothing_heavy():
    done = run("import edgesafe; sys.exit(len({'numpy', 'onnxruntime', 'PIL', 'tokenizers'} & set(sys.modules)))")
    assert done.returncode == 0
