"""The loop on a tiny checkpoint: learns, resumes to the same weights, freezes what must stay, refuses what it can't use."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from edgesafe.align import files
from edgesafe.align import train as train_module
from edgesafe.align.data import collate
from edgesafe.align.features import compute, merge_needs
from edgesafe.align.objectives import l_sft
from edgesafe.align.objectives.l_dpo import DpoConfig
from edgesafe.align.objectives.l_sft import update_loss
from edgesafe.align.objectives.ppo import PpoConfig
from edgesafe.align.objectives.table import METHODS
from edgesafe.align.prepare import prepare
from edgesafe.align.settings import AlignConfig, EvalConfig, LoraConfig
from edgesafe.align.train import align
from edgesafe.align.trainer import Trainer
from edgesafe.checkpoint.exit_model import answer_logits, autocast, exit_state, exit_states, load, open_images, pixel_values
from edgesafe.errors import ConfigError, DivergedError, EdgesafeError, InputError
from edgesafe.format.exits import Exit
from edgesafe.format.files import digest_folder
from edgesafe.format.suite import read_suite, write_suite


def _config(rows, **changes) -> AlignConfig:
    """Six small updates; `l-dpo` takes any difference in reward for a pair, as a random model is never right."""
    base = AlignConfig(data=str(rows), steps=6, batch_size=4, reference_rows=2, checkpoint_every=3, lr=5e-3, precision="fp32")
    small = {
        "tune": "lora",
        "lora": LoraConfig(r=4, alpha=8),
        "sections": {
            "dpo": DpoConfig(rows=48, min_reward=-9.0, min_gap=1e-3),
            "ppo": PpoConfig(epochs=2, minibatches=2, max_new_tokens=6, kl_target=1.0),
        },
        "optimizer": "adamw" if changes.get("method") == "l-ppo" else "muon",
        "sft_weight": 1.0,
        **dict.fromkeys(("harm_weight", "focus_harm_weight", "shallow_harm_weight"), 5.0),
    }
    return dataclasses.replace(base, **{**small, **changes})


def _weights(folder):
    return load_file(folder / "model.safetensors")


def _metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _cut_at(monkeypatch, call: int, error=KeyboardInterrupt):
    """The `call`-th update raises, then all are themselves again."""
    real, calls = train_module._update, []

    def cut(*args):
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(*args)

    monkeypatch.setattr(train_module, "_update", cut)


@pytest.mark.parametrize("method", ["self-distill", "l-sft"])
def test_only_the_language_model_moves_and_the_loss_falls(tiny_llava, rows, tmp_path, method):
    out = align(tiny_llava, _config(rows, steps=60, method=method, lr=1e-2), tmp_path / "out")
    before, after = _weights(tiny_llava), _weights(out)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("language_model" in name for name in moved)
    losses = [line["loss"] for line in _metrics(out)]
    assert len(losses) == 60 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert not (out / files.CHECKPOINT).exists() and not (tmp_path / "out.partial").exists()


def test_the_record_says_where_the_weights_come_from(tiny_llava, rows, tmp_path):
    out = align(tiny_llava, _config(rows, steps=1), tmp_path / "out")
    record = json.loads((out / "edgesafe.json").read_text())
    assert record["step"] == "align" and record["parent"]["digest"] == digest_folder(tiny_llava)
    assert record["data"] == digest_folder(rows) and record["config"]["lora"]["r"] == 4 and record["reference"] == "3"
    assert record["exits"] == ["1", "2", "3", "4"]
    assert str(rows.parent) not in json.dumps(record)  # names, not this machine's paths


def test_float16_comes_out_as_float16_and_frozen_parts_bit_equal(rows, tmp_path):
    from tiny import make_tiny_llava

    parent = make_tiny_llava(tmp_path / "half", seed=1, dtype="float16")
    before, after = _weights(parent), _weights(align(parent, _config(rows, steps=2), tmp_path / "out"))
    assert {w.dtype for w in after.values()} == {torch.float16}
    frozen = [name for name in before if "vision_tower" in name or "projector" in name]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)


def test_the_merged_checkpoint_answers_as_the_adapter_did(tiny_llava, rows, tmp_path, monkeypatch):
    kept = {}
    real = train_module.files.write_model

    def before_merge(t):
        part = [t.examples[i] for i in range(3)]
        batch = collate(part, t.llava.pad_id)
        states = exit_state(t.llava, exit_states(t.llava, pixel_values(t.llava, open_images([e.image for e in part]))), Exit(2))
        with torch.no_grad():
            return batch, states, answer_logits(t.llava, batch.ids, batch.where, states)

    real_train = train_module.train
    monkeypatch.setattr(
        train_module, "train", lambda t, *rest: (real_train(t, *rest), t.peft.eval(), kept.update(x=before_merge(t)))
    )
    monkeypatch.setattr(train_module.files, "write_model", real)
    out = load(align(tiny_llava, _config(rows), tmp_path / "out"))
    batch, states, want = kept["x"]
    with torch.no_grad():
        torch.testing.assert_close(answer_logits(out, batch.ids, batch.where, states), want, rtol=1e-4, atol=1e-4)
        untouched = answer_logits(load(tiny_llava), batch.ids, batch.where, states)
    assert not torch.allclose(untouched, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "changes",
    [
        *({"method": method} for method in METHODS),
        {"lora": LoraConfig(r=4, alpha=8, dropout=0.3)},
        {"cache_gib": 0.0},
        {"tune": "full", "optimizer": "adamw", "lr": 1e-4},
        {"tune": "full", "method": "l-ppo", "lr": 1e-4},
        {"tune": "full", "method": "l-sft", "lr": 1e-3},
    ],
    ids=[*METHODS, "dropout", "computed for each update", "full", "full l-ppo", "full by muon"],
)
def test_resume_ends_with_the_same_weights(tiny_llava, rows, tmp_path, monkeypatch, changes):
    config = _config(rows, **changes)
    whole = align(tiny_llava, config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        _cut_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            align(tiny_llava, config, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    with (tmp_path / "cut.partial" / "metrics.jsonl").open("a") as file:
        file.write('{"update": 5, "los')  # killed while writing
    cut = align(tiny_llava, config, tmp_path / "cut", resume=True)
    assert _same(_weights(whole), _weights(cut))
    strip = [{k: v for k, v in line.items() if k != "seconds"} for line in _metrics(cut)]
    assert strip == [{k: v for k, v in line.items() if k != "seconds"} for line in _metrics(whole)]


def test_a_resume_that_forgets_the_optimizer_is_seen(tiny_llava, rows, tmp_path, monkeypatch):
    config = _config(rows)
    whole = align(tiny_llava, config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        _cut_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            align(tiny_llava, config, tmp_path / "cut")
    monkeypatch.setattr(torch.optim.Muon, "load_state_dict", lambda *_: None)
    assert not _same(_weights(whole), _weights(align(tiny_llava, config, tmp_path / "cut", resume=True)))


def test_another_run_cannot_be_resumed(tiny_llava, rows, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _cut_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            align(tiny_llava, _config(rows), tmp_path / "cut")
    with pytest.raises(ConfigError, match="config differ"):
        align(tiny_llava, _config(rows, lr=1e-3), tmp_path / "cut", resume=True)
    with pytest.raises(ConfigError, match="nothing to resume"):
        align(tiny_llava, _config(rows), tmp_path / "other", resume=True)
    assert not (tmp_path / "other.partial").exists()
    (tmp_path / "cut.partial" / files.CHECKPOINT).write_bytes(b"junk")
    with pytest.raises(ConfigError, match="can't be read"):
        align(tiny_llava, _config(rows), tmp_path / "cut", resume=True)


def test_without_resume_an_interrupted_run_starts_over_and_says_so(tiny_llava, rows, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        _cut_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            align(tiny_llava, _config(rows, seed=1), tmp_path / "out")
    (tmp_path / "out.partial" / "left").write_text("over")
    out = align(tiny_llava, _config(rows), tmp_path / "out")
    assert "--resume would continue after update 3" in capsys.readouterr().err
    assert [line["update"] for line in _metrics(out)] == list(range(6)) and not (out / "left").exists()


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e9], ids=str)
def test_a_diverged_run_stops_and_keeps_its_checkpoint(tiny_llava, rows, tmp_path, monkeypatch, factor):
    calls = []

    def poisoned(*args):
        calls.append(1)
        loss, figures = update_loss(*args)
        return (loss * factor if len(calls) == 5 else loss), figures

    monkeypatch.setattr(l_sft, "update_loss", poisoned)
    with pytest.raises(DivergedError, match="checkpoint after update 3 is kept"):
        align(tiny_llava, _config(rows), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    state = torch.load(tmp_path / "out.partial" / files.CHECKPOINT, weights_only=True)
    assert state["done"] == 3 and all(torch.isfinite(p).all() for p in state["params"])


@pytest.fixture(scope="module")
def run(tiny_llava, rows):
    return prepare(tiny_llava, _config(rows))


def _teacher_at(run, numbers, exit):
    part = [run.examples[i] for i in numbers]
    batch = collate(part, run.llava.pad_id)
    states = exit_state(run.llava, exit_states(run.llava, pixel_values(run.llava, open_images([e.image for e in part]))), exit)
    with torch.no_grad(), run.peft.disable_adapter():
        return torch.log_softmax(answer_logits(run.llava, batch.ids, batch.where, states), -1)


def _needs(run, exit, rows):
    return merge_needs([(exit, rows), (run.llava.reference, rows)])


def test_the_teacher_stands_at_the_reference_depth(run):
    features = compute(run.llava, run.examples, merge_needs([(Exit(1), [0, 5])]), teacher=True, precision="fp32")
    for row in (0, 5):
        said = features.teacher[row].float()
        torch.testing.assert_close(said, _teacher_at(run, [row], run.llava.reference)[0], rtol=2e-3, atol=2e-3)
        for wrong in (Exit(1), Exit(run.llava.n_blocks)):
            assert not torch.allclose(said, _teacher_at(run, [row], wrong)[0], rtol=2e-2, atol=2e-2)


def test_states_are_those_of_their_row_and_exit(run):
    features = compute(
        run.llava, run.examples, merge_needs([(Exit(1), [7, 2]), (Exit(4), [2])]), teacher=False, precision="fp32"
    )
    assert set(features.states) == {(7, Exit(1)), (2, Exit(1)), (2, Exit(4))}
    for (row, exit), state in features.states.items():
        pixels = pixel_values(run.llava, open_images([run.examples[row].image]))
        torch.testing.assert_close(
            state.float(), exit_state(run.llava, exit_states(run.llava, pixels), exit)[0], rtol=2e-3, atol=2e-3
        )


def test_an_untouched_adapter_has_no_kl_at_the_reference_depth_and_some_at_an_exit(run):
    features = compute(run.llava, run.examples, _needs(run, Exit(1), [0, 1, 2, 3]), teacher=True, precision="fp32")
    with torch.no_grad():
        _, figures = update_loss(run, features, Exit(1), [0, 1, 2, 3])
    assert figures["reference_kl"] == pytest.approx(0.0, abs=1e-5) and figures["exit_kl"] > 1e-3


@torch.no_grad()
def _transformers_logits(run, row, exit):
    e = run.examples[row]
    pixels = pixel_values(run.llava, open_images([e.image]))
    ids = torch.tensor([[*e.prompt, *e.answer]])
    return run.llava.model(input_ids=ids, pixel_values=pixels, vision_feature_layer=exit.depth).logits[
        0, len(e.prompt) - 1 : -1
    ]


def _kl(run, row, teacher, exit):
    """KL(teacher || exit), mean over an answer's tokens, from transformers' logits and torch's own kl_div."""
    p, q = (torch.log_softmax(_transformers_logits(run, row, at), -1) for at in (teacher, exit))
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item()


def test_an_update_is_the_kl_that_transformers_gives(run):
    # The adapter does nothing yet, so the whole update can be computed without our code.
    kinds = [[i for i, one in enumerate(run.examples) if one.harmful is harmful][:2] for harmful in (True, False)]
    rows, exit, reference = sum(kinds, []), Exit(2), run.llava.reference
    features = compute(run.llava, run.examples, _needs(run, exit, rows), teacher=True, precision="fp32")
    with torch.no_grad():
        _, figures = update_loss(run, features, exit, rows)
    weight = [run.config.harm_weight if run.examples[row].harmful else 1.0 for row in rows]

    def mean(teacher, exit, weights):
        kl = [_kl(run, row, teacher, exit) for row in rows]
        return sum(w * k for w, k in zip(weights, kl, strict=True)) / sum(weights)

    assert len(set(weight)) == 2
    assert figures["exit_kl"] == pytest.approx(mean(reference, exit, weight), rel=5e-3)  # the teacher is kept in float16
    wrong = {
        "exit one block deeper": mean(reference, Exit(3), weight),
        "exit one block shallower": mean(reference, Exit(1), weight),
        "teacher at the last block": mean(Exit(run.llava.n_blocks), exit, weight),
        "teacher at the exit": mean(exit, exit, weight),
        "harm not weighted": mean(reference, exit, [1.0] * 4),
    }
    for name, value in wrong.items():
        assert figures["exit_kl"] != pytest.approx(value, rel=2e-2), name


def test_both_parts_weigh_the_same(run: Trainer):
    features = compute(run.llava, run.examples, _needs(run, Exit(1), [0, 1, 2, 3]), teacher=True, precision="fp32")
    with torch.no_grad():
        loss, f = update_loss(run, features, Exit(1), [0, 1, 2, 3])
    want = (f["exit_kl"] + f["exit_sft"] + f["reference_kl"] + f["reference_sft"]) / 2
    assert loss.item() == pytest.approx(want, rel=1e-5)


def test_harm_weighs_by_where_an_exit_stands_to_the_focus(tiny_llava, rows):
    config = _config(rows, focus=(0.6, 0.7), harm_weight=3.0, focus_harm_weight=2.0, shallow_harm_weight=7.0)
    t = prepare(tiny_llava, config)  # four blocks, reference depth 3: the focus is exit 2
    assert t.harm_weights([Exit(depth) for depth in (1, 2, 3, 4)]).tolist() == [7.0, 2.0, 3.0, 3.0]


def test_bfloat16_says_nearly_the_same(run):
    features = compute(run.llava, run.examples, merge_needs([(Exit(1), [0, 1])]), teacher=True, precision="fp32")
    with autocast("bf16"):
        half = compute(run.llava, run.examples, merge_needs([(Exit(1), [0, 1])]), teacher=True, precision="bf16")
    assert (features.teacher[0].float().exp() - half.teacher[0].float().exp()).abs().max() < 0.1


def test_looking_changes_nothing_about_the_run(tiny_llava, rows, tmp_path):
    blind = align(tiny_llava, _config(rows, steps=4), tmp_path / "blind")
    seen = align(tiny_llava, _config(rows, steps=4, eval=EvalConfig(str(rows), 2, 16)), tmp_path / "seen")
    assert _same(_weights(blind), _weights(seen))
    looks = [line["eval"] for line in _metrics(seen) if "eval" in line]
    assert len(looks) == 2 and set(looks[0]) == {"1", "2", "3", "4"} and set(looks[0]["1"]) >= {"harmful", "accuracy"}


@pytest.fixture(scope="module")
def odd(rows, tmp_path_factory):
    """Folders that can't be trained on."""
    root = tmp_path_factory.mktemp("odd")
    row = read_suite(rows).rows[0]
    picture = {row.image: Image.new("RGB", (64, 64))}
    write_suite(root / "cert", [row], picture, "c", "cert")
    write_suite(root / "blank", [dataclasses.replace(row, target=" ")], picture, "c", "train")
    write_suite(root / "text", [dataclasses.replace(row, image=None)], {}, "c", "train")
    write_suite(root / "long", [dataclasses.replace(row, target="word " * 600)], picture, "c", "train")
    shutil.copytree(rows, root / "empty")
    (root / "empty" / "rows.jsonl").write_text("")
    return root


@pytest.mark.parametrize(
    ("changes", "error", "names"),
    [
        ({"exits": "1,99"}, ConfigError, "99"),
        ({"exits": "0"}, ConfigError, "0"),
        ({"data": ""}, ConfigError, "--data"),
        ({"data": "cert"}, ConfigError, "not for training"),
        ({"data": "blank"}, InputError, "empty answer"),
        ({"data": "text"}, InputError, "no picture"),
        ({"data": "long"}, InputError, "tokens"),
        ({"data": "empty"}, EdgesafeError, "rows"),
        ({"data": "nowhere"}, InputError, "not a suite"),
        ({"lora": LoraConfig(targets=("q_proj", "qproj"))}, ConfigError, "qproj"),
        ({"eval": EvalConfig("cert", 1, 4)}, ConfigError, "not for validation"),
    ],
)
def test_bad_runs_leave_nothing(tiny_llava, rows, odd, tmp_path, changes, error, names):
    for key in ("data", "eval"):
        if isinstance(changes.get(key), str) and changes[key]:
            changes = {**changes, key: str(odd / changes[key])}
    if "eval" in changes:
        changes = {"eval": dataclasses.replace(changes["eval"], suite=str(odd / "cert"))}
    with pytest.raises(error, match=names):
        align(tiny_llava, _config(rows, **changes), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_output_is_never_overwritten(tiny_llava, rows, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists"):
        align(tiny_llava, _config(rows), tmp_path / "there")
