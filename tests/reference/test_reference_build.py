"""The whole training of a reference model, a few steps of everything."""

from __future__ import annotations

import json

from edgesafe.checkpoint import read_checkpoint
from edgesafe.reference.build import Recipe, build

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
