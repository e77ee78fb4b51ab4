"""An objective in one new module outside the package: trained through `align`, planned for, resumed; wrong ones are refused."""

from __future__ import annotations

import json
from pathlib import Path

import outside_objective
import pytest
import torch
from safetensors.torch import load_file

from edgesafe.align import train as train_module
from edgesafe.align.config import read_config
from edgesafe.align.memory import estimate
from edgesafe.align.train import align
from edgesafe.checkpoint.exit_model import load, open_images, pixel_values
from edgesafe.cli import main
from edgesafe.errors import ConfigError

TOML = """method = "outside_objective:OBJECTIVE"
exit_map = "none"
steps = 2
batch_size = 4
reference_rows = 0
lr = 5e-3
warmup = 0.0
precision = "fp32"
tune = "lora"
checkpoint_every = 1
[lora]
r = 4
alpha = 8
[smoothed]
smoothing = 0.25
rows = 6
"""


@pytest.fixture
def config(rows, tmp_path):
    (tmp_path / "c.toml").write_text(TOML)
    return read_config(tmp_path / "c.toml", data=str(rows))


def _metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _by_transformers(tiny_llava, t, exit, items) -> float:
    """The smoothed loss of the untouched model, from transformers' own logits at the exit and its definition."""
    llava, losses = load(tiny_llava), []
    for item in items:
        e = t.examples[item.row]
        ids = torch.tensor([[*e.prompt, *e.answer]])
        pixels = pixel_values(llava, open_images([e.image]))
        with torch.no_grad():
            logits = llava.model(input_ids=ids, pixel_values=pixels, vision_feature_layer=exit.depth).logits
        logp = torch.log_softmax(logits[0, len(e.prompt) - 1 : -1].double(), -1)
        right = logp.gather(-1, torch.tensor(e.answer)[:, None])[:, 0]
        losses.append(-(0.75 * right + 0.25 * logp.mean(-1)).mean().item())
    return sum(losses) / len(losses)


def test_it_trains_two_updates_by_its_own_rule(tiny_llava, config, tmp_path, monkeypatch):
    drawn, real = [], train_module._update

    def watched(t, features, exit, items, number):
        drawn.append((t, exit, items))
        return real(t, features, exit, items, number)

    monkeypatch.setattr(train_module, "_update", watched)
    out = align(tiny_llava, config, tmp_path / "out")
    lines = _metrics(out)
    assert [line["update"] for line in lines] == [0, 1] and all(line["smoothed"] == line["loss"] for line in lines)
    t, exit, items = drawn[0]
    assert lines[0]["smoothed"] == pytest.approx(_by_transformers(tiny_llava, t, exit, items), rel=2e-3)  # float16 states
    six = sorted((len(e.answer) for e in t.examples), reverse=True)[:6]
    assert {exit.depth for _, exit, _ in drawn} <= {2, 3, 4}  # not the shallowest exit
    assert all(len(t.examples[item.row].answer) >= six[-1] for _, _, some in drawn for item in some)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_llava, out))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("language_model" in name for name in moved)
    record = json.loads((out / "edgesafe.json").read_text())["config"]
    assert record["method"] == "outside_objective:OBJECTIVE" and record["smoothed"] == {"smoothing": 0.25, "rows": 6}


def test_its_memory_is_in_the_plan(tiny_llava, config, rows, tmp_path, capsys):
    need = estimate(tiny_llava, config)
    assert (need.phase, need.working) == ("sorting the rows", 2**28 * 4 / 2**20)
    argv = ["align", str(tiny_llava), "--config", str(tmp_path / "c.toml"), "--data", str(rows), "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    assert "sorting the rows 1.0" in capsys.readouterr().err
    assert len(_metrics(tmp_path / "out")) == 2


def test_it_resumes_to_the_same_weights(tiny_llava, config, tmp_path, monkeypatch):
    whole = align(tiny_llava, config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(train_module.files, "write_model", _cut)
        with pytest.raises(KeyboardInterrupt):
            align(tiny_llava, config, tmp_path / "cut")
    cut = align(tiny_llava, config, tmp_path / "cut", resume=True)
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(one[name], two[name]) for name in one)


def _cut(*_args):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"OBJECTIVE": "NOBODY"}, "has no NOBODY"),
        ({"outside_objective": "no_such_module"}, "can't be imported: ModuleNotFoundError.*PYTHONPATH"),
        ({'"outside_objective:OBJECTIVE"': '":OBJECTIVE"'}, "another form"),
        ({"OBJECTIVE": "NOT_AN_OBJECTIVE"}, "is a Section"),
        ({"OBJECTIVE": "TAKEN"}, r"section \[ppo\]"),
        ({"OBJECTIVE": "NAMED_AS_A_SETTING"}, r"section \[steps\]"),
        ({"OBJECTIVE": "WITH_A_VALUE_HEAD", "[smoothed]\nsmoothing = 0.25\nrows = 6\n": ""}, "the value head of outside_obj"),
        ({"smoothing = 0.25": "smoothing = 1.0"}, "smoothed.smoothing = 1.0 is out of range"),
        ({"smoothing = 0.25": "smoothin = 0.5"}, "did you mean 'smoothing'"),
        ({"rows = 6": "rows = 0"}, "at least 1"),
        ({'"outside_objective:OBJECTIVE"': '"l-sft"'}, "unknown key 'smoothed'"),
        ({'"outside_objective:OBJECTIVE"': '"lsft"'}, "unknown method 'lsft', did you mean 'l-sft'.*'l-ppo'"),
        ({'"outside_objective:OBJECTIVE"': "3"}, "method is the int 3"),
    ],
)
def test_what_is_not_an_objective_is_refused(tmp_path, change, names):
    text = TOML
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match=names):
        read_config(tmp_path / "c.toml")


def test_its_limits_know_the_processes(config):
    from edgesafe.align.prepare import _check_processes

    objective = outside_objective.OBJECTIVE
    _check_processes(config, objective, 2)
    with pytest.raises(ConfigError, match="smoothed.rows = 1 is out of range .2 processes"):
        _check_processes(outside_objective.SMOOTHED.put(config, outside_objective.SmoothedConfig(rows=1)), objective, 2)
