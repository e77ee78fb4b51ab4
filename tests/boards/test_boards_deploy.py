"""`make deploy`: what passed its test becomes a service; what fails is taken back. systemd is a program of the test's own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from fake_systemd import SYSTEMCTL

from edgesafe.certify.smoke import smoke
from edgesafe.errors import ConfigError, DeviceError
from edgesafe.format.bundle import Bundle
from edgesafe.format.seal import seal, unseal
from edgesafe_boards import __main__ as boards
from edgesafe_boards import deploy, facts, wheels
from edgesafe_boards.deploy import SERVICE, UNIT, Version, check_tested
from edgesafe_boards.facts import FOLDER
from edgesafe_boards.install import Cargo
from handmade import make_suited

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port that nobody had a moment ago."""
    done = subprocess.run(
        [sys.executable, "-c", "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"],
        capture_output=True,
        check=True,
    )
    return int(done.stdout)


@pytest.fixture(scope="module")
def tested(tmp_path_factory) -> Path:
    """A bundle beside the record that it passed on this machine."""
    root = make_suited(tmp_path_factory.mktemp("deployed"))
    assert smoke(root).passed
    return root


@pytest.fixture
def home(tmp_path, board, program, tested):
    """A board on which `make smoke` has passed; its Python is this one."""
    home = tmp_path / "home"
    shutil.copytree(tested.parent / "bundle", home / FOLDER / "bundle")
    shutil.copytree(tested.parent / "bundle.smoke", home / FOLDER / "bundle.smoke")
    python = home / FOLDER / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} XDG_STATE_HOME=$HOME/state exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    program("systemctl", SYSTEMCTL)
    program("loginctl", "echo yes")
    yield home
    if (home / "pid").exists():
        subprocess.run(["kill", (home / "pid").read_text().strip()], check=False)


def version(home: Path, name: str = "one", port: int | None = None) -> Version:
    digest = Bundle.open(home / FOLDER / "bundle").digest
    unit = deploy._TEMPLATE.read_text().replace("FOLDER", SERVICE).replace("PORT", str(port or free_port()))
    return Version(name, unit, int(re.search(r"--port (\d+)", unit)[1]), digest)


def left(home: Path) -> list[str]:
    return sorted(path.name for path in (home / SERVICE).iterdir())


@contextmanager
def reaching(board):
    yield board


def test_deployed_once_again_anew_and_removed(home, board, monkeypatch, capsys):
    first = version(home)
    assert "http://127.0.0.1" in deploy.deploy(board, first)
    assert left(home) == ["current", "one"] and (home / UNIT).read_text() == first.unit
    assert "already" in deploy.deploy(board, first)
    assert (home / "log").read_text() == "restarted one\n"
    # What serves is not touched by what the next smoke test puts in the place of what it was made of.
    shutil.rmtree(home / FOLDER / "bundle")
    assert deploy._answer(board, first, 5).code == 0 and (home / SERVICE / "one" / "bundle.smoke").is_dir()
    shutil.copytree(home / SERVICE / "one" / "bundle", home / FOLDER / "bundle")
    second = version(home, "two", first.port)
    with pytest.raises(DeviceError, match="doesn't answer.*refused.*the former version was started again"):
        deploy.deploy(board, replace(second, unit=second.unit.replace("--host", "--hots")), wait_s=1)
    assert left(home) == ["current", "one"] and (home / UNIT).read_text() == first.unit
    assert deploy._answer(board, first, 60).code == 0
    other = deploy._answer(board, replace(first, digest="f" * 64), 1)
    assert (other.code, other.errors.strip()) == (1, "another bundle answers there")
    assert "http" in deploy.deploy(board, second) and left(home) == ["current", "two"]
    monkeypatch.setattr(deploy, "connected", lambda address, ssh: reaching(board))
    assert deploy.remove("pi@board", "ssh") == deploy.remove("pi@board", "ssh") == 0
    assert capsys.readouterr().out == "pi@board: the service was stopped and removed\npi@board: no service was there\n"
    assert not (home / UNIT).exists() and not (home / SERVICE).exists() and not (home / "pid").exists()
    assert (home / FOLDER / "bundle").is_dir()


def test_a_first_version_that_fails_leaves_nothing(home, board):
    bad = version(home)
    with pytest.raises(DeviceError, match="doesn't answer.*it was removed again") as error:
        deploy.deploy(board, replace(bad, unit=bad.unit.replace("--host", "--hots")), wait_s=1)
    assert "journalctl" in error.value.todo and f"PORT={bad.port + 1}" in error.value.todo
    assert not (home / SERVICE).exists() and not (home / UNIT).exists()


def cargo_of(tested: Path, tmp_path: Path) -> Cargo:
    (tmp_path / "a.whl").write_bytes(b"wheel")
    return Cargo(Bundle.open(tested), {"a.whl": tmp_path / "a.whl"})


def told(home, board, cargo: Cargo) -> facts.Facts:
    (home / FOLDER / "ready").write_text(wheels.install_key(cargo.wheels))
    return facts.ask(board)


def test_what_passed_its_test_is_taken(home, board, tested, tmp_path):
    cargo = cargo_of(tested, tmp_path)
    check_tested(board, told(home, board, cargo), cargo)
    one, other = deploy.version_of(cargo, 8765), deploy.version_of(replace(cargo, wheels={}), 9000)
    assert one.name != other.name and "--port 9000\n" in other.unit and one.digest == other.digest == cargo.bundle.digest


def test_what_did_not_pass_is_not(home, board, tested, tmp_path):
    cargo = cargo_of(tested, tmp_path)
    known = told(home, board, cargo)
    record = next((home / FOLDER / "bundle.smoke").iterdir())
    text = unseal(record.read_bytes(), where="record")
    for facts_now, data, shown in (
        (replace(known, installed="other"), None, "this checkout of edgesafe is not what was tested"),
        (replace(known, bundle="other"), None, "this bundle is not what was tested"),
        (known, seal({**text, "passed": False, "reasons": ["harm"]}), "`edgesafe smoke` failed on the board: harm"),
        (known, b"", "was not run on the board"),
    ):
        if data:
            record.write_bytes(data)
        elif data == b"":
            record.unlink()
        with pytest.raises(DeviceError, match=shown) as error:
            check_tested(board, facts_now, cargo)
        assert error.value.todo == "make smoke DEVICE=host HOST=the board"
    assert not (home / SERVICE).exists()


@pytest.mark.parametrize(
    ("name", "script", "shown"),
    [
        ("systemctl", None, "has no systemd"),
        ("systemctl", "exit 1", "doesn't serve this user"),
        ("loginctl", "[ $1 != enable-linger ] || exit 1", "ends a user's services"),
    ],
)
def test_a_board_without_what_a_service_needs(home, board, program, tmp_path, name, script, shown):
    if script is None:
        (tmp_path / "bin" / name).unlink()
        board = replace(board, words=tuple(w.replace(":/usr/bin:/bin", "") for w in board.words))
        board = replace(board, words=(*board.words[:-3], "/bin/sh", *board.words[-2:]))
    else:
        program(name, script)
    with pytest.raises(DeviceError, match=shown) as error:
        deploy._check(board, deploy._CAN)
        deploy._check(board, deploy._LINGER)
    assert error.value.todo


def test_systemd_finds_nothing_wrong_with_the_unit(home, tmp_path):
    python, analyze = home / SERVICE / "current" / "venv" / "bin" / "python", shutil.which("systemd-analyze")
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    text = version(home).unit.replace("%h", str(home))
    assert text.count("--host 127.0.0.1 --port ") == 1 and "FOLDER" not in text and "PORT" not in text
    for unit, fine in ((text, True), (text.replace("NoNewPrivileges", "NoNewPrivilege"), False)):
        (tmp_path / "edgesafe.service").write_text(unit)
        if analyze:  # where there is no systemd, the unit is of no use either
            words = [analyze, "--user", "verify", str(tmp_path / "edgesafe.service")]
            done = subprocess.run(
                words,
                capture_output=True,
                text=True,
                timeout=120,
                env={**os.environ, "HOME": str(home), "XDG_RUNTIME_DIR": str(tmp_path)},
            )
            assert ("NoNewPrivilege" not in done.stderr) is fine, done.stderr


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--deploy"], "make deploy: ConfigError: no board is named"),
        (["--remove"], "make deploy: ConfigError: no board is named"),
        (["--deploy", "--host", "pi@board", "--port", "80"], "80 is not a port that a user's service can have"),
        (["--deploy", "--host", "a b"], "is not a board's address"),
    ],
)
def test_the_command_says_what_is_wrong(tested, capsys, words, shown):
    assert boards.main(["rpi5", str(tested), *words]) == ConfigError.exit_code
    assert shown in capsys.readouterr().err
