"""The alignment loop: each update draws one exit, and the reference is in the batch.

Frozen: vision tower and projector. Trained: LoRA factors on the language model, merged into the written checkpoint, or all of
    the language model. Exit and rows of an update depend on the seed, its number and earlier validation passes alone, so a
    resumed run repeats an uninterrupted one. What an update does is the objective's (`edgesafe.align.objectives`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from edgesafe.align import files
from edgesafe.align.features import Features, Need, chunk_of, compute, merge_needs, plan, size_gib
from edgesafe.align.map_exits import map_exits
from edgesafe.align.policy import learning_rate
from edgesafe.align.prepare import prepare
from edgesafe.align.sampler import draw_exit, draw_rows, exit_shares
from edgesafe.align.settings import HARM, AlignConfig
from edgesafe.align.trainer import Trainer
from edgesafe.align.watch import Watch
from edgesafe.checkpoint.exit_maps import detach
from edgesafe.errors import DivergedError
from edgesafe.format.exits import Exit
from edgesafe.format.targets import check_target, work_folder
from edgesafe.progress import bar

_A_TOKEN = 1_000_003  # between the seeds of exits of one depth


def align(model_dir: Path, config: AlignConfig, out: Path, *, resume: bool = False) -> Path:
    """Align a checkpoint and write it.

    Args:
        model_dir: checkpoint folder.
        config: settings; `config.data` names the data folder.
        out: new folder; `<out>.partial` holds metrics and checkpoints while it runs.
        resume: continue from the last checkpoint in `<out>.partial`.

    Returns:
        `out`: the checkpoint in its parent's dtype, metrics.jsonl, and edgesafe.json with parent, config and versions.

    Raises:
        ConfigError: an unknown method, exits or layers that the model does not have, or nothing to resume.
        InputError: `out` exists, or the data can't be used.
        AlignError: a reward that is not finite, or no pairs for `l-dpo`.
        DivergedError: a loss or KL that is not finite or beyond limits; the last checkpoint stays in `<out>.partial`.
    """
    place = _place(out, model_dir)
    began = time.perf_counter()
    partial = work_folder(place)
    t = prepare(model_dir, config)
    main = t.accelerator.is_main_process
    if main and not resume:
        files.start_over(partial)
    t.accelerator.wait_for_everyone()
    start = files.load_checkpoint(partial, t.identity, t.params, t.optimizer, t.state, main=main) if resume else 0
    map_exits(t, Path(config.data), partial)
    train(t, partial, start)
    maps = detach(t.llava.model)
    model, weights = _merged(t)
    t.accelerator.wait_for_everyone()
    if main:
        record = _record(t) | {"seconds": round(time.perf_counter() - began, 1)}
        files.write_model(model.to(t.llava.stored), model_dir, partial, record, weights, maps)
        os.replace(partial, place)
    t.accelerator.wait_for_everyone()
    return out


def _place(out: Path, model_dir: Path) -> Path:
    """Where `out` will lie. Of several processes the first checks it: the others would trip over what its trial makes there.

    It is asked before a process group exists, so its rank is the launcher's word for it. Where it refuses, the launcher ends
    the others.
    """
    if os.environ.get("RANK", "0") != "0":
        return Path(os.path.realpath(out))
    return check_target(out, model=model_dir, known=files.WORK)


def _merged(t: Trainer) -> tuple[Any, dict[str, torch.Tensor] | None]:
    """The model to write, its adapter merged in; and its weights by name where they are not the model's own."""
    model = t.llava.model
    with t.gathered():
        if t.peft is not None:
            t.peft.merge_and_unload()
        if not t.sharded:
            return model, None
        # FSDP deals the weights out again when the block ends, before they are written.
        weights = {name: p.detach().to("cpu", t.llava.stored, copy=True) for name, p in model.named_parameters()}
        with torch.device("meta"):
            return type(model)(model.config), weights


def _record(t: Trainer) -> dict[str, Any]:
    return {
        "step": "align",
        **t.identity,
        "exits": [str(exit) for exit in t.exits],
        "reference": str(t.llava.reference),
        "seed": t.config.seed,
        "versions": files.versions(),
        "threads": torch.get_num_threads(),
        "processes": t.world,
        "tokens": t.tokens,
        "chosen": {k: v for k, v in t.state.get("best", {}).items() if k != "params"},
    }


def train(t: Trainer, partial: Path, start: int) -> None:
    """Run the updates from `start` on; metrics and checkpoints go to `partial`. Ends with the chosen weights in place."""
    config, main = t.config, t.accelerator.is_main_process
    t.pools = t.objective.prepare(t)
    if t.watch and config.eval.choose and "before" not in t.state:
        with t.gathered(), t.untouched():
            t.state["before"] = t.watch.validate(t.llava)[str(t.llava.reference)]
    everything = _whole_run_features(t, start)
    t.tokens = int(t.state.get("tokens", t.tokens))  # a resumed run has just counted the work above a second time
    updates = range(start, config.steps)
    for number in bar(updates, len(updates), f"align ({config.method})") if main else updates:
        line = _run_update(t, partial, everything, number)
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


def _run_update(t: Trainer, partial: Path, everything: Features | None, number: int) -> dict[str, Any]:
    """Draw an update, make it, and validate where it is time; returns its line of the metrics."""
    began = time.perf_counter()
    exit, items = draw_update(t, number)
    features = everything or _features(t, merge_needs(_wanted(t, exit, items)))
    try:
        figures = _update(t, features, exit, items, number)
    except DivergedError as error:
        raise _diverged(error, partial) from error
    line: dict[str, Any] = {
        "update": number,
        "exit": str(exit),
        **figures,
        "tokens": t.tokens,
        "seconds": round(time.perf_counter() - began, 4),
    }
    if t.watch and (number + 1) % t.config.eval.every == 0:
        line["eval"] = _validate(t, t.watch, number)
    return line


def _write_line(partial: Path, line: dict[str, Any]) -> None:
    with (partial / files.METRICS).open("a", encoding="utf-8") as metrics:
        metrics.write(json.dumps(line) + "\n")


def _validate(t: Trainer, watch: Watch, number: int) -> dict[str, dict[str, float]]:
    """Rates by exit; keeps the weights where they are the best so far, and each exit's harm for the sampler."""
    with t.gathered():
        rates = watch.validate(t.llava)
    # Processes may break a tie between two tokens differently; what is drawn and when to stop must not differ.
    rates = broadcast_object_list([rates])[0] if t.world > 1 else rates
    t.state["harm"] = {str(exit): rates[str(exit)]["harmful"] for exit in t.exits}
    if t.config.eval.choose:
        worst = watch.worst_harm(rates, t.state["before"], t.config.eval, t.llava.reference)
        best = t.state.get("best", {"worst_harm": float("inf")})
        # The key's name is in the checkpoints of earlier runs, which must resume.
        t.state["looks_since_best"] = t.state.get("looks_since_best", 0) + 1
        if worst is not None and worst < best["worst_harm"]:
            params = [p.detach().clone() for p in t.params]
            t.state |= {"best": {"update": number, "worst_harm": worst, "params": params}, "looks_since_best": 0}
    return rates


def draw_update(t: Trainer, number: int) -> tuple[Exit, list[Any]]:
    """Exit and items of an update: row numbers, or some of the objective's pool at an exit that has one."""
    config, pools = t.config, t.pools
    exits = t.exits if pools is None else tuple(exit for exit in t.exits if exit in pools)
    # A checkpoint of an earlier run has the depths as numbers.
    harm = {Exit.of(at): rate for at, rate in t.state.get("harm", {}).items()}
    exit = draw_exit(config, exits, exit_shares(config, exits, t.llava.reference, harm), number)
    if pools is None:
        return exit, draw_rows(config.seed, len(t.examples), config.batch_size, number)
    # Another seed for each exit: pools of one size would be drawn from in the same order.
    seed = config.seed + exit.depth + _A_TOKEN * (exit.visual_tokens or 0)
    return exit, [pools[exit][i] for i in draw_rows(seed, len(pools[exit]), config.batch_size, number)]


def _wanted(t: Trainer, exit: Exit, items: Sequence[Any]) -> list[tuple[Exit, list[int]]]:
    """Which rows an update reads at which exit: all at its own, the first `reference_rows` at the reference too."""
    rows = [item if t.pools is None else item.row for item in items]
    return [(exit, rows), (t.llava.reference, rows[: t.config.reference_rows])]


def _update(t: Trainer, features: Features, exit: Exit, items: Sequence[Any], number: int) -> dict[str, float]:
    """One update of the policy, as its objective has it."""
    lr = learning_rate(t.config, number)
    for group in t.optimizer.param_groups:
        group["lr"] = lr
    t.policy.train()
    return {**t.objective.update(t, features, exit, items, number), "lr": lr}


def _diverged(error: DivergedError, partial: Path) -> DivergedError:
    """The error with the run's folder and what is left of the run."""
    kept = files.done_updates(partial)
    todo = error.todo + (f"; the checkpoint after update {kept} is kept" if kept else "")
    return DivergedError(error.what, where=str(partial), expected=error.expected, todo=todo)


def _whole_run_features(t: Trainer, start: int) -> Features | None:
    """Features of all updates, or None where they exceed `cache_gib` or the draws depend on validation passes to come.

    A resumed run computes those of the updates that it skips too: rows must sit in the same chunks for the same bits.
    """
    if start >= t.config.steps or t.config.sampler == HARM:
        return None
    need = merge_needs(one for number in range(t.config.steps) for one in _wanted(t, *draw_update(t, number)))
    teacher = t.objective.needs_teacher
    if size_gib(t.llava, t.examples, need, teacher=teacher) > t.config.cache_gib:
        return None
    return _features(t, need, label="tower and teacher" if teacher else "tower")


def _features(t: Trainer, need: Need, label: str = "") -> Features:
    """The features of some rows; a label shows a progress bar."""
    chunks, teacher = plan(need, t.examples, chunk_of(t.llava)), t.objective.needs_teacher
    t.policy.eval()
    if teacher:
        t.tokens += sum(len(t.examples[row].prompt) + len(t.examples[row].answer) for row in need)
    with t.gathered(), t.untouched():
        return compute(
            t.llava,
            t.examples,
            need,
            teacher=teacher,
            precision=t.config.precision,
            chunks=bar(chunks, len(chunks), label) if label and t.accelerator.is_main_process else chunks,
        )
