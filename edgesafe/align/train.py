"""The alignment loop: each update draws one exit depth, and the reference depth is always in the batch.

Frozen: vision tower and projector. Trained: LoRA factors on the language model, merged into the written checkpoint.
Depth and rows of update `k` depend on the seed and `k` alone, so a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgesafe.align import files
from edgesafe.align.config import SELF_DISTILL, AlignConfig
from edgesafe.align.data import Example, collate, read_examples
from edgesafe.align.features import Features, compute, merge_needs, plan, size_gib
from edgesafe.align.losses import objective, row_weights
from edgesafe.align.model import Llava, answer_logits, autocast, load
from edgesafe.align.watch import Watch, open_watch
from edgesafe.bundle import digest_folder
from edgesafe.checkpoint import bf16_is_fast
from edgesafe.errors import ConfigError, DivergedError, InputError
from edgesafe.exits import parse_exits
from edgesafe.progress import bar


@dataclass
class Trainer:
    """A run: what it is made from, and the adapter and optimizer that change. `peft` wraps `llava.model` in place."""

    llava: Llava
    peft: Any
    config: AlignConfig
    examples: list[Example]
    exits: tuple[int, ...]
    focused: tuple[int, ...]
    params: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    identity: dict[str, Any]
    watch: Watch | None


def focused_exits(config: AlignConfig, exits: tuple[int, ...], reference_depth: int) -> tuple[int, ...]:
    """The exits within `config.focus`; all of them where there is none.

    >>> focused_exits(AlignConfig(focus=(0.4, 0.7)), tuple(range(1, 14)), 12)
    (5, 6, 7, 8)
    """
    low, high = (share * reference_depth for share in config.focus)
    return tuple(d for d in exits if low <= d <= high) or exits


def draw_update(
    config: AlignConfig, exits: tuple[int, ...], focused: tuple[int, ...], rows: int, number: int
) -> tuple[int, list[int]]:
    """Exit depth and row numbers of update `number`, a function of the seed and the number.

    The depth is drawn evenly: from `focused` with the probability `config.focus_share`, else from all exits. Rows are taken
    from one shuffle of all rows after the other, so none is seen twice as often.

    >>> config = AlignConfig(batch_size=2)
    >>> sorted(draw_update(config, (1, 2), (2,), 4, 0)[1] + draw_update(config, (1, 2), (2,), 4, 1)[1])
    [0, 1, 2, 3]
    """
    rng = np.random.default_rng([config.seed, 1, number])
    among = focused if rng.random() < config.focus_share else exits
    depth = among[int(rng.integers(len(among)))]
    first = number * config.batch_size
    picked: list[int] = []
    while len(picked) < config.batch_size:
        epoch, start = divmod(first + len(picked), rows)
        order = np.random.default_rng([config.seed, 2, epoch]).permutation(rows)
        picked += order[start : start + config.batch_size - len(picked)].tolist()
    return depth, picked


def learning_rate(config: AlignConfig, number: int) -> float:
    """Linear warm-up, then a cosine to a tenth.

    >>> learning_rate(AlignConfig(steps=100, warmup=0.1, lr=1e-3), 9)
    0.001
    """
    warm = max(1, round(config.steps * config.warmup))
    if number < warm:
        return config.lr * (number + 1) / warm
    along = (number - warm) / max(1, config.steps - warm)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * along)))


def update_loss(t: Trainer, features: Features, depth: int, rows: list[int]) -> tuple[Tensor, dict[str, float]]:
    """Loss of one update: the rows at the exit, the first `reference_rows` of them also at the reference depth, in one pass.

    The two parts weigh the same.
    """
    config, again = t.config, rows[: t.config.reference_rows]
    batch = collate([t.examples[row] for row in (*rows, *again)], t.llava.pad_id)
    states = torch.cat([features.stack(rows, depth), features.stack(again, t.llava.reference_depth)])
    teacher = features.stack_teacher([*rows, *again])
    with autocast(config.precision):
        logits = answer_logits(t.llava, batch.ids, batch.where, states)
    weight = row_weights(batch.harmful, config.harm_weight)
    total, figures = logits.new_zeros((), dtype=torch.float32), {}
    for name, part in (("exit", slice(0, len(rows))), ("reference", slice(len(rows), None))):
        taught = None if teacher is None else teacher[part]
        loss, terms = objective(logits[part], taught, batch.targets[part], batch.mask[part], weight[part], config.sft_weight)
        total = total + loss / 2
        figures.update({f"{name}_{term}": value for term, value in terms.items()})
    return total, figures


def align(model_dir: Path, config: AlignConfig, out: Path, *, resume: bool = False) -> Path:
    """Align a checkpoint and write the merged one.

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
        DivergedError: a loss that is not finite or beyond `config.max_loss`; the last checkpoint stays in `<out>.partial`.
    """
    if out.exists():
        raise InputError("the output exists already", where=str(out), expected="a new folder", todo="name another --out")
    partial = out.with_name(out.name + ".partial")
    if not resume and partial.exists():
        if done := files.done_updates(partial):
            print(f"  starting over; --resume would go on after update {done}", file=sys.stderr, flush=True)
        shutil.rmtree(partial)
    t = prepare(model_dir, config)
    partial.mkdir(parents=True, exist_ok=True)
    start = files.load_checkpoint(partial, t.identity, t.params, t.optimizer) if resume else 0
    train(t, partial, start)
    t.peft.merge_and_unload()
    record = {
        "step": "align",
        **t.identity,
        "exits": list(t.exits),
        "reference_depth": t.llava.reference_depth,
        "seed": t.config.seed,
        "versions": files.versions(),
        "threads": torch.get_num_threads(),
    }
    files.write_model(t.llava.model.to(t.llava.stored), model_dir, partial, record)
    partial.replace(out)
    return out


def prepare(model_dir: Path, config: AlignConfig) -> Trainer:
    """Load model and data, and put an adapter on the language model that does nothing yet."""
    import peft

    if config.precision == "auto":
        config = replace(config, precision="bf16" if bf16_is_fast() else "fp32")
    if not config.data:
        raise ConfigError("no training data", where="data", expected="a folder of training rows", todo="name one with --data")
    torch.manual_seed(config.seed)
    llava = load(model_dir)
    # On CPUs the backward pass of sdpa is slower than the plain one in bfloat16, and faster in float32.
    llava.model.set_attn_implementation("eager" if config.precision == "bf16" else "sdpa")
    exits = parse_exits(config.exits, llava.n_blocks)
    examples = read_examples(Path(config.data), llava)
    watch = open_watch(config.eval, (*exits, llava.reference_depth))
    lora = config.lora
    wrapped = peft.get_peft_model(
        llava.model,
        peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            bias="none",
            target_modules=target_modules(llava, lora.targets),
        ),
    )
    params = [p for p in wrapped.parameters() if p.requires_grad]
    # Every trained parameter is a matrix, as Muon wants them.
    optimizer = torch.optim.Muon(params, lr=config.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    shown = asdict(config)  # folders by name: a record must not depend on where a machine keeps them
    shown["data"], shown["eval"]["suite"] = Path(config.data).name, Path(config.eval.suite).name
    identity = {
        "parent": {"kind": "checkpoint", "name": model_dir.name, "digest": digest_folder(model_dir)},
        "data": digest_folder(Path(config.data)),
        "config": shown,
    }
    focused = focused_exits(config, exits, llava.reference_depth)
    return Trainer(llava, wrapped, config, examples, exits, focused, params, optimizer, identity, watch)


def target_modules(llava: Llava, targets: tuple[str, ...]) -> list[str]:
    """Full names of the language model's layers that end in one of `targets`; the tower has layers of the same names.

    Raises:
        ConfigError: a target that the language model does not have.
    """
    inside = [name for name, _ in llava.model.named_modules() if ".language_model." in name]
    for target in targets:
        if not any(name.split(".")[-1] == target for name in inside):
            raise ConfigError(
                f"the language model has no layer {target!r}",
                where="lora.targets",
                expected="names of its linear layers",
                todo="q_proj, k_proj, v_proj, o_proj, gate_proj, ...",
            )
    return [name for name in inside if name.split(".")[-1] in targets]


def train(t: Trainer, partial: Path, start: int) -> None:
    """Run the updates from `start` on; metrics and checkpoints go to `partial`."""
    config = t.config
    everything = _whole_run_features(t, start)
    with (partial / files.METRICS).open("a", encoding="utf-8") as metrics:
        for number in bar(range(start, config.steps), config.steps - start, "align"):
            began = time.perf_counter()
            depth, rows = draw_update(config, t.exits, t.focused, len(t.examples), number)
            features = everything or _features(t, {row: frozenset({depth}) for row in rows})
            figures = _update(t, features, depth, rows, number, partial)
            line: dict[str, Any] = {
                "update": number,
                "exit_depth": depth,
                **figures,
                "seconds": round(time.perf_counter() - began, 4),
            }
            if t.watch and (number + 1) % config.eval.every == 0:
                line["eval"] = t.watch.look(t.llava)
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            if (number + 1) % config.checkpoint_every == 0 and number + 1 < config.steps:
                files.save_checkpoint(partial, number + 1, t.identity, t.params, t.optimizer)


def _update(t: Trainer, features: Features, depth: int, rows: list[int], number: int, partial: Path) -> dict[str, float]:
    """One update of the adapter; nothing moves where the loss or its gradient is beyond bounds."""
    lr = learning_rate(t.config, number)
    for group in t.optimizer.param_groups:
        group["lr"] = lr
    t.peft.train()
    t.optimizer.zero_grad(set_to_none=True)
    loss, figures = update_loss(t, features, depth, rows)
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(t.params, 1.0))
    value = loss.item()
    if not (math.isfinite(value) and math.isfinite(norm)) or value > t.config.max_loss:
        kept = files.done_updates(partial)
        raise DivergedError(
            f"loss {value:g}, gradient norm {norm:g} at update {number}, exit depth {depth}",
            where=str(partial),
            expected=f"a finite loss of at most {t.config.max_loss:g}",
            todo="run again with a lower lr" + (f"; the checkpoint after update {kept} is kept" if kept else ""),
        )
    t.optimizer.step()
    return {"loss": value, **figures, "grad_norm": norm, "lr": lr}


def _whole_run_features(t: Trainer, start: int) -> Features | None:
    """Features of all updates, or None where they would not fit into `cache_gib`.

    A resumed run computes those of the updates that it skips too: rows must sit in the same chunks for the same bits.
    """
    updates = range(t.config.steps)
    need = merge_needs(draw_update(t.config, t.exits, t.focused, len(t.examples), n) for n in updates)
    if start >= t.config.steps or size_gib(t.llava, t.examples, need, teacher=_taught(t)) > t.config.cache_gib:
        return None
    return _features(t, need, label="tower and teacher")


def _features(t: Trainer, need: dict[int, frozenset[int]], label: str = "") -> Features:
    chunks = plan(need, t.examples)
    t.peft.eval()
    with t.peft.disable_adapter():
        return compute(
            t.llava,
            t.examples,
            need,
            teacher=_taught(t),
            precision=t.config.precision,
            chunks=bar(chunks, len(chunks), label) if label else chunks,
        )


def _taught(t: Trainer) -> bool:
    return t.config.method == SELF_DISTILL
