"""The base install is enough: the runtime and the whole of ``edgesafe ask`` work where torch and its like don't exist."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from handmade import ANSWER

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


def test_a_command_of_an_extra_names_the_extra():
    done = run("import edgesafe.cli; sys.exit(edgesafe.cli.main(['export', 'x']))")
    assert done.returncode == 10 and "pip install 'edgesafe[" in done.stderr and "Traceback" not in done.stderr


def test_import_edgesafe_loads_nothing_heavy():
    done = run("import edgesafe; sys.exit(len({'numpy', 'onnxruntime', 'PIL', 'tokenizers'} & set(sys.modules)))")
    assert done.returncode == 0
