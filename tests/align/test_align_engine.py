"""A kill in the middle of an update, a full disk, and what saves memory: activations computed twice, few rows at a time."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaAttention

from edgesafe.align import features, files
from edgesafe.align.objectives import rollout
from edgesafe.align.objectives.ppo import PpoConfig
from edgesafe.align.prepare import prepare
from edgesafe.align.settings import AlignConfig, LoraConfig
from edgesafe.align.train import _features, align
from edgesafe.cli import main
from edgesafe.errors import ConfigError
from edgesafe.format.exits import Exit

# 2 epochs of 2 minibatches are 4 optimizer steps an update; the 14th is the second of the update with number 3.
PPO = """method = "l-ppo"
steps = 5
batch_size = 4
reference_rows = 2
optimizer = "adamw"
lr = 5e-3
precision = "fp32"
checkpoint_every = 2
tune = "lora"
[lora]
r = 4
alpha = 8
[ppo]
epochs = 2
minibatches = 2
max_new_tokens = 6
kl_target = 0.001
kl_horizon = 1
"""
KILLED_AT = 14


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _same(a: Path, b: Path) -> bool:
    one, two = _weights(a), _weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def _metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def killed(tiny_llava, rows, tmp_path_factory):
    """A whole run of l-ppo, and one that SIGKILL ended between two optimizer steps of an update."""
    root = tmp_path_factory.mktemp("killed")
    (root / "c.toml").write_text(PPO)

    def argv(out: str, *options: str) -> list[str]:
        words = ["align", str(tiny_llava), "--config", str(root / "c.toml"), "--data", str(rows), "--out", str(root / out)]
        return [*words, *options]

    assert main(argv("whole")) == 0
    (root / "jobs.json").write_text(json.dumps([{"argv": argv("cut"), "kill": KILLED_AT}]))
    # As many threads as here: sums over another number of threads differ in their last bits.
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.run([sys.executable, processes.__file__, str(root / "jobs.json")], env=env, capture_output=True)
    assert child.returncode == -9, child.stderr.decode()[-2000:]
    return root, argv


def test_a_kill_leaves_the_last_checkpoint_and_no_output(killed):
    root, _ = killed
    assert not (root / "cut").exists() and files.done_updates(root / "cut.partial") == 2
    assert [line["update"] for line in _metrics(root / "cut.partial")] == [0, 1, 2]


def test_ppo_killed_within_an_update_resumes_to_the_same_bits(killed, tmp_path):
    root, argv = killed
    shutil.copytree(root / "cut.partial", root / "again.partial")
    assert main(argv("again", "--resume")) == 0
    assert _same(root / "whole", root / "again")
    strip = [[{**line, "seconds": 0} for line in _metrics(root / name)] for name in ("whole", "again")]
    assert strip[0] == strip[1]
    assert len({line["kl_coef"] for line in strip[0]}) > 2  # the coefficient did adapt


@pytest.mark.parametrize("lost", ["kl_coef", "optimizer", "params"])
def test_a_checkpoint_without_one_of_its_parts_is_seen(killed, lost):
    root, argv = killed
    name = f"without-{lost}"
    shutil.copytree(root / "cut.partial", root / f"{name}.partial")
    state = torch.load(root / f"{name}.partial" / files.CHECKPOINT, weights_only=True)
    if lost == "kl_coef":
        del state["extra"]["kl_coef"]
    elif lost == "optimizer":
        state["optimizer"]["state"] = {}
    else:
        state["params"] = [torch.zeros_like(p) if p.dim() > 1 else p for p in state["params"]]
    torch.save(state, root / f"{name}.partial" / files.CHECKPOINT)
    assert main(argv(name, "--resume")) == 0
    assert not _same(root / "whole", root / name)


def test_a_checkpoint_of_other_weights_is_refused(killed, capsys):
    root, argv = killed
    shutil.copytree(root / "cut.partial", root / "others.partial")
    path = root / "others.partial" / files.CHECKPOINT
    state = torch.load(path, weights_only=True)
    torch.save({**state, "params": state["params"][:-1]}, path)
    before = path.read_bytes()
    assert main(argv("others", "--resume")) == ConfigError.exit_code
    said = capsys.readouterr().err
    assert "trained other weights" in said and "without --resume" in said and path.read_bytes() == before


def _full_disk(monkeypatch, how: str, at: int) -> None:
    """From the `at`-th checkpoint on no more bytes get onto the disk: the system says so, or the kernel's limit is real."""
    real, calls = files.save_checkpoint, []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def save(*args, **options):
        calls.append(1)
        if len(calls) < at:
            return real(*args, **options)
        if how == "no space":
            monkeypatch.setattr("edgesafe.format.files.os.fsync", full)
            return real(*args, **options)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            return real(*args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(files, "save_checkpoint", save)


@pytest.mark.parametrize("how", ["no space", "file too large"])
def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(killed, monkeypatch, capsys, how):
    root, argv = killed
    name = how.replace(" ", "-")
    with monkeypatch.context() as patch:
        _full_disk(patch, how, at=2)
        assert main(argv(name)) == 1
    said = capsys.readouterr().err
    assert "the disk is full" in said and "--resume" in said
    partial = root / f"{name}.partial"
    assert not (root / name).exists() and files.done_updates(partial) == 2
    kept = {files.CHECKPOINT, files.METRICS, "exit_maps.safetensors", "exit_maps.json"}
    assert {p.name for p in partial.iterdir()} == kept  # no half of a file
    assert main(argv(name, "--resume")) == 0
    assert _same(root / "whole", root / name)


def test_a_full_disk_at_the_end_can_be_resumed(killed, monkeypatch, capsys):
    root, argv = killed

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "copy2", full)
        assert main(argv("end")) == 1
    assert "the disk is full" in capsys.readouterr().err and not (root / "end").exists()
    assert main(argv("end", "--resume")) == 0
    assert _same(root / "whole", root / "end")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("method", ["self-distill", "l-ppo"])
def test_activations_computed_twice_give_the_same_weights(tiny_llava, rows, tmp_path, monkeypatch, method, tune, precision):
    calls, real = [], LlamaAttention.forward

    def counted(self, *args, **options):
        calls.append(torch.is_grad_enabled())
        return real(self, *args, **options)

    monkeypatch.setattr(LlamaAttention, "forward", counted)
    config = AlignConfig(
        method=method,
        data=str(rows),
        steps=3,
        batch_size=4,
        reference_rows=2,
        tune=tune,
        optimizer="adamw",
        lr=1e-3,
        precision=precision,
        lora=LoraConfig(r=4, alpha=8),
        sections={"ppo": PpoConfig(epochs=1, minibatches=2, max_new_tokens=4)},
    )
    plain, passes = align(tiny_llava, config, tmp_path / "plain"), sum(calls)
    calls.clear()
    twice = align(tiny_llava, dataclasses.replace(config, gradient_checkpointing=True), tmp_path / "twice")
    assert sum(calls) == 2 * passes  # it does compute them twice
    one, two = _weights(plain), _weights(twice)
    # The same operations on the same numbers, once more: nothing that could round otherwise.
    torch.testing.assert_close(two, one, rtol=0, atol=0)
    assert not _same(tiny_llava, plain)


def test_a_large_model_is_seen_in_smaller_pieces_that_say_the_same(tiny_llava, rows, monkeypatch):
    config = AlignConfig(
        method="l-ppo", data=str(rows), tune="lora", optimizer="adamw", precision="fp32", lora=LoraConfig(r=4, alpha=8)
    )
    t = prepare(tiny_llava, config)
    need = {row: frozenset({Exit(1), Exit(2)}) for row in range(7)}
    chunks: list[int] = []
    real, forward = features.pixel_values, type(t).forward

    def seen(llava, images):
        chunks.append(len(images))
        return real(llava, images)

    def counted(self, batch, states):
        passes.append(len(states))
        return forward(self, batch, states)

    passes: list[int] = []
    monkeypatch.setattr(features, "pixel_values", seen)
    monkeypatch.setattr(type(t), "forward", counted)

    def both():
        found = _features(t, need)
        states = t.states(found, list(range(7)), [Exit(1)] * 7)
        uniforms = np.random.default_rng(0).random((7, 5))
        return found, rollout.roll_out(t, t.examples[:7], states, uniforms)

    whole, trajectory = both()
    assert chunks == [7] and passes == [7, 7]
    # States of a row: 5 blocks' x 37 x 32 values of 4 bytes; logits of a row: 32 tokens, the vocabulary, 4 bytes.
    monkeypatch.setattr(features, "CHUNK_BYTES", 3 * 4 * 5 * 37 * 32)
    monkeypatch.setattr(rollout, "LOGIT_BYTES", 3 * 4 * 32 * t.llava.model.config.text_config.vocab_size)
    chunks.clear()
    passes.clear()
    pieces, again = both()
    assert chunks == [3, 3, 1] and passes == [3, 3, 1] * 2
    for at, state in whole.states.items():
        torch.testing.assert_close(pieces.states[at].float(), state.float(), rtol=2e-3, atol=2e-3)  # kept in float16
    for name in ("logprobs", "ref_logprobs", "values"):
        torch.testing.assert_close(getattr(again, name), getattr(trajectory, name), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(again.logprobs.roll(1, 0), trajectory.logprobs, rtol=1e-2, atol=1e-2)  # rows are not mixed up
