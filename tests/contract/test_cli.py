"""The command line: exit codes, what goes to stdout and to stderr, and the JSON keys that machines rely on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from edgesafe import cli, errors
from edgesafe.commands import devices
from handmade import ANSWER, make_bundle

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (20, 9), "red").save(path)
    return str(path)


def ask(bundle, picture, *more):
    return cli.main(["ask", str(bundle), "--image", picture, "--prompt", "what?", *more])


def test_ask_streams_to_stdout_and_tells_on_stderr(handmade, picture, capsys):
    assert ask(handmade, picture) == 0
    out, err = capsys.readouterr()
    assert out == ANSWER + "\n"
    assert re.match(
        r"exit 2 of 3, certified; first token after [\d.]+ ms \(nothing predicts it here; run `edgesafe measure`\)", err
    )


def test_ask_draws_and_stops_as_it_is_told(handmade, picture, capsys):
    assert ask(handmade, picture, "--stop", "1") == 0
    assert capsys.readouterr().out == "Z\u00e9\n"
    texts = []
    for seed in ("3", "3", "4"):
        assert ask(handmade, picture, "--temperature", "9", "--seed", seed, "--max-new-tokens", "9", "--json") == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]
    assert ask(handmade, picture, "--temperature", "-1") == errors.InputError.exit_code


def test_ask_json_prints_the_documented_keys_and_nothing_else(handmade, picture, capsys):
    assert ask(handmade, picture, "--json", "--exit", "1") == 0
    got = json.loads(capsys.readouterr().out)
    assert list(got) == [
        "text",
        "finish_reason",
        "exit",
        "certified",
        "predicted_ttft_ms",
        "prediction",
        "ttft_ms",
        "total_ms",
        "note",
        "why",
        "planned_exit",
        "deadline_met",
        "predicted_ms",
        "actual_ms",
        "reference",
        "estimated_for",
        "source",
    ]
    assert (got["why"], got["planned_exit"], got["deadline_met"], got["predicted_ms"]) == ("asked for", None, None, {})
    stages = ["wait", "preprocess", "vision/blocks_00-01.onnx", "vision/head.onnx", "prefill", "decode"]
    assert list(got["actual_ms"]) == stages
    assert (got["text"], got["finish_reason"], got["exit"], got["certified"]) == (ANSWER, "stop", "1", True)
    assert 0 < got["ttft_ms"] <= got["total_ms"]


def test_the_old_spelling_of_exit_stays(handmade, picture, capsys):
    for spelling in ("--exit", "--exit-depth"):
        assert ask(handmade, picture, "--json", spelling, "1") == 0
        assert json.loads(capsys.readouterr().out)["exit"] == "1"
    assert ask(handmade, picture, "--exit", "06") == errors.InputError.exit_code
    assert "'06' is not an exit" in capsys.readouterr().err


def test_uncertified_needs_its_flag_and_is_said(handmade, picture, capsys):
    assert ask(handmade, picture, "--exit", "3") == errors.UncertifiedExitError.exit_code == 51
    assert capsys.readouterr().out == ""
    assert ask(handmade, picture, "--exit-depth", "3", "--allow-uncertified", "--json") == 0
    got = json.loads(capsys.readouterr().out)
    assert got["certified"] is False and "NOT certified" in got["note"]


def test_an_answer_unlike_the_certified_ones_is_given_and_not_called_certified(handmade, picture, capsys):
    assert ask(handmade, picture, "--temperature", "0.5") == 0
    err = capsys.readouterr().err
    assert "exit 2 of 3, NOT CERTIFIED; " in err and "the answer was sampled at temperature 0.5, but" in err
    assert ask(handmade, picture, "--temperature", "0.5", "--json") == 0
    got = json.loads(capsys.readouterr().out)
    assert got["certified"] is False and "sampled at temperature 0.5" in got["note"]
    assert ask(handmade, picture, "--seed", "3", "--top-p", "0.5", "--max-new-tokens", "60") == 0
    assert "exit 2 of 3, certified; " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"--image": "/no/such.png"}, 11),
        ({"--prompt": " "}, 11),
        ({"--prompt": "x" * 500}, 11),
        ({"--prompt": "a <image> b"}, 11),
        ({"--exit": "9"}, 11),
        ({"--exit": "six"}, 11),
        ({"--exit-depth": "9"}, 11),
        ({"--budget-ms": "-1"}, 11),
        ({"--budget-ms": "5"}, 62),
        ({"--threads": "0"}, 11),
        ({"--max-new-tokens": "0"}, 11),
        ({"bundle": "/no/such/bundle"}, 40),
    ],
)
def test_ask_bad_input_exit_codes(handmade, picture, capsys, change, code):
    options = {"--image": picture, "--prompt": "what?"} | {k: v for k, v in change.items() if k != "bundle"}
    flat = [word for pair in options.items() for word in pair]
    assert cli.main(["ask", change.get("bundle", str(handmade)), *flat]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("edgesafe ask: ") and "Traceback" not in err


def test_a_damaged_bundle_and_a_foreign_certificate(handmade, copy_of, picture, tmp_path, capsys):
    root = copy_of(handmade)
    other = make_bundle(tmp_path / "other", seed=3)
    (root / "certificate.json").write_bytes((other.root / "certificate.json").read_bytes())
    assert ask(root, picture) == 52
    (root / "certificate.json").unlink()
    assert ask(root, picture) == 51
    assert "edgesafe certify" in capsys.readouterr().err
    (root / "latency.json").write_bytes(b"{}")
    assert ask(root, picture) == 43


def test_a_device_is_shown_with_its_sources(capsys):
    assert cli.main(["devices", "show", "rpi5"]) == 0
    shown = capsys.readouterr().out
    assert "gops_int8" in shown and "derived from the int8 prefill speed" in shown
    assert [line.split() for line in shown.splitlines() if line.startswith("gops_fp32")] == [["gops_fp32", "-", "absent"]]
    assert cli.main(["devices", "show", "sa8155p", "--json"]) == cli.main(["devices", "--json", "show", "sa8155p"]) == 0
    assert capsys.readouterr().out.count('"hard_ttft_ms": 2000') == 2
    assert cli.main(["devices", "show", "rpi55"]) == 10


def test_devices_lists_every_profile(capsys):
    assert cli.main(["devices"]) == 0
    assert "rpi5" in capsys.readouterr().out
    assert cli.main(["devices", "--json"]) == 0
    assert {p["name"] for p in json.loads(capsys.readouterr().out)} >= {"rpi5", "host"}


def test_wrong_usage_is_two_and_interrupts_are_130(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["frobnicate"])
    assert caught.value.code == 2

    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(devices, "run", interrupted)
    assert cli.main(["devices"]) == 130


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (OSError(28, "No space left on device", "/big"), 1, "the disk is full (/big)"),
        (OSError(27, "File too large", "/big"), 1, "the disk is full (/big)"),
        (OSError(122, "Disk quota exceeded", "/big"), 1, "the disk is full (/big)"),
        (PermissionError(13, "Permission denied", "/shut"), 1, "Permission denied (/shut)"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 10, "pip install 'edgesafe[align]'"),
        (ModuleNotFoundError("No module named 'onnx.x'", name="onnx.x"), 10, "pip install 'edgesafe[export]'"),
    ],
)
def test_what_the_system_refuses_is_said_in_a_line(monkeypatch, capsys, error, code, shown):
    def broken(_: object) -> int:
        raise error

    monkeypatch.setattr(devices, "run", broken)
    assert cli.main(["devices"]) == code
    assert shown in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("evaluate", "torch", "align"),
        ("export", "torch", "export"),
        ("plan", "safetensors", "export"),
        ("ship", "peft", "align,export"),
    ],
)
def test_a_missing_package_names_the_extra_of_its_command(command, package, extra):
    assert f"pip install 'edgesafe[{extra}]'" in str(cli._missing_extra(package, command))


def test_a_bug_is_not_hidden(monkeypatch):
    def bug(_: object) -> int:
        raise ModuleNotFoundError("No module named 'edgesafe.nowhere'", name="edgesafe.nowhere")

    monkeypatch.setattr(devices, "run", bug)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["devices"])


def test_a_terminal_without_unicode_still_gets_an_answer(handmade, picture):
    done = subprocess.run(
        [sys.executable, "-m", "edgesafe.cli", "ask", str(handmade), "--image", picture, "--prompt", "what?"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout == b"Z?1?.\n"
