"""The apps stand on edgesafe's public names alone, and the Termux script does what its head says."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import edgesafe
from edgesafe import runtime

DEVICES = Path(__file__).resolve().parents[2] / "devices"
APPS = ("automotive/driving.py", "automotive/cockpit.py", "android/src/asking.py", "android/src/main.py", "rpi5/camera.py")
PUBLIC = {"edgesafe": set(edgesafe.__all__), "edgesafe.runtime": set(runtime.__all__)}
WHEEL = "edgesafe-0.1.0-py3-none-any.whl"


def private(code: str) -> list[str]:
    """What a module takes of edgesafe beside its public names."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == "edgesafe" and alias.name not in PUBLIC]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "edgesafe":
            found += [f"{node.module}.{a.name}" for a in node.names if a.name not in PUBLIC.get(node.module or "", set())]
    return found


@pytest.mark.parametrize("app", APPS)
def test_an_app_takes_public_names_alone(app):
    assert private((DEVICES / app).read_text(encoding="utf-8")) == []


def test_other_names_are_seen():
    code = "import edgesafe.certify.smoke\nfrom edgesafe import Session, errors\nfrom edgesafe.runtime.decode import room_for"
    assert private(code) == ["edgesafe.certify.smoke", "edgesafe.errors", "edgesafe.runtime.decode.room_for"]


@pytest.fixture
def termux(tmp_path, handmade):
    """Runs the script where programs of the test's stand for Termux's; what they were told is in ``log``."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in {
        "pkg": "",
        "pip": "",
        "edgesafe": "",
        "uname": "echo ${MACHINE:-aarch64}",
        "python": '[ -n "$TOKENIZERS" ]',
    }.items():
        note = f'echo {name} "$@" >> {tmp_path}/log\n' if name != "uname" else ""
        (programs / name).write_text(f"#!/bin/sh\n{note}{script}\n")
        (programs / name).chmod(0o755)
    (tmp_path / WHEEL).touch()
    shutil.copytree(handmade, tmp_path / "bundle")

    def run(*words: str, **env: str) -> tuple[int, str, list[str]]:
        path = f"{programs}:{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", str(DEVICES / "android" / "termux.sh"), *words],
            cwd=tmp_path,
            env={"PATH": path, **env},
            capture_output=True,
            text=True,
        )
        log = tmp_path / "log"
        return done.returncode, done.stderr + done.stdout, log.read_text().splitlines() if log.exists() else []

    run.programs = programs  # type: ignore[attr-defined]
    return run


def test_termux_installs_tests_and_measures(termux):
    code, said, log = termux(WHEEL, "bundle")
    assert code == 0 and "ready: edgesafe serve bundle" in said
    assert log[0].startswith("pkg install -y python ") and "pip install --no-deps tokenizers" in log
    assert log[-3:] == [f"pip install --no-deps --force-reinstall {WHEEL}", "edgesafe smoke bundle", "edgesafe measure bundle"]
    _, _, again = termux(WHEEL, "bundle", TOKENIZERS="1")
    assert again[len(log) :].count("pip install --no-deps tokenizers") == 0


@pytest.mark.parametrize(
    ("words", "env", "shown"),
    [
        ((), {}, "two arguments"),
        (("bundle", "bundle"), {}, "is no wheel"),
        (("none.whl", "bundle"), {}, "is no file"),
        ((WHEEL, "bin"), {}, "is no bundle"),
        ((WHEEL, "bundle"), {"MACHINE": "armv7l"}, "the phone is armv7l"),
    ],
)
def test_termux_refuses_before_it_installs(termux, words, env, shown):
    code, said, log = termux(*words, **env)
    assert code == 1 and shown in said and log == []


def test_termux_stops_where_the_test_fails(termux):
    (termux.programs / "edgesafe").write_text("#!/bin/sh\nexit 42\n")
    code, said, _ = termux(WHEEL, "bundle")
    assert code == 42 and "ready" not in said
