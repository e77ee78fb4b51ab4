"""Alignment starts from mapped states: maps are fitted once, from the rows' own pictures, and are in what is written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from edgesafe.align import map_exits as mapping
from edgesafe.align import train as train_module
from edgesafe.align.config import default_config, parse_config, read_config
from edgesafe.align.settings import AlignConfig, LoraConfig
from edgesafe.align.train import align
from edgesafe.checkpoint.exit_maps import maps_of, tensors
from edgesafe.checkpoint.exit_model import exit_state, exit_states, load, open_images, pixel_values
from edgesafe.errors import ConfigError
from edgesafe.format.exits import Exit
from edgesafe.maps.fit import write_mapped


def _config(rows, **changes) -> AlignConfig:
    settings = {"data": str(rows), "steps": 4, "batch_size": 4, "reference_rows": 2, "precision": "fp32", "tune": "lora"}
    settings |= {"lora": LoraConfig(r=4, alpha=8), "checkpoint_every": 2}
    return AlignConfig(**{**settings, **changes})


def _maps(folder):
    return dict(load_file(folder / "exit_maps.safetensors"))


def _equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "changes", [{}, {"tune": "full"}, {"method": "l-ppo", "optimizer": "adamw"}], ids=["lora", "full", "ppo"]
)
def test_maps_of_the_rows_pictures_are_written_and_used(tiny_llava, rows, tmp_path, changes):
    out = align(tiny_llava, _config(rows, **changes), tmp_path / "out")
    write_mapped(tiny_llava, rows / "images", tmp_path / "mapped")
    assert _equal(_maps(out), _maps(tmp_path / "mapped"))
    assert not any("exit_maps" in name for name in load_file(out / "model.safetensors"))
    assert json.loads((out / "exit_maps.json").read_text())["reference"] == "3"
    assert sorted(maps_of(load(out).model)) == [1, 2, 4]
    names = {path.name for path in out.iterdir()} - {path.name for path in tiny_llava.iterdir()}
    assert names == {"exit_maps.safetensors", "exit_maps.json", "edgesafe.json", "metrics.jsonl"}


def test_training_sees_the_mapped_states(tiny_llava, rows, tmp_path, monkeypatch):
    seen = {}
    real = train_module.train

    def keep(t, *rest):
        real(t, *rest)
        features = train_module._features(t, {0: frozenset({Exit(1), Exit(3)})})
        seen.update(states=features.states, image=t.examples[0].image)

    monkeypatch.setattr(train_module, "train", keep)
    model = load(align(tiny_llava, _config(rows), tmp_path / "out"))
    raw = exit_states(model, pixel_values(model, open_images([seen["image"]])))
    for depth in (1, 3):
        want = exit_state(model, raw, Exit(depth))[0]
        torch.testing.assert_close(seen["states"][0, Exit(depth)].float(), want, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(seen["states"][0, Exit(1)].float(), raw[1][0], atol=0.05)


def test_none_leaves_the_states_as_they_are(tiny_llava, rows, tmp_path):
    out = align(tiny_llava, _config(rows, exit_map="none"), tmp_path / "out")
    assert not (out / "exit_maps.safetensors").exists() and maps_of(load(out).model) == {}


def test_a_checkpoints_own_maps_stay(tiny_llava, rows, tmp_path):
    write_mapped(tiny_llava, rows / "images", tmp_path / "mapped", limit=7)
    for setting in ("linear", "none"):
        out = align(tmp_path / "mapped", _config(rows, exit_map=setting), tmp_path / setting)
        assert _equal(_maps(out), _maps(tmp_path / "mapped"))


def test_a_resumed_run_keeps_the_maps_that_it_began_with(tiny_llava, rows, tmp_path, monkeypatch):
    whole = align(tiny_llava, _config(rows), tmp_path / "whole")
    real = train_module._run_update

    def cut(t, partial, everything, number):
        if number == 3:
            raise KeyboardInterrupt
        return real(t, partial, everything, number)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "_run_update", cut)
        with pytest.raises(KeyboardInterrupt):
            align(tiny_llava, _config(rows), tmp_path / "cut")
    monkeypatch.setattr(mapping, "fit", None)  # a second fit would fail
    resumed = align(tiny_llava, _config(rows), tmp_path / "cut", resume=True)
    for name in ("model.safetensors", "exit_maps.safetensors"):
        assert _equal(load_file(whole / name), load_file(resumed / name))


def test_a_run_that_was_killed_while_it_fitted_starts_over(tiny_llava, rows, tmp_path):
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / "gathered.pt").write_bytes(b"half")
    assert (align(tiny_llava, _config(rows), tmp_path / "out") / "exit_maps.safetensors").is_file()
    assert not left.exists() and not (tmp_path / "out" / "gathered.pt").exists()


def test_the_table_of_exits_says_which_and_whether_mapped():
    config = parse_config({"exits": {"train": "1-3", "map": "none"}}, "here")
    assert (config.exits, config.exit_map) == ("1-3", "none")
    assert parse_config({"exits": "2"}, "here").exit_map == "linear"
    assert parse_config({"exits": {"map": "none"}}, "here").exits == "all"
    assert read_config(default_config()).exit_map == "linear"
    for wrong, says in (({"map": "cubic"}, "linear"), ({"maps": "none"}, "did you mean 'map'"), ({"train": 3}, "exits")):
        with pytest.raises(ConfigError, match=says):
            parse_config({"exits": wrong}, "here")


def test_the_fit_is_not_disturbed_by_where_the_rows_lie(tiny_llava, rows, tmp_path):
    shutil.copytree(rows, tmp_path / "elsewhere")
    one, two = (align(tiny_llava, _config(at, steps=1), tmp_path / at.name / "out") for at in (rows, tmp_path / "elsewhere"))
    assert _equal(_maps(one), _maps(two))
    assert _equal(tensors(maps_of(load(one).model)), _maps(one))
