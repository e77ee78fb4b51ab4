"""The whole training of a reference model, a few steps of everything."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from edgesafe.checkpoint.load import read_checkpoint
from edgesafe.reference import build as build_module
from edgesafe.reference.build import build
from edgesafe.reference.recipe import Recipe

SMALL = Recipe(
    blocks=3, vision_width=32, vision_heads=2, text_layers=1, text_width=64, text_heads=2, pictures=100,
    tower_steps=2, tower_batch=4, language_steps=2, projector_steps=2, instruct_steps=2, text_batch=4,
)  # fmt: skip


def test_every_stage_runs_and_leaves_a_whole_checkpoint(tmp_path):
    build(tmp_path / "model", SMALL, say=lambda line: None)
    family, model, _ = read_checkpoint(tmp_path / "model", ("llava",))
    assert family == "llava" and model.config.vision_config.num_hidden_layers == 3
    stages = [json.loads(line)["stage"] for line in (tmp_path / "model" / "training.jsonl").read_text().splitlines()]
    wanted = ["model", "pictures", "tower", "language", "features", "projector", "instruct"]
    assert list(dict.fromkeys(stages)) == wanted


def test_a_build_that_was_cut_off_after_the_tower_ends_with_the_same_weights(tmp_path, monkeypatch):
    build(tmp_path / "whole", SMALL, say=lambda line: None)
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "train_language_side", _stop)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "cut", SMALL, say=lambda line: None)
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(build_module, "train_tower", _stop)  # not called again
    build(tmp_path / "cut", SMALL, say=lambda line: None)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def _stop(*_):
    raise KeyboardInterrupt
