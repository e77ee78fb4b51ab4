"""Bad input on the command line: an error of the tree with its exit code each, and the last good checkpoint stays."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from edgesafe.align import files
from edgesafe.align import train as train_module
from edgesafe.cli import main
from edgesafe.format.suite import read_suite, write_suite
from tiny_reward import make_gpt2

TOML = """steps = 3
batch_size = 2
reference_rows = 1
optimizer = "adamw"
precision = "fp32"
checkpoint_every = 1
tune = "lora"
[lora]
r = 2
alpha = 2
[ppo]
epochs = 1
minibatches = 1
max_new_tokens = 4
"""


@pytest.fixture
def bad(tiny_llava, rows, tmp_path) -> Path:
    """A folder with everything that is wrong: a suite with an empty answer, and a checkpoint of another family."""
    row = read_suite(rows).rows[0]
    picture = {row.image: Image.new("RGB", (64, 64))}
    write_suite(tmp_path / "blank", [dataclasses.replace(row, target=" ")], picture, "c", "train")
    shutil.copytree(tiny_llava, tmp_path / "qwen")
    config = json.loads((tmp_path / "qwen" / "config.json").read_text())
    (tmp_path / "qwen" / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_vl"}))
    return tmp_path


@pytest.mark.parametrize(
    ("head", "model", "data", "code", "shown"),
    [
        ('method = "l-sft"\nexits = "1,99"\n', "", "", 10, "1..4, got 99"),
        ('metod = "l-sft"\n', "", "", 10, "did you mean 'method'?"),
        ('method = "l-sft"\n', "qwen", "", 32, "UnsupportedModelError: model family 'qwen2_vl'"),
        ('method = "l-sft"\n', "", "blank", 11, "empty answer"),
        ('method = "l-sft"\n', "nowhere", "", 11, "no checkpoint here"),
    ],
    ids=["exit that does not exist", "misspelt key", "family", "empty answer", "no checkpoint"],
)
def test_what_is_refused_before_a_run_leaves_an_earlier_run_as_it_was(
    bad, tiny_llava, rows, capsys, head, model, data, code, shown
):
    (bad / "c.toml").write_text(head + TOML)
    (bad / "out.partial").mkdir()
    (bad / "out.partial" / files.CHECKPOINT).write_bytes(b"of an earlier run")
    argv = ["align", str(bad / model if model else tiny_llava), "--config", str(bad / "c.toml")]
    assert main([*argv, "--data", str(bad / data if data else rows), "--out", str(bad / "out")]) == code
    assert shown in capsys.readouterr().err and not (bad / "out").exists()
    assert (bad / "out.partial" / files.CHECKPOINT).read_bytes() == b"of an earlier run"


def test_evaluate_refuses_an_exit_and_a_family_that_it_does_not_know(bad, tiny_llava, rows, capsys):
    argv = ["--suite", str(rows), "--out", str(bad / "seen")]
    assert main(["evaluate", str(tiny_llava), *argv, "--exits", "99"]) == 10 and "got 99" in capsys.readouterr().err
    assert main(["evaluate", str(bad / "qwen"), *argv]) == 32 and "qwen2_vl" in capsys.readouterr().err
    assert not list(bad.glob("seen*"))


def test_a_reward_model_that_returns_nan_stops_the_run_and_keeps_the_last_checkpoint(
    tiny_llava, rows, tmp_path, monkeypatch, capsys
):
    make_gpt2(tmp_path / "reward", head=True)
    (tmp_path / "c.toml").write_text(f'method = "l-ppo"\n{TOML}[reward]\nmodel = "{tmp_path / "reward"}"\n')
    argv = ["align", str(tiny_llava), "--config", str(tmp_path / "c.toml"), "--data", str(rows), "--out", str(tmp_path / "out")]
    real = train_module._update

    def spoilt(t, features, exit, rows, number):
        if number == 2:
            with torch.no_grad():
                for p in t.reward.model.parameters():
                    p.fill_(float("nan"))
        return real(t, features, exit, rows, number)

    monkeypatch.setattr(train_module, "_update", spoilt)
    assert main(argv) == 20
    assert "AlignError: the reward model gives nan" in capsys.readouterr().err and not (tmp_path / "out").exists()
    state = torch.load(tmp_path / "out.partial" / files.CHECKPOINT, weights_only=True)
    assert state["done"] == 2 and all(torch.isfinite(p).all() for p in state["params"])


def test_a_reward_model_of_nan_on_disk_is_named(tiny_llava, rows, tmp_path, capsys):
    make_gpt2(tmp_path / "reward", head=True)
    weights = load_file(tmp_path / "reward" / "model.safetensors")
    weights["score.weight"][:] = float("nan")
    save_file(weights, tmp_path / "reward" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "c.toml").write_text(f'method = "l-ppo"\n{TOML}[reward]\nmodel = "{tmp_path / "reward"}"\n')
    argv = ["align", str(tiny_llava), "--config", str(tmp_path / "c.toml"), "--data", str(rows), "--out", str(tmp_path / "out")]
    assert main(argv) == 20 and str(tmp_path / "reward") in capsys.readouterr().err


def test_a_damaged_checkpoint_does_not_stop_a_new_run(tiny_llava, rows, tmp_path, capsys):
    (tmp_path / "c.toml").write_text('method = "l-sft"\n' + TOML)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / files.CHECKPOINT).write_bytes(b"junk")
    argv = ["align", str(tiny_llava), "--config", str(tmp_path / "c.toml"), "--data", str(rows), "--out", str(tmp_path / "out")]
    assert main([*argv, "--resume"]) == 10 and "run without --resume" in capsys.readouterr().err
    assert main(argv) == 0
