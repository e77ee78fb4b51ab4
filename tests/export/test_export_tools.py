"""The maker of random checkpoints: what transformers reads, under the names that the hub has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from random_checkpoint import count_weights, find_config, make_checkpoint
from safetensors import safe_open


@pytest.fixture
def config(tmp_path) -> Path:
    obj = json.loads(find_config("llava-1.5-7b").read_text())
    obj["vision_config"] |= {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    obj["vision_config"] |= {"image_size": 28}
    obj["text_config"] |= {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    obj["text_config"] |= {"num_hidden_layers": 2, "vocab_size": 2000, "max_position_embeddings": 256}
    path = tmp_path / "config" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(obj))
    return path


def test_transformers_reads_every_weight_of_it(config, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = make_checkpoint(config, tmp_path / "out", shard_bytes=100_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    # The names of the published checkpoint, not those of transformers' model.
    assert "language_model.model.layers.1.mlp.up_proj.weight" in index["weight_map"]
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(w.numel() for w in model.parameters()) == count_weights(config)
    weight = model.get_parameter("model.language_model.layers.0.mlp.up_proj.weight").float()
    assert weight.std().item() == pytest.approx(64**-0.5, rel=0.05) and abs(weight.mean().item()) < 0.01
    norm = model.get_parameter("model.language_model.layers.0.input_layernorm.weight").float()
    assert norm.mean().item() == pytest.approx(1, abs=0.1)
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id


def test_the_same_seed_gives_the_same_bits_and_an_empty_one_holes(config, tmp_path):
    one, two = (make_checkpoint(config, tmp_path / name, seed=7) for name in ("one", "two"))
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names and all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    empty = make_checkpoint(config, tmp_path / "empty", empty=True)
    assert [(empty / n).stat().st_size for n in names] == [(one / n).stat().st_size for n in names]
    with safe_open(empty / names[0], "pt") as file:
        assert not file.get_tensor(next(iter(file.keys()))).any()
