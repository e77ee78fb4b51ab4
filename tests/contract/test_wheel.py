"""What `make wheel` looks at in a wheel, on wheels made by hand and on this checkout's; it also installs and tests that one."""

from __future__ import annotations

import os
import zipfile

import pytest

import wheel as wheel_check


def made(tmp_path, names, size=10):
    path = tmp_path / "edgesafe.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name in (*wheel_check.SHIPPED, *names):
            file.writestr(name, os.urandom(size))
    return path


def test_a_right_wheel(tmp_path):
    assert wheel_check.complaints(made(tmp_path, ["edgesafe/cli.py"])) == []


@pytest.mark.parametrize(
    ("names", "size", "shown"),
    [
        (["edgesafe/reference/weights/model.safetensors"], 10, "weights/model.safetensors is in the wheel"),
        (["tests/study/results/rows.json"], 10, "rows.json is in the wheel"),
        (["edgesafe/big.bin"], 300_000, "bytes, more than"),
    ],
)
def test_a_wrong_wheel(tmp_path, names, size, shown):
    (complaint,) = wheel_check.complaints(made(tmp_path, names, size))
    assert shown in complaint


def test_a_wheel_without_the_page(tmp_path, monkeypatch):
    path = made(tmp_path, [])
    monkeypatch.setattr(wheel_check, "SHIPPED", (*wheel_check.SHIPPED, "edgesafe/other"))
    assert wheel_check.complaints(path) == ["edgesafe/other is not in the wheel"]


def test_this_checkouts_wheel(tmp_path):
    assert wheel_check.complaints(wheel_check.build(tmp_path)) == []


def test_the_tests_that_run_there_exist():
    for name in (*wheel_check.HELPERS, *wheel_check.TESTS):
        assert (wheel_check.ROOT / "tests" / name).is_file()
