"""The reward model's trainer on a tiny GPT-2: the loss by hand, a toy preference, resume, divergence, the record."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgesafe import cli
from edgesafe.align import files
from edgesafe.align.reward import train as reward_train
from edgesafe.align.reward.model import open_model_reward, read_scores
from edgesafe.align.reward.train import RewardTraining, draw_pairs, pair_loss, train_reward_model
from edgesafe.errors import ConfigError, DivergedError, InputError
from edgesafe.format.files import digest_folder, sha256_file
from edgesafe.format.suite import Row
from tiny_reward import SMALL, make_gpt2, toy, write_lines

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_gpt2(tmp_path_factory.mktemp("base") / "gpt2")


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return make_gpt2(tmp_path_factory.mktemp("scorer") / "reward", head=True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", toy(160))


@pytest.fixture(scope="module")
def learnt(base, tmp_path_factory):
    """The toy preference, learnt; with its record and how often the model was called."""
    folder = tmp_path_factory.mktemp("learnt")
    data, calls, real = write_lines(folder / "pairs.jsonl", toy(600)), [], read_scores
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward_train, "read_scores", lambda model, ids: calls.append(1) or real(model, ids))
        record = train_reward_model(str(base), data, replace(SMALL, epochs=6, batch_size=16), folder / "out")
    return folder / "out", record, len(calls)


@pytest.fixture(scope="module")
def whole(base, pairs, tmp_path_factory):
    """An uninterrupted run of 16 updates, to which resumed ones are compared."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train_reward_model(str(base), pairs, SMALL, out)
    return out


# The loss.

CHOSEN, REJECTED = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])
# Margins 2 and -1: log(1 + e^-2) = 0.126928, log(1 + e^1) = 1.313262, mean 0.720095.
BY_HAND = (math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2


def test_the_loss_by_hand():
    assert pytest.approx(0.720095, abs=1e-6) == BY_HAND  # as worked out above
    assert pair_loss(CHOSEN, REJECTED).item() == pytest.approx(BY_HAND, rel=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda win, lose: pair_loss(lose, win),
        lambda win, lose: torch.nn.functional.logsigmoid(win - lose).mean(),
        lambda win, lose: -torch.sigmoid(win - lose).mean(),
        lambda win, lose: -torch.nn.functional.logsigmoid(win - lose).sum(),
    ],
    ids=["chosen and rejected swapped", "sign flipped", "no logarithm", "sum, not mean"],
)
def test_a_wrong_loss_is_seen(wrong):
    assert wrong(CHOSEN, REJECTED).item() != pytest.approx(BY_HAND, rel=0.05)


def test_the_gradient_pushes_the_chosen_up_and_the_rejected_down():
    win, lose = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    pair_loss(win, lose).backward()
    assert (win.grad.item(), lose.grad.item()) == (-0.5, 0.5)  # -(1 - sigmoid(0))


def test_a_huge_margin_is_still_finite():
    assert pair_loss(torch.tensor([-1e4]), torch.tensor([1e4])).item() == pytest.approx(2e4)


# The trainer.


def test_a_toy_preference_is_learnt(learnt):
    out, record, calls = learnt
    assert record["val"]["accuracy"] > 0.9 and record["val"]["loss"] < 0.3 and record["pairs"]["val"] > 60
    # Once for an update, and once for each 16 validation pairs of a pass; seconds would measure what else the machine does.
    passes = [line for line in _metrics(out) if "val" in line]
    assert calls == record["updates"] + len(passes) * math.ceil(record["pairs"]["val"] / 16)
    assert 10 <= len(passes) <= 11
    fresh = toy(200, seed=9)
    reward = open_model_reward(str(out), harmlessness=5.0, helpfulness=1.0)
    rows = [Row(str(i), "harmful", "x", None, p["prompt"], p["chosen"], (), "t", False) for i, p in enumerate(fresh)]
    lost = reward(rows, [p["rejected"] for p in fresh])
    assert sum(value < 1 for value in lost) > 180  # the chosen answer earns 1, so r(rejected) < r(chosen) in > 90 %


@pytest.mark.parametrize("mutant", ["sign flipped", "chosen and rejected swapped", "first token read"])
def test_a_wrong_trainer_does_not_learn_it(base, tmp_path, monkeypatch, mutant):
    real_loss, real_scores = pair_loss, read_scores
    if mutant == "sign flipped":
        monkeypatch.setattr(reward_train, "pair_loss", lambda win, lose: -real_loss(win, lose))
    elif mutant == "first token read":
        monkeypatch.setattr(reward_train, "read_scores", lambda model, ids: real_scores(model, [row[:1] for row in ids]))
    elif mutant == "chosen and rejected swapped":
        monkeypatch.setattr(reward_train, "pair_loss", lambda win, lose: real_loss(lose, win))
    data = write_lines(tmp_path / "p.jsonl", toy(300))
    record = train_reward_model(str(base), data, replace(SMALL, epochs=4), tmp_path / "out")
    assert record["val"]["accuracy"] < 0.6


def test_the_record_says_where_it_comes_from(base, learnt):
    out, record, _ = learnt
    kept = json.loads((out / "edgesafe.json").read_text())
    assert kept == record and kept["step"] == "reward-model" and kept["seed"] == 0 and "torch" in kept["versions"]
    assert kept["parent"] == {"kind": "checkpoint", "name": "gpt2", "digest": digest_folder(base)}
    assert kept["data"] == sha256_file(out.parent / "pairs.jsonl") and kept["config"]["epochs"] == 6
    assert not out.with_name("out.partial").exists()
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "metrics.jsonl",
        "edgesafe.json",
    }


def _metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_best_weights_are_kept_not_the_last(base, tmp_path, monkeypatch):
    # Beyond the third validation pass the loss is made to rise.
    real, seen = reward_train.validate, []

    def worse(run):
        seen.append([p.detach().clone() for p in run.params])
        return {**real(run), "loss": abs(len(seen) - 3) + 0.5}

    monkeypatch.setattr(reward_train, "validate", worse)
    record = train_reward_model(str(base), write_lines(tmp_path / "p.jsonl", toy(100)), SMALL, tmp_path / "out")
    passes = [line for line in _metrics(tmp_path / "out") if "val" in line]
    assert len(seen) == len(passes) > 4 and record["val"]["update"] == passes[2]["update"] + 1
    kept = dict(_model(tmp_path / "out").named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), seen[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(kept.values(), seen[-1], strict=True))


def _model(folder):
    return open_model_reward(str(folder), harmlessness=1.0, helpfulness=1.0).model


def _same(a: Path, b: Path) -> bool:
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def _untimed(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in _metrics(folder)]


def _cut(monkeypatch, base, pairs, out, call: int, error=KeyboardInterrupt, factor=None):
    """Runs until the `call`-th loss, which raises, or is multiplied by `factor`."""
    real, calls = reward_train.pair_loss, []

    def broken(win, lose):
        calls.append(win.requires_grad)
        if sum(calls) == call and win.requires_grad:
            if factor is None:
                raise error
            return real(win, lose) * factor
        return real(win, lose)

    with monkeypatch.context() as patch:
        patch.setattr(reward_train, "pair_loss", broken)
        with pytest.raises(error):
            train_reward_model(str(base), pairs, SMALL, out)


def test_resume_ends_with_the_same_weights(base, pairs, whole, tmp_path, monkeypatch):
    _cut(monkeypatch, base, pairs, tmp_path / "cut", 8)
    assert not (tmp_path / "cut").exists() and 0 < files.done_updates(tmp_path / "cut.partial") < 8
    with (tmp_path / "cut.partial" / "metrics.jsonl").open("a") as file:
        file.write('{"update": 8, "los')
    train_reward_model(str(base), pairs, SMALL, tmp_path / "cut", resume=True)
    assert _same(whole, tmp_path / "cut") and _untimed(whole) == _untimed(tmp_path / "cut")


def test_resume_after_a_kill_ends_with_the_same_weights(base, pairs, whole, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "edgesafe.cli", "reward-model", str(base), "--data", str(pairs), "--out", str(out)]
    command += ["--lr", "3e-3", "--batch-size", "8", "--val-share", "0.2", "--max-length", "64"]
    killed = "import edgesafe.align.reward.train as r, os, signal, sys; real, calls = r.pair_loss, []\n"
    killed += "def loss(win, lose):\n    calls.append(win.requires_grad)\n"
    killed += "    return os.kill(os.getpid(), signal.SIGKILL) if sum(calls) == 8 else real(win, lose)\n"
    killed += "r.pair_loss = loss\nfrom edgesafe.cli import main; main(sys.argv[1:])"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.run([sys.executable, "-c", killed, *command[3:]], env=env, stderr=subprocess.DEVNULL)
    assert process.returncode == -signal.SIGKILL and not out.exists()
    assert 0 < files.done_updates(out.with_name("killed.partial")) < 8
    done = subprocess.run([*command, "--resume", "--json"], env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["val"] == json.loads((out / "edgesafe.json").read_text())["val"]
    assert _same(whole, out) and _untimed(whole) == _untimed(out)


def test_a_resume_that_forgets_the_optimizer_is_seen(base, pairs, whole, tmp_path, monkeypatch):
    _cut(monkeypatch, base, pairs, tmp_path / "cut", 8)
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda *_: None)
    train_reward_model(str(base), pairs, SMALL, tmp_path / "cut", resume=True)
    assert not _same(whole, tmp_path / "cut")


def test_the_seed_decides_and_another_one_differs(base, pairs, whole, tmp_path):
    train_reward_model(str(base), pairs, SMALL, tmp_path / "again")
    train_reward_model(str(base), pairs, replace(SMALL, seed=1), tmp_path / "other")
    assert _same(whole, tmp_path / "again") and not _same(whole, tmp_path / "other")


def test_another_run_can_not_be_resumed(base, pairs, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="nothing to resume"):
        train_reward_model(str(base), pairs, SMALL, tmp_path / "cut", resume=True)
    assert list(tmp_path.iterdir()) == []
    _cut(monkeypatch, base, pairs, tmp_path / "cut", 8)
    with pytest.raises(ConfigError, match="config differ"):
        train_reward_model(str(base), pairs, replace(SMALL, lr=1e-3), tmp_path / "cut", resume=True)
    other = write_lines(tmp_path / "p.jsonl", toy(160, seed=1))
    with pytest.raises(ConfigError, match="data"):
        train_reward_model(str(base), other, SMALL, tmp_path / "cut", resume=True)


@pytest.mark.parametrize("factor", [math.nan, math.inf], ids=str)
def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(base, pairs, tmp_path, monkeypatch, factor):
    _cut(monkeypatch, base, pairs, tmp_path / "out", 8, error=DivergedError, factor=factor)
    assert not (tmp_path / "out").exists()
    state = torch.load(tmp_path / "out.partial" / files.CHECKPOINT, weights_only=True)
    assert 0 < state["done"] < 8 and all(torch.isfinite(p).all() for p in state["params"])


def test_a_base_with_a_head_of_other_labels_gets_a_new_one(scorer, pairs, tmp_path):
    from transformers import GPT2ForSequenceClassification

    folder = Path(shutil.copytree(scorer, tmp_path / "two"))
    GPT2ForSequenceClassification.from_pretrained(scorer, num_labels=2, ignore_mismatched_sizes=True).save_pretrained(folder)
    model, _ = reward_train.open_base(str(folder))
    assert tuple(model.score.weight.shape) == (1, 32)
    trained, _ = reward_train.open_base(str(scorer))
    assert torch.equal(trained.score.weight, load_file(scorer / "model.safetensors")["score.weight"])


def test_every_pair_is_seen_once_an_epoch():
    config = RewardTraining(batch_size=4, epochs=2)
    drawn = [i for number in range(5) for i in draw_pairs(config, 10, number)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"max_length": 65}, ConfigError),
        ({"lr": 0.0}, ConfigError),
        ({"epochs": 0}, ConfigError),
        ({"batch_size": 0}, ConfigError),
        ({"val_share": 1.0}, ConfigError),
        ({"val_share": 1e-9}, InputError),
    ],
    ids=str,
)
def test_settings_out_of_range(base, pairs, tmp_path, changes, error):
    with pytest.raises(error):
        train_reward_model(str(base), pairs, replace(SMALL, **changes), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_and_its_exit_codes(base, pairs, tmp_path, capsys):
    words = ["reward-model", str(base), "--data", str(pairs), "--out", str(tmp_path / "out"), "--max-length", "64"]
    assert cli.main([*words, "--val-share", "0.2", "--batch-size", "64"]) == 0
    out, err = capsys.readouterr()
    assert "validation accuracy" in out and str(tmp_path / "out") in out and "reward model 2/2" in err
    assert cli.main(words) == InputError.exit_code and "exists already" in capsys.readouterr().err
    words[1], words[5] = "edgesafe-nobody/no-such-base", str(tmp_path / "new")
    assert cli.main(words) == ConfigError.exit_code
    assert capsys.readouterr().out == "" and not (tmp_path / "new.partial").exists()


def test_no_validation_keeps_the_last_weights(base, pairs, tmp_path):
    record = train_reward_model(str(base), pairs, replace(SMALL, val_share=0.0), tmp_path / "out")
    assert "val" not in record and record["pairs"] == {"train": 160, "val": 0, "skipped": 0}


def test_a_picture_model_is_no_base(tiny_llava, pairs, tmp_path):
    with pytest.raises(ConfigError, match="fetched or read"):
        train_reward_model(str(tiny_llava), pairs, SMALL, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
