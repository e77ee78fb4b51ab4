"""The alignment loop: each update draws one exit depth, and the reference depth is in the batch.

Frozen: vision tower and projector. Trained: LoRA factors on the language model, merged into the written checkpoint, or all of
    the language model. Depth and rows of an update depend on the seed, its number and earlier looks alone, so a resumed run
    repeats an uninterrupted one. The four objectives are in supervised.py, l_dpo.py and l_ppo.py.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list

from edgesafe.align import files, l_dpo
from edgesafe.align import l_sft as supervised
from edgesafe.align.config import HARM, L_DPO, L_PPO, MUON, SELF_DISTILL, AlignConfig, with_tune
from edgesafe.align.data import read_examples
from edgesafe.align.features import Features, chunk_of, compute, merge_needs, plan, size_gib
from edgesafe.align.l_ppo import ppo_update
from edgesafe.align.reward.overlap import open_reward
from edgesafe.align.sampler import draw_depth, draw_rows, exit_shares
from edgesafe.align.trainer import Trainer, learning_rate, make_optimizer, make_policy
from edgesafe.align.watch import Watch, open_watch
from edgesafe.checkpoint.exit_model import load
from edgesafe.checkpoint.load import bf16_is_fast
from edgesafe.errors import ConfigError, DivergedError
from edgesafe.format.exits import parse_exits
from edgesafe.format.files import digest_folder
from edgesafe.format.targets import check_target, work_folder
from edgesafe.progress import bar


def align(model_dir: Path, config: AlignConfig, out: Path, *, resume: bool = False) -> Path:
    """Align a checkpoint and write it.

    Args:
        model_dir: checkpoint folder.
        config: settings; `config.data` names the data folder.
        out: new folder; `<out>.partial` holds metrics and checkpoints while it runs.
        resume: go on from the last checkpoint in `<out>.partial`.

    Returns:
        `out`: the checkpoint in its parent's dtype, metrics.jsonl, and edgesafe.json with parent, config and versions.

    Raises:
        ConfigError: exits or layers that the model does not have, or nothing to resume.
        InputError: `out` exists, or the data can't be used.
        AlignError: a reward that is not finite, or no pairs for `l-dpo`.
        DivergedError: a loss or KL that is not finite or beyond limits; the last checkpoint stays in `<out>.partial`.
    """
    place = check_target(out, model=model_dir, known=files.WORK)
    began = time.perf_counter()
    partial = work_folder(place)
    t = prepare(model_dir, config)
    if t.accelerator.is_main_process:
        if not resume and partial.exists():
            if done := files.done_updates(partial):
                print(f"  starting over; --resume would go on after update {done}", file=sys.stderr, flush=True)
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
    t.accelerator.wait_for_everyone()
    main = t.accelerator.is_main_process
    start = files.load_checkpoint(partial, t.identity, t.params, t.optimizer, t.state, main=main) if resume else 0
    train(t, partial, start)
    model, weights = t.llava.model, None
    with t.gathered():
        if t.peft is not None:
            t.peft.merge_and_unload()
        if t.sharded:  # else they would be dealt out again before they are written
            weights = {name: p.detach().to("cpu", t.llava.stored, copy=True) for name, p in model.named_parameters()}
            with torch.device("meta"):
                model = type(model)(model.config)
    t.accelerator.wait_for_everyone()
    if t.accelerator.is_main_process:
        record = _record(t) | {"seconds": round(time.perf_counter() - began, 1)}
        files.write_model(model.to(t.llava.stored), model_dir, partial, record, weights)
        os.replace(partial, place)
    t.accelerator.wait_for_everyone()
    return out


def _record(t: Trainer) -> dict[str, Any]:
    return {
        "step": "align",
        **t.identity,
        "exits": list(t.exits),
        "reference_depth": t.llava.reference_depth,
        "seed": t.config.seed,
        "versions": files.versions(),
        "threads": torch.get_num_threads(),
        "processes": t.world,
        "tokens": t.tokens,
        "chosen": {k: v for k, v in t.state.get("best", {}).items() if k != "params"},
    }


def prepare(model_dir: Path, config: AlignConfig) -> Trainer:
    """Load model and data, and make the language model trainable without changing what it says."""
    if config.precision == "auto":
        fast = torch.cuda.is_available() or bf16_is_fast()
        config = replace(config, precision="bf16" if fast else "fp32")
    if not config.data:
        raise ConfigError("no training data", where="data", expected="a folder of training rows", todo="name one with --data")
    torch.manual_seed(config.seed)
    # `precision` alone says what is computed in bfloat16, whatever a person's own accelerate config has.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    _check_processes(config, accelerator.num_processes)
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    _check_wrapper(accelerator.distributed_type, getattr(plugin, "fsdp_version", 0), config.optimizer)
    llava = load(model_dir)
    parts = (llava.language, llava.model.lm_head)
    config = with_tune(config, sum(p.numel() for part in parts for p in part.parameters()))
    # On CPUs the backward pass of sdpa is slower than the plain one in bfloat16, and faster in float32.
    slow = config.precision == "bf16" and accelerator.device.type == "cpu"
    llava.model.set_attn_implementation("eager" if slow else "sdpa")
    exits = parse_exits(config.exits, llava.n_blocks)
    examples = read_examples(Path(config.data), llava)
    watch = open_watch(config.eval, (*exits, llava.reference_depth))
    reward = open_reward(config.reward) if config.method in (L_PPO, L_DPO) else None
    policy, peft, frozen = make_policy(llava, config, value=config.method == L_PPO)
    optimizer = make_optimizer(config, [p for p in policy.parameters() if p.requires_grad])
    policy, optimizer = accelerator.prepare(policy, optimizer)
    for module in frozen or ():
        module.to(accelerator.device)
    shown = asdict(config)  # folders by name: a record must not depend on where a machine keeps them
    shown["data"], shown["eval"]["suite"] = Path(config.data).name, Path(config.eval.suite).name
    if Path(config.reward.model).is_dir():
        shown["reward"]["model"] = Path(config.reward.model).name
    identity = {
        "parent": {"kind": "checkpoint", "name": model_dir.name, "digest": digest_folder(model_dir)},
        "data": digest_folder(Path(config.data)),
        "config": shown,
        **({} if reward is None else {"reward": reward.identity}),  # a folder of the same name may hold another model
    }
    params = [p for p in policy.parameters() if p.requires_grad]
    return Trainer(
        llava, accelerator, policy, peft, frozen, config, examples, exits, params, optimizer, identity, watch, reward=reward
    )


def _check_processes(config: AlignConfig, processes: int) -> None:
    """Every process gets as many rows as the others, and some in each minibatch, so that all wait for each other equally
    often."""
    for key in ("batch_size", "reference_rows"):
        if getattr(config, key) % processes:
            raise ConfigError(
                f"{key} = {getattr(config, key)} does not divide among {processes} processes",
                where=key,
                expected=f"a multiple of {processes}",
                todo="change it, or start another number of processes",
            )
    rows = (config.batch_size + config.reference_rows) // processes
    if config.method == L_PPO and config.ppo.minibatches > rows:
        raise ConfigError(
            f"ppo.minibatches = {config.ppo.minibatches} with {rows} rows a process",
            where="ppo.minibatches",
            expected="at most the rows that a process has of an update",
            todo="lower it, or start fewer processes",
        )


def _check_wrapper(kind: str, version: int, optimizer: str) -> None:
    """Whole copies of the model, or FSDP of version 2, whose parts can be gathered for a while; Muon needs whole matrices."""
    if kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        return
    if kind != DistributedType.FSDP or version != 2 or optimizer == MUON:
        raise ConfigError(
            f"accelerate is set to {str(kind).rpartition('.')[2]} (version {version}), the optimizer is {optimizer}",
            where="accelerate",
            expected="data parallel, or FSDP of version 2 with adamw",
            todo='use the shipped configs/accelerate/fsdp.yaml and optimizer = "adamw"',
        )


def train(t: Trainer, partial: Path, start: int) -> None:
    """Run the updates from `start` on; metrics and checkpoints go to `partial`. Ends with the chosen weights in place."""
    config, main = t.config, t.accelerator.is_main_process
    if config.method == L_DPO:
        t.pairs = l_dpo.find_pairs(t)
    if t.watch and config.eval.choose and "before" not in t.state:
        with t.gathered(), t.untouched():
            t.state["before"] = t.watch.look(t.llava)[str(t.llava.reference_depth)]
    everything = _whole_run_features(t, start)
    t.tokens = int(t.state.get("tokens", t.tokens))  # a resumed run has just counted the work above a second time
    updates = range(start, config.steps)
    for number in bar(updates, len(updates), f"align ({config.method})") if main else updates:
        began = time.perf_counter()
        depth, rows = draw_update(t, number)
        features = everything or _features(t, merge_needs(_wanted(t, depth, rows)))
        try:
            figures = _update(t, features, depth, rows, number)
        except DivergedError as error:
            raise _diverged(error, partial) from error
        line: dict[str, Any] = {
            "update": number,
            "exit_depth": depth,
            **figures,
            "tokens": t.tokens,
            "seconds": round(time.perf_counter() - began, 4),
        }
        if t.watch and (number + 1) % config.eval.every == 0:
            line["eval"] = _look(t, t.watch, number)
        if main:
            _write_line(partial, line)
        if config.eval.patience and t.state.get("looks_since_best", 0) >= config.eval.patience:
            break  # before a checkpoint: a run resumed behind this update would make one more
        if (number + 1) % config.checkpoint_every == 0 and number + 1 < config.steps:
            t.state["tokens"] = t.tokens
            files.save_checkpoint(partial, number + 1, t.identity, t.params, t.optimizer, t.state, main=main)
    if "best" in t.state:
        with torch.no_grad():
            for p, best in zip(t.params, t.state["best"]["params"], strict=True):
                p.copy_(files.placed(best, p))


def _write_line(partial: Path, line: dict[str, Any]) -> None:
    with (partial / files.METRICS).open("a", encoding="utf-8") as metrics:
        metrics.write(json.dumps(line) + "\n")


def _look(t: Trainer, watch: Watch, number: int) -> dict[str, dict[str, float]]:
    """Look at the model; remember the weights where they are the best so far, and each exit's harm for the sampler."""
    with t.gathered():
        seen = watch.look(t.llava)
    # Processes may break a tie between two tokens differently; what is drawn and when to stop must not differ.
    seen = broadcast_object_list([seen])[0] if t.world > 1 else seen
    t.state["harm"] = {d: seen[str(d)]["harmful"] for d in t.exits}
    if t.config.eval.choose:
        worst = watch.worst_harm(seen, t.state["before"], t.config.eval, t.llava.reference_depth)
        best = t.state.get("best", {"worst_harm": float("inf")})
        t.state["looks_since_best"] = t.state.get("looks_since_best", 0) + 1
        if worst is not None and worst < best["worst_harm"]:
            params = [p.detach().clone() for p in t.params]
            t.state |= {"best": {"update": number, "worst_harm": worst, "params": params}, "looks_since_best": 0}
    return seen


def draw_update(t: Trainer, number: int) -> tuple[int, list[int]]:
    """Exit depth and row numbers of an update; for `l-dpo` the rows of its pairs, which only exits with pairs have."""
    config, exits = t.config, tuple(d for d in t.exits if not t.pairs or d in t.pairs)
    depth = draw_depth(config, exits, exit_shares(config, exits, t.llava.reference_depth, t.state.get("harm")), number)
    if t.pairs:
        return depth, [p.row for p in _draw_pairs(t, depth, number)]
    return depth, draw_rows(config.seed, len(t.examples), config.batch_size, number)


def _draw_pairs(t: Trainer, depth: int, number: int) -> list[l_dpo.Pair]:
    some = t.pairs[depth]
    return [some[i] for i in draw_rows(t.config.seed + depth, len(some), t.config.batch_size, number)]


def _wanted(t: Trainer, depth: int, rows: list[int]) -> list[tuple[int, list[int]]]:
    """Which rows an update reads at which depth: all at the exit, the first `reference_rows` at the reference depth too."""
    return [(depth, rows), (t.llava.reference_depth, rows[: t.config.reference_rows])]


def _update(t: Trainer, features: Features, depth: int, rows: list[int], number: int) -> dict[str, float]:
    """One update of the policy."""
    for group in t.optimizer.param_groups:
        group["lr"] = learning_rate(t.config, number)
    t.policy.train()
    if t.config.method == L_PPO:
        figures = ppo_update(t, features, depth, rows, number)
    else:
        if t.config.method == L_DPO:
            loss, figures = l_dpo.dpo_loss(t, features, depth, _draw_pairs(t, depth, number))
        else:
            loss, figures = supervised.update_loss(t, features, depth, rows)
        figures = t.descend(loss, f"update {number}, exit depth {depth}") | figures
    return {**figures, "lr": learning_rate(t.config, number)}


def _diverged(error: DivergedError, partial: Path) -> DivergedError:
    """The error with the run's folder and what is left of the run."""
    kept = files.done_updates(partial)
    todo = error.todo + (f"; the checkpoint after update {kept} is kept" if kept else "")
    return DivergedError(error.what, where=str(partial), expected=error.expected, todo=todo)


def _whole_run_features(t: Trainer, start: int) -> Features | None:
    """Features of all updates, or None where they would not fit into `cache_gib` or the draws depend on looks to come.

    A resumed run computes those of the updates that it skips too: rows must sit in the same chunks for the same bits.
    """
    if start >= t.config.steps or t.config.sampler == HARM:
        return None
    need = merge_needs(one for number in range(t.config.steps) for one in _wanted(t, *draw_update(t, number)))
    if size_gib(t.llava, t.examples, need, teacher=_taught(t)) > t.config.cache_gib:
        return None
    return _features(t, need, label="tower and teacher" if _taught(t) else "tower")


def _features(t: Trainer, need: dict[int, frozenset[int]], label: str = "") -> Features:
    chunks = plan(need, t.examples, chunk_of(t.llava))
    t.policy.eval()
    if _taught(t):
        t.tokens += sum(len(t.examples[row].prompt) + len(t.examples[row].answer) for row in need)
    with t.gathered(), t.untouched():
        return compute(
            t.llava,
            t.examples,
            need,
            teacher=_taught(t),
            precision=t.config.precision,
            chunks=bar(chunks, len(chunks), label) if label and t.accelerator.is_main_process else chunks,
        )


def _taught(t: Trainer) -> bool:
    return t.config.method == SELF_DISTILL
