"""The loop on a tiny checkpoint: learns, resumes to the same weights, freezes what must stay, refuses bad settings."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from edgesafe.align import train as train_module
from edgesafe.align.config import AlignConfig, default_config, read_config
from edgesafe.align.train import align, draw_update
from edgesafe.certify.suite import read_suite, write_suite
from edgesafe.errors import ConfigError, DivergedError, EdgesafeError, InputError


def _config(rows, **changes) -> AlignConfig:
    base = AlignConfig(data=str(rows), steps=6, batch_size=4, lora_r=4, checkpoint_every=3, lr=5e-3)
    return dataclasses.replace(base, **changes)


def _weights(folder):
    return load_file(folder / "model.safetensors")


def test_only_the_language_model_moves_and_the_loss_falls(tiny_llava, rows, tmp_path):
    out = align(tiny_llava, _config(rows, steps=25), tmp_path / "out")
    before, after = _weights(tiny_llava), _weights(out)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("language_model" in name for name in moved)
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 25 and sum(losses[-5:]) < sum(losses[:5])
    assert json.loads((out / "edgesafe.json").read_text())["step"] == "align"


def test_resume_ends_with_the_same_weights(tiny_llava, rows, tmp_path, monkeypatch):
    whole = align(tiny_llava, _config(rows), tmp_path / "whole")
    real = train_module.update_loss
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train_module, "update_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        align(tiny_llava, _config(rows), tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(train_module, "update_loss", real)
    cut = align(tiny_llava, _config(rows), tmp_path / "cut", resume=True)
    a, b = _weights(whole), _weights(cut)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert len((cut / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_loss_that_is_not_finite_stops_the_run(tiny_llava, rows, tmp_path, monkeypatch):
    real = train_module.update_loss

    def poisoned(llava, config, batch, depth):
        loss, figures = real(llava, config, batch, depth)
        return loss * float("nan"), figures

    monkeypatch.setattr(train_module, "update_loss", poisoned)
    with pytest.raises(DivergedError):
        align(tiny_llava, _config(rows), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_depths_are_drawn_from_all_exits():
    config = AlignConfig(seed=1)
    depths = [draw_update(config, (1, 2, 3), 100, k)[0] for k in range(300)]
    assert all(70 < depths.count(d) < 130 for d in (1, 2, 3))


@pytest.mark.parametrize(
    ("text", "names"),
    [("stepz = 3", "steps"), ("steps = 0", "steps"), ('method = "ppo"', "sft"), ("lr = true", "lr"), ("steps = ", "TOML")],
)
def test_bad_settings_are_config_errors(text, names, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=names):
        read_config(path)


def test_the_shipped_settings_are_valid():
    assert read_config(default_config(), data="x").data == "x"


def test_bad_runs_leave_nothing(tiny_llava, rows, tmp_path):
    suite = read_suite(rows)
    row = suite.rows[0]
    empty, cert = tmp_path / "empty", tmp_path / "cert"
    from PIL import Image

    picture = {row.image: Image.new("RGB", (64, 64))}
    write_suite(cert, [row], picture, "c", "cert")
    shutil.copytree(rows, empty)
    (empty / "rows.jsonl").write_text("")
    for config, error in (
        (_config(rows, exits="1,99"), EdgesafeError),
        (_config(cert), ConfigError),
        (_config(empty), EdgesafeError),
        (_config(tmp_path / "nowhere"), InputError),
    ):
        with pytest.raises(error):
            align(tiny_llava, config, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists"):
        align(tiny_llava, _config(rows), tmp_path / "there")
