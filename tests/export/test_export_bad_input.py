"""Checkpoints, disks and machines that an export refuses before it traces a graph: hours are not spent first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from edgesafe.device import load_device
from edgesafe.errors import InputError, UnsupportedModelError
from edgesafe_export import export as export_module
from edgesafe_export import export_bundle

HOST = load_device("host")
QUANTIZED = {"vision_scheme": "int8-dynamic", "text_scheme": "int8-block32"}


def _shard(folder: Path, holding: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder / next(file for name, file in index.items() if holding in name)


@pytest.fixture
def broken(sharded, copy_of) -> Path:
    return copy_of(sharded)


def _refused(folder: Path, out: Path, match: str, error=InputError) -> None:
    def trace(*_: object, **__: object) -> None:
        raise AssertionError("a graph was traced")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(error, match=match) as caught:
        patch.setattr(export_module, "trace_pieces", trace)
        export_bundle(folder, out, HOST, exits="3", **QUANTIZED)
    assert type(caught.value) is error and caught.value.where and caught.value.expected + caught.value.todo
    assert not out.exists() and not out.with_name("out.partial").exists()


def test_a_shard_that_is_cut_short(broken, tmp_path):
    path = _shard(broken, "layers.3.mlp.up_proj")
    path.write_bytes(path.read_bytes()[:-7])
    _refused(broken, tmp_path / "out", "cut short.*7 bytes before")


def test_a_header_that_is_none(broken, tmp_path):
    _shard(broken, "lm_head").write_bytes(b"not safetensors at all")
    _refused(broken, tmp_path / "out", "damaged")


@pytest.mark.parametrize(("key", "value"), [("intermediate_size", 200), ("num_hidden_layers", 6)])
def test_a_config_that_contradicts_its_weights(broken, tmp_path, key, value):
    config = json.loads((broken / "config.json").read_text())
    config["text_config"][key] = value
    (broken / "config.json").write_text(json.dumps(config))
    _refused(broken, tmp_path / "out", "contradicts the weights.*stored as|weights are missing.*layers.5")


def _change(folder: Path, holding: str, change) -> None:
    from safetensors.torch import load_file, save_file

    path = _shard(folder, holding)
    save_file({n: change(w) if holding in n else w for n, w in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_a_weight_that_is_not_a_number(broken, tmp_path, value):
    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[3, 5:7] = value
        return weight

    _change(broken, "layers.4.mlp.up_proj", change)
    _refused(broken, tmp_path / "out", "layers.4.mlp.up_proj.weight is not finite: 2 of its .* numbers are.*model-000")


def test_a_family_that_is_not_supported(broken, tmp_path):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "mllama"}))
    _refused(broken, tmp_path / "out", "mllama", UnsupportedModelError)


def test_no_room_on_the_disk_and_no_memory(sharded, tmp_path, monkeypatch):
    from edgesafe_export import plan

    usage = type("U", (), {"free": 1000})()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        _refused(sharded, tmp_path / "out", "needs .* GiB on the disk, 0.0 GiB are free")
    monkeypatch.setattr(plan.machine, "free_mib", lambda: 100.0)
    _refused(sharded, tmp_path / "out", "needs about .* GiB of memory, 0.1 GiB are free")
