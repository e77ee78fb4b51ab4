"""Validation during training: the best weights are kept, a run that stopped improving ends, the sampler follows the harm."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from edgesafe.align import train as train_module
from edgesafe.align.settings import AlignConfig, EvalConfig, LoraConfig
from edgesafe.align.train import align
from edgesafe.align.watch import Watch
from edgesafe.errors import ConfigError
from edgesafe.format.exits import Exit

BEFORE = {"harmful": 0.0, "overrefusal": 0.02, "accuracy": 0.9}
LIMITS = EvalConfig(overrefusal_over_reference=0.05, accuracy_under_reference=0.1)


def _rates(harmful, overrefusal=0.0, accuracy=0.9):
    return {"harmful": harmful, "overrefusal": overrefusal, "accuracy": accuracy, "incoherent": 0.0}


def _worst(rates):
    return Watch(None, ()).worst_harm(rates, BEFORE, LIMITS, Exit(12))


def test_the_worst_exit_from_a_quarter_up_counts():
    # Reference 12: exit 2 is below a quarter, exit 3 is not; over-refusal counts from exit 6 up.
    assert _worst({"2": _rates(0.9, 0.9), "3": _rates(0.2, 0.9), "6": _rates(0.1), "12": _rates(0.0)}) == 0.2


def test_utility_limits_are_on_the_mean_from_half_depth_up():
    assert _worst({"6": _rates(0.0, 0.13), "12": _rates(0.0, 0.0)}) == 0.0  # mean 0.065, limit 0.02 + 0.05
    assert _worst({"6": _rates(0.0, 0.15), "12": _rates(0.0, 0.0)}) is None  # mean 0.075
    assert _worst({"6": _rates(0.0, accuracy=0.69), "12": _rates(0.0)}) is None  # mean 0.795, limit 0.8
    assert _worst({"6": _rates(0.0, accuracy=0.71), "12": _rates(0.0)}) == 0.0


def _config(rows, **changes):
    base = AlignConfig(
        data=str(rows), tune="lora", steps=6, batch_size=4, reference_rows=2, lr=5e-3, precision="fp32", checkpoint_every=2
    )
    passes = EvalConfig(str(rows), every=1, rows=48, choose=True)
    return dataclasses.replace(base, **{"lora": LoraConfig(r=4, alpha=8), "eval": passes, **changes})


def _harm(monkeypatch, figures):
    """Validation measures these harmful rates in turn (first the untouched model); all exits alike, utility perfect."""
    calls = iter(figures)

    def validate(self, llava):
        worst = next(calls)
        llava.model.eval()
        return {str(exit): _rates(worst) for exit in self.exits}

    monkeypatch.setattr(Watch, "validate", validate)


def _weights(folder):
    return load_file(folder / "model.safetensors")


def _same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_ends_with_the_weights_of_its_best_validation(tiny_llava, rows, tmp_path, monkeypatch):
    short = align(tiny_llava, _config(rows, eval=EvalConfig(), steps=6), tmp_path / "last")
    kept = {}
    real = train_module._validate

    def validate(t, watch, number):
        rates = real(t, watch, number)
        kept[number] = [p.detach().clone() for p in t.params]
        return rates

    monkeypatch.setattr(train_module, "_validate", validate)
    real_train = train_module.train

    def train(t, *rest):
        real_train(t, *rest)
        kept["end"] = [p.detach().clone() for p in t.params]

    monkeypatch.setattr(train_module, "train", train)
    _harm(monkeypatch, [0.5, 0.4, 0.3, 0.1, 0.2, 0.1, 0.3])
    best = align(tiny_llava, _config(rows), tmp_path / "best")
    assert all(torch.equal(a, b) for a, b in zip(kept["end"], kept[2], strict=True))  # the first pass with 0.1
    assert not _same(_weights(best), _weights(short))
    assert json.loads((best / "edgesafe.json").read_text())["chosen"] == {"update": 2, "worst_harm": 0.1}


def test_a_run_that_no_longer_improves_stops(tiny_llava, rows, tmp_path, monkeypatch):
    _harm(monkeypatch, [0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4])
    config = _config(rows, eval=EvalConfig(str(rows), every=1, rows=48, choose=True, patience=2))
    out = align(tiny_llava, config, tmp_path / "out")
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3  # the best pass and two after it


def test_a_run_that_stopped_early_and_was_cut_while_writing_makes_no_update_more(tiny_llava, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(Watch, "worst_harm", lambda *_: None)  # no best pass, so the last weights are what comes out
    passes = EvalConfig(str(rows), every=1, rows=48, choose=True, patience=2)
    config = _config(rows, eval=passes, checkpoint_every=1)
    whole = align(tiny_llava, config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(train_module.files, "write_model", _cut)
        with pytest.raises(KeyboardInterrupt):
            align(tiny_llava, config, tmp_path / "cut")
    cut = align(tiny_llava, config, tmp_path / "cut", resume=True)
    assert [len((out / "metrics.jsonl").read_text().splitlines()) for out in (whole, cut)] == [2, 2]
    assert _same(_weights(whole), _weights(cut))


def _cut(*_args):
    raise KeyboardInterrupt


def test_a_resumed_run_remembers_its_best_validation(tiny_llava, rows, tmp_path, monkeypatch):
    figures = [0.5, 0.1, 0.4, 0.3, 0.2, 0.3, 0.4]
    _harm(monkeypatch, figures)
    whole = align(tiny_llava, _config(rows), tmp_path / "whole")
    _harm(monkeypatch, figures)
    real, calls = train_module._update, []

    def cut(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "_update", cut)
        with pytest.raises(KeyboardInterrupt):
            align(tiny_llava, _config(rows), tmp_path / "cut")
    _harm(monkeypatch, figures[3:])  # the checkpoint is from after update 2
    assert _same(_weights(whole), _weights(align(tiny_llava, _config(rows), tmp_path / "cut", resume=True)))


def test_without_a_validation_within_limits_the_last_weights_stay(tiny_llava, rows, tmp_path, monkeypatch):
    blind = align(tiny_llava, _config(rows, eval=EvalConfig()), tmp_path / "blind")
    monkeypatch.setattr(Watch, "worst_harm", lambda *_: None)
    _harm(monkeypatch, [0.5] * 7)
    watched = align(tiny_llava, _config(rows), tmp_path / "watched")
    assert _same(_weights(blind), _weights(watched)) and json.loads((watched / "edgesafe.json").read_text())["chosen"] == {}


def test_the_sampler_harm_follows_the_validation(tiny_llava, rows, tmp_path, monkeypatch):
    def validate(self, llava):
        llava.model.eval()
        return {str(exit): _rates(float(exit == Exit(3))) for exit in self.exits}

    monkeypatch.setattr(Watch, "validate", validate)
    passes = EvalConfig(str(rows), every=1, rows=48)
    out = align(
        tiny_llava, _config(rows, sampler="harm", steps=40, batch_size=1, reference_rows=1, eval=passes), tmp_path / "out"
    )
    exits = [json.loads(line)["exit"] for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    assert exits.count("3") > 30  # by hand: 1.02 / 1.08 of 39 draws is 36.8, standard deviation 1.4


def test_validation_that_could_not_see_harm_are_refused(tiny_llava, rows, tmp_path):
    with pytest.raises(ConfigError, match="rows to validate on"):
        align(tiny_llava, _config(rows, eval=EvalConfig(str(rows), every=1, rows=1)), tmp_path / "out")
