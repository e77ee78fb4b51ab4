"""A stored alignment gives the very bytes of the checkpoint that it was taken from, or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgesafe.checkpoint.changes import CHANGED, MADE_OF, apply_changes, made_of, write_changes
from edgesafe.errors import ConfigError, InputError, IntegrityError
from edgesafe.format.files import digest_folder


@pytest.fixture
def family(tmp_path) -> tuple[Path, Path]:
    """A parent and a child of two tensors, of which training changed one; it also wrote a map, a record and a log."""
    parent, child = tmp_path / "parent", tmp_path / "child"
    parent.mkdir()
    tensors = {"a": torch.arange(6.0), "b": torch.ones(3, dtype=torch.bfloat16)}
    save_file(tensors, parent / "model.safetensors", metadata={"format": "pt"})
    (parent / "config.json").write_text("{}")
    (parent / "README.md").write_text("card")
    (parent / "tokenizer.json").write_text("words")
    shutil.copytree(parent, child)
    (child / "README.md").unlink()
    (child / "config.json").write_text('{"trained": true}')
    (child / "metrics.jsonl").write_text("loss")
    save_file({"m": torch.eye(2)}, child / "exit_maps.safetensors")
    save_file(
        tensors | {"b": torch.full((3,), 2.0, dtype=torch.bfloat16)}, child / "model.safetensors", metadata={"format": "pt"}
    )
    return parent, child


def test_what_comes_back_is_what_was_stored(family, tmp_path):
    parent, child = family
    write_changes(parent, child, tmp_path / "stored", "key")
    assert made_of(tmp_path / "stored") == "key" and list(load_file(tmp_path / "stored" / CHANGED)) == ["b"]
    assert not (tmp_path / "stored" / "tokenizer.json").exists()
    apply_changes(parent, tmp_path / "stored", tmp_path / "again")
    (child / "metrics.jsonl").unlink()
    assert digest_folder(tmp_path / "again") == digest_folder(child)


def test_a_tensor_is_other_when_its_bytes_are(family, tmp_path):
    """Minus zero equals zero, and a number that is none equals nothing, itself included."""
    parent, child = family
    odd = {"a": torch.tensor([-0.0, 1, 2, 3, 4, 5]), "b": torch.full((3,), torch.nan, dtype=torch.bfloat16)}
    save_file(odd, child / "model.safetensors", metadata={"format": "pt"})
    write_changes(parent, child, tmp_path / "stored", "key")
    apply_changes(parent, tmp_path / "stored", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (child / "model.safetensors").read_bytes()


@pytest.mark.parametrize("damage", ["tensor", "file", "parent", "parent's file"])
def test_damage_is_noticed_and_leaves_nothing(family, tmp_path, damage):
    parent, child = family
    write_changes(parent, child, stored := tmp_path / "stored", "key")
    if damage == "tensor":
        save_file({"b": torch.zeros(3, dtype=torch.bfloat16)}, stored / CHANGED)
    elif damage == "file":
        (stored / "config.json").write_text("{ }")
    elif damage == "parent":
        tensors = load_file(parent / "model.safetensors")
        save_file(tensors | {"a": torch.zeros(6)}, parent / "model.safetensors", metadata={"format": "pt"})
    else:
        (parent / "tokenizer.json").write_text("other words")
    with pytest.raises(IntegrityError, match="is not what was stored"):
        apply_changes(parent, stored, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_folder_of_another_kind_is_kept(family, tmp_path):
    parent, child = family
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "thesis").write_text("years")
    with pytest.raises(ConfigError, match="isn't a stored alignment"):
        write_changes(parent, child, tmp_path / "stored", "key")
    assert (tmp_path / "stored" / "thesis").read_text() == "years" and made_of(tmp_path / "stored") == ""


def test_another_model_or_shards_are_refused(family, tmp_path):
    parent, child = family
    save_file({"a": torch.arange(6.0)}, child / "model.safetensors")
    with pytest.raises(InputError, match="another model"):
        write_changes(parent, child, tmp_path / "stored", "key")
    (child / "model.safetensors").rename(child / "model-00001-of-00001.safetensors")
    with pytest.raises(InputError, match="no weights in one file"):
        write_changes(parent, child, tmp_path / "stored", "key")
    assert not (tmp_path / "stored").exists()


def test_the_record_names_every_file(family, tmp_path):
    write_changes(*family, tmp_path / "stored", "key")
    named = set(json.loads((tmp_path / "stored" / MADE_OF).read_text())["files"])
    assert named == {"config.json", "exit_maps.safetensors", "model.safetensors", "tokenizer.json"}
