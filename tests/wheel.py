"""The wheel as a user gets it: built, small, installed with its base dependencies alone, and the runtime's tests run there.

`make wheel` runs it under build/wheel. Nothing of torch, transformers, onnx or optimum is in that environment, and none of them
can be imported in it. The tests run in the README's lean install, without what tokenizers alone asks for. The bundle made by
hand, which takes onnx to make, is made before and copied. `make smoke` takes what --prepare leaves to a board.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from handmade import MADE_BEFORE, make_bundle

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 1_000_000
# The lean install. Beside numpy, onnxruntime and what that depends on, it has a limit on the disk.
ENGINE = ("numpy", "onnxruntime", "flatbuffers", "packaging", "protobuf")
LEAN = ("edgesafe", "tokenizers", "pillow")
MOST_INSTALLED = 60_000_000
_SIZES = """
from importlib.metadata import distribution
for name in "NAMES".split():
    files = [path.locate() for path in distribution(name).files]
    print(name, sum(file.stat().st_blocks * 512 for file in files if file.is_file()))
"""
ABSENT = ("torch", "transformers", "onnx", "optimum", "onnxscript", "peft", "accelerate", "safetensors", "jinja2", "matplotlib")
# Heavy or raw: a clone has them, an install does not.
LEFT_OUT = (
    "edgesafe/reference/weights/",
    "edgesafe/reference/smol/adapter/",
    "edgesafe/reference/smol/ship/answers",
    "edgesafe/_devices/edgesafe_boards/",
    "study/",
    "tests/",
)
SHIPPED = (
    "edgesafe/_devices/rpi5.toml",
    "edgesafe/serve/page.html",
    "edgesafe/py.typed",
    "edgesafe/format/BUNDLE.md",
    "edgesafe/checkpoint/recipes/smolvlm.toml",
    "optimum/commands/register/register_edgesafe.py",
)
HELPERS = (
    "conftest.py",
    "engines.py",
    "handmade.py",
    "long/chaos.py",
    "long/killed.py",
    "long/soak.py",
    "mutants.py",
    "mutations.py",
    "odd_inputs.py",
    "results.py",
    "runtime/conftest.py",
    *(f"runtime/cpuinfo/{device}" for device in ("pi4", "pi5", "pixel9", "s24")),
    "runtime/fake_engine.py",
    "serving.py",
)
TESTS = (
    "runtime/test_runtime_answer.py",
    "runtime/test_runtime_deadline.py",
    "runtime/test_runtime_chaos.py",
    "runtime/test_runtime_choose.py",
    "runtime/test_runtime_conversation.py",
    "runtime/test_runtime_fork.py",
    "runtime/test_runtime_imports.py",
    "runtime/test_runtime_outputs.py",
    "runtime/test_runtime_processor.py",
    "runtime/test_runtime_seam.py",
    "runtime/test_runtime_session.py",
    "runtime/test_runtime_text.py",
    "runtime/test_runtime_soak.py",
    "runtime/test_runtime_standing.py",
    "runtime/test_runtime_turns.py",
    "serve/test_serve_access.py",
    "serve/test_serve_chat.py",
    "serve/test_serve_http.py",
    "contract/test_bundle_format.py",
    "contract/test_tiles_format.py",
    "contract/test_cli.py",
    "contract/test_commands.py",
    "contract/test_errors.py",
    "contract/test_seal.py",
    "contract/test_writable.py",
)
# A plugin that lies beside the tests, where the bundle made by hand lies too.
GUARD = f"""
import os
import sys
from pathlib import Path
os.environ[{MADE_BEFORE!r}] = str(Path(__file__).parent / "handmade")
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"{{name}} was imported from the wheel", name=name)
sys.meta_path.insert(0, Absent())
"""
SETTINGS = "[pytest]\naddopts = -p absent -q -p no:cacheprovider --disable-socket --allow-unix-socket\n"
STEP_S = 1200


def run(*words: str | Path, cwd: Path = ROOT, **env: str) -> str:
    """Standard output of a command; its failure ends the check."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    line = [str(word) for word in words]
    done = subprocess.run(line, cwd=cwd, env=clean | env, stdout=subprocess.PIPE, text=True, timeout=STEP_S, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(map(str, words))} ended with {done.returncode}")
    return done.stdout


def build(folder: Path) -> Path:
    """The wheel of this checkout."""
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def complaints(wheel: Path) -> list[str]:
    """What is wrong with the wheel's size or contents."""
    names = zipfile.ZipFile(wheel).namelist()
    wrong = [f"{name} is in the wheel" for name in names if name.startswith(LEFT_OUT)]
    wrong += [f"{name} is not in the wheel" for name in SHIPPED if name not in names]
    size = wheel.stat().st_size
    return wrong + ([f"the wheel has {size} bytes, more than {MOST_BYTES}"] if size > MOST_BYTES else [])


def install(wheel: Path, folder: Path) -> tuple[Path, list[str]]:
    """An environment with the wheel and what it needs: its Python, and all that pip had installed; pytest comes after."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "-q", "--disable-pip-version-check"]
    run(*pip, "install", "-c", ROOT / ".ci" / "constraints.txt", wheel)
    packages = [row["name"] for row in json.loads(run(*pip[:3], "list", "--format", "json", "--disable-pip-version-check"))]
    there = sorted(set(packages) & set(ABSENT))
    if there:
        sys.exit(f"the base install brings {', '.join(there)}")
    run(*pip, "uninstall", "-y", *(name for name in packages if name not in (*ENGINE, *LEAN, "pip")))
    run(*pip, "install", "pytest", "pytest-socket")
    return python, packages


def installed_bytes(python: Path) -> dict[str, int]:
    """Bytes on the disk of each package of the lean install but the engine's, with its compiled modules."""
    lines = run(python, "-c", _SIZES.replace("NAMES", " ".join(LEAN))).splitlines()
    return {name: int(size) for name, size in (line.split() for line in lines)}


def copy_tests(folder: Path) -> None:
    """The runtime's tests and their helpers, away from the checkout, so that `edgesafe` is the installed one."""
    for name in (*HELPERS, *TESTS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "tests" / name, folder / name)
    (folder / "absent.py").write_text(GUARD, encoding="utf-8")
    (folder / "pytest.ini").write_text(SETTINGS, encoding="utf-8")


def main() -> int:
    """Build, look, install, test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "wheel", help="made anew (build/wheel)")
    parser.add_argument("--prepare", action="store_true", help="stop before anything is installed or tested")
    args = parser.parse_args()
    folder = args.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wheel = build(folder)
    if wrong := complaints(wheel):
        sys.exit("\n".join(wrong))
    tests = folder / "tests"
    copy_tests(tests)
    make_bundle(tests / "handmade")
    if args.prepare:
        return 0
    python, packages = install(wheel, folder / "env")
    where = run(python, "-c", "import edgesafe; print(edgesafe.__file__)", cwd=tests).strip()
    if not Path(where).is_relative_to(folder / "env"):
        sys.exit(f"edgesafe is imported from {where}")
    sizes = installed_bytes(python)
    shown = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items())
    if sum(sizes.values()) > MOST_INSTALLED:
        sys.exit(f"the lean install is larger than {MOST_INSTALLED / 1e6:.0f} MB: {shown}")
    out = run(python, "-m", "pytest", *TESTS, cwd=tests, PYTHONPATH=str(tests))
    print(out)
    print(f"{wheel.name}: {wheel.stat().st_size} bytes; pip installed {', '.join(sorted(packages))}")
    print(f"tested with {', '.join(sorted(ENGINE))} and, on the disk, {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
