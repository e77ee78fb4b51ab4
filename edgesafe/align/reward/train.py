"""`edgesafe reward-model`: train a reward model on preference pairs, -log sigmoid(r_chosen - r_rejected).

Pairs and dropout of an update depend on the seed and its number alone, so a resumed run repeats an uninterrupted one. It trains
on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgesafe.align import files
from edgesafe.align.reward.model import encode, longest, read_scores, readable, set_padding, shown, stamp
from edgesafe.align.reward.preferences import Pair, in_validation, read_pairs
from edgesafe.certify.stats import wilson
from edgesafe.errors import ConfigError, DivergedError, InputError
from edgesafe.format.files import sha256_file, write_atomically
from edgesafe.format.targets import check_target, work_folder
from edgesafe.progress import bar, step

BEST = "best.pt"
WARMUP = 0.1  # share of the updates that lead up to the highest learning rate
LOOKS = 10  # looks at the validation pairs, and checkpoints, of a run


@dataclass(frozen=True)
class RewardTraining:
    """Settings of a reward model's training.

    epochs: passes over the training pairs. lr: highest learning rate. batch_size: pairs an update.
    max_length: most tokens of a dialogue; a longer one is refused, not cut. seed: of the head, the order and the dropout.
    val_share: share of the prompts whose pairs validate; 0 keeps the last weights instead of the best.
    skip_bad: leave out lines that can't be used.
    """

    epochs: int = 1
    lr: float = 1e-5
    batch_size: int = 16
    max_length: int = 512
    val_share: float = 0.05
    seed: int = 0
    skip_bad: bool = False


@dataclass
class RewardRun:
    """A run: what it is made from, and the model and optimizer that change."""

    model: Any
    tokenizer: Any
    config: RewardTraining
    train: list[Pair]
    val: list[Pair]
    params: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    identity: dict[str, Any]

    @property
    def steps(self) -> int:
        """Updates of the run."""
        return math.ceil(len(self.train) * self.config.epochs / self.config.batch_size)

    @property
    def every(self) -> int:
        """Updates between two looks and checkpoints."""
        return max(1, self.steps // LOOKS)


def pair_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean of -log sigmoid(r_chosen - r_rejected).

    Args:
        chosen: [pairs] scores of the preferred answers.
        rejected: [pairs] scores of the others.

    Source: METHOD.md, L-PPO's reward model; Ouyang et al. 2022 (2203.02155) equation 1.

    >>> round(pair_loss(torch.tensor([1.0]), torch.tensor([1.0])).item(), 4)
    0.6931
    """
    return -F.logsigmoid(chosen - rejected).mean()


def pair_scores(model: Any, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and of the rejected answers, each [pairs], from one pass."""
    scores = read_scores(model, [*(p.chosen for p in pairs), *(p.rejected for p in pairs)])
    return scores[: len(pairs)], scores[len(pairs) :]


def draw_pairs(config: RewardTraining, pairs: int, number: int) -> list[int]:
    """The pairs of update `number`: one shuffle of all after the other; the last update of a run may hold fewer.

    >>> config = RewardTraining(batch_size=2, epochs=1)
    >>> sorted(draw_pairs(config, 3, 0) + draw_pairs(config, 3, 1))
    [0, 1, 2]
    """
    first = number * config.batch_size
    places = range(first, min(first + config.batch_size, pairs * config.epochs))
    orders = {e: np.random.default_rng([config.seed, 3, e]).permutation(pairs) for e in {p // pairs for p in places}}
    return [int(orders[place // pairs][place % pairs]) for place in places]


def learning_rate(config: RewardTraining, steps: int, number: int) -> float:
    """Linear warm-up, then linear to a tenth.

    >>> [round(learning_rate(RewardTraining(lr=1.0), 100, n), 2) for n in (0, 9, 10, 55, 99)]
    [0.1, 1.0, 1.0, 0.55, 0.11]
    """
    warm = max(1, round(WARMUP * steps))
    if number < warm:
        return config.lr * (number + 1) / warm
    return config.lr * (1 - 0.9 * (number - warm) / max(1, steps - warm))


def train_reward_model(base: str, data: Path, config: RewardTraining, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train a reward model and write it.

    Args:
        base: folder or hub id of a causal or a sequence-classification checkpoint; its head is drawn anew where it has none
            with one label.
        data: JSON lines of pairs, plain or gzipped.
        config: settings.
        out: new folder; `<out>.partial` holds metrics, checkpoint and best weights while it runs.
        resume: go on from the last checkpoint in `<out>.partial`.

    Returns:
        The record that is written to `out`/edgesafe.json beside the checkpoint and metrics.jsonl.

    Raises:
        ConfigError: settings out of range, a base that can't be used, or nothing to resume.
        InputError: `out` exists, or the pairs can't be used.
        DivergedError: a loss or gradient that is not finite; the last checkpoint stays in `<out>.partial`.
    """
    place = check_target(out, model=base, known=files.WORK)
    partial = work_folder(place)
    run = prepare(base, data, config)
    if not resume and partial.exists():
        if done := files.done_updates(partial):
            print(f"  starting over; --resume would go on after update {done}", file=sys.stderr, flush=True)
        shutil.rmtree(partial)
    start = files.load_checkpoint(partial, run.identity, run.params, run.optimizer) if resume else 0
    partial.mkdir(parents=True, exist_ok=True)
    train(run, partial, start)
    record = write(run, partial)
    os.replace(partial, place)
    return record


def prepare(base: str, data: Path, config: RewardTraining) -> RewardRun:
    """Load base and pairs; the head is drawn from the seed."""
    _check(config)
    torch.manual_seed(config.seed)
    model, tokenizer = open_base(base)
    if config.max_length > longest(model, tokenizer):
        raise ConfigError(
            f"max_length = {config.max_length} is out of range",
            where=base,
            expected=f"at most {longest(model, tokenizer)} tokens, which is what the model reads",
            todo="lower --max-length",
        )
    pairs, skipped = read_pairs(data, lambda turns: encode(tokenizer, turns), config.max_length, skip_bad=config.skip_bad)
    train = [pair for pair in pairs if not in_validation(pair.prompt, config.val_share)]
    val = [pair for pair in pairs if in_validation(pair.prompt, config.val_share)]
    if not train or (config.val_share and not val):
        raise InputError(
            f"{len(train)} pairs train and {len(val)} validate",
            where=str(data),
            expected="some of both",
            todo="bring pairs with more prompts, or another --val-share (0: no validation)",
        )
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=config.lr, weight_decay=0.0)
    identity = {
        "parent": {"kind": "checkpoint", "name": shown(base), **stamp(base, model)},
        "data": sha256_file(data),
        "config": asdict(config),
        "pairs": {"train": len(train), "val": len(val), "skipped": skipped},
    }
    return RewardRun(model, tokenizer, config, train, val, params, optimizer, identity)


def open_base(base: str) -> tuple[Any, Any]:
    """A checkpoint as a model with one label, in float32, and its tokenizer.

    Raises:
        ConfigError: it can't be fetched or read, is of a kind without a classification head, or weights other than the
            head's are missing.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with readable(base):
        tokenizer = AutoTokenizer.from_pretrained(base)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    absent = {str(key) for key in info["missing_keys"]} | {str(key[0]) for key in info["mismatched_keys"]}
    inside = sorted(key for key in absent if key.startswith(f"{model.base_model_prefix}."))
    if inside:
        raise ConfigError(
            f"{len(inside)} weights are missing or of another shape, e.g. {inside[0]}",
            where=base,
            expected="a whole checkpoint",
        )
    set_padding(model, tokenizer, base)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def train(run: RewardRun, partial: Path, start: int) -> None:
    """Run the updates from `start` on; metrics, checkpoints and the best weights go to `partial`."""
    best = min(past_looks(partial), default=(math.inf, 0))[0]
    with (partial / files.METRICS).open("a", encoding="utf-8") as metrics:
        for number in bar(range(start, run.steps), run.steps - start, "reward model"):
            began = time.perf_counter()
            line: dict[str, Any] = {"update": number, **_update(run, number, partial)}
            looking = (number + 1) % run.every == 0 or number + 1 == run.steps
            if looking and run.val:
                line["val"] = look(run)
                _finite(partial, f"validation loss {line['val']['loss']} after update {number}", line["val"]["loss"])
                if line["val"]["loss"] < best:
                    best = line["val"]["loss"]
                    _keep(run, partial, number + 1)
            line["seconds"] = round(time.perf_counter() - began, 4)
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            if looking and number + 1 < run.steps:
                files.save_checkpoint(partial, number + 1, run.identity, run.params, run.optimizer)


def _update(run: RewardRun, number: int, partial: Path) -> dict[str, float]:
    """One update; nothing moves where the loss or its gradient is not finite."""
    lr = learning_rate(run.config, run.steps, number)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.model.train()
    torch.manual_seed(int(np.random.default_rng([run.config.seed, 4, number]).integers(2**62)))  # of the dropout, on any device
    run.optimizer.zero_grad(set_to_none=True)
    chosen, rejected = pair_scores(run.model, [run.train[i] for i in draw_pairs(run.config, len(run.train), number)])
    loss = pair_loss(chosen, rejected)
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(run.params, 1.0))
    value = loss.item()
    _finite(partial, f"loss {value:g}, gradient norm {norm:g} at update {number}", value, norm)
    run.optimizer.step()
    return {"loss": value, "accuracy": (chosen > rejected).float().mean().item(), "grad_norm": norm, "lr": lr}


def _finite(partial: Path, what: str, *values: float) -> None:
    if all(map(math.isfinite, values)):
        return
    kept = files.done_updates(partial)
    raise DivergedError(
        what,
        where=str(partial),
        expected="finite numbers",
        todo="run again with a lower --lr" + (f"; the checkpoint after update {kept} is kept" if kept else ""),
    )


@torch.no_grad()
def look(run: RewardRun) -> dict[str, float | int]:
    """Loss and accuracy on the validation pairs; a tie is no right answer."""
    run.model.eval()
    total, right = 0.0, 0
    for start in range(0, len(run.val), run.config.batch_size):
        chosen, rejected = pair_scores(run.model, run.val[start : start + run.config.batch_size])
        total += pair_loss(chosen, rejected).item() * len(chosen)
        right += int((chosen > rejected).sum())
    return {"loss": total / len(run.val), "accuracy": right / len(run.val), "k": right, "n": len(run.val)}


def past_looks(partial: Path) -> list[tuple[float, int, int]]:
    """Validation loss, updates done and right pairs of every look in the metrics."""
    path = partial / files.METRICS
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return [(line["val"]["loss"], line["update"] + 1, line["val"]["k"]) for line in lines if "val" in line]


def write(run: RewardRun, partial: Path) -> dict[str, Any]:
    """Write the best weights, the tokenizer and the record of where they come from."""
    record: dict[str, Any] = {
        "step": "reward-model",
        **run.identity,
        "seed": run.config.seed,
        "updates": run.steps,
        "versions": files.versions(),
        "threads": torch.get_num_threads(),
    }
    if run.val:
        loss, update, right = min(past_looks(partial))
        low, high = wilson(right, len(run.val))
        record["val"] = {"loss": loss, "accuracy": right / len(run.val), "lower_95": low, "upper_95": high, "update": update}
        best = torch.load(partial / BEST, weights_only=True)
        with torch.no_grad():
            for p, kept in zip(run.params, best["params"], strict=True):
                p.copy_(kept)
    with files.disk_full_is_oserror(partial):
        run.model.save_pretrained(partial)
    run.tokenizer.save_pretrained(partial)
    write_atomically(partial / files.RECORD, (json.dumps(record, indent=1) + "\n").encode())
    for name in (BEST, files.CHECKPOINT):
        (partial / name).unlink(missing_ok=True)
    return record


def _keep(run: RewardRun, partial: Path, done: int) -> None:
    buffer = io.BytesIO()  # through memory, for the same reason as files.save_checkpoint
    torch.save({"done": done, "params": [p.detach() for p in run.params]}, buffer)
    write_atomically(partial / BEST, buffer.getvalue())


def _check(c: RewardTraining) -> None:
    limits = {
        "epochs": (c.epochs >= 1, c.epochs, "at least 1"),
        "lr": (0 < c.lr < 1, c.lr, "above 0 and below 1"),
        "batch-size": (c.batch_size >= 1, c.batch_size, "at least 1"),
        "max-length": (c.max_length >= 1, c.max_length, "at least 1"),
        "val-share": (0 <= c.val_share < 1, c.val_share, "a share of the prompts, 0..1"),
        "seed": (c.seed >= 0, c.seed, "at least 0"),
    }
    for key, (fine, value, expected) in limits.items():
        if not fine:
            raise ConfigError(f"--{key} = {value!r} is out of range", where=f"--{key}", expected=expected, todo="mend it")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe reward-model`."""
    default = RewardTraining()
    parser.add_argument("base", help="folder or hub id of a causal or classification checkpoint to start from, e.g. a GPT-2")
    parser.add_argument(
        "--data", type=Path, required=True, help='JSON lines {"prompt", "chosen", "rejected"}, or HH-RLHF\'s own; may be .gz'
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder for the reward model")
    for name, kind, text in (
        ("epochs", int, "passes over the training pairs"),
        ("lr", float, "highest learning rate"),
        ("batch-size", int, "pairs an update"),
        ("max-length", int, "most tokens of a dialogue"),
        ("val-share", float, "share of the prompts kept for validation; 0 = none"),
        ("seed", int, "of the head, the order and the dropout"),
    ):
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=kind, default=value, metavar="N", help=f"{text} ({value})")
    parser.add_argument("--skip-bad", action="store_true", help="leave out lines that can't be used, and say how many")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of an interrupted run")
    parser.add_argument("--json", action="store_true", help="print the record as JSON")


def run_command(args: argparse.Namespace) -> int:
    """Run `edgesafe reward-model`; returns the exit code."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    config = RewardTraining(**{f.name: getattr(args, f.name) for f in fields(RewardTraining)})
    with step(f"train a reward model from {args.base} on {args.data}"):
        record = train_reward_model(args.base, args.data, config, args.out, resume=args.resume)
    print(json.dumps(record) if args.json else _summary(record, args.out))
    return 0


def _summary(record: dict[str, Any], out: Path) -> str:
    pairs, val = record["pairs"], record.get("val")
    lines = [f"{pairs['train']} pairs trained, {pairs['val']} validated, {pairs['skipped']} lines left out", str(out)]
    if val:
        low, high = 100 * val["lower_95"], 100 * val["upper_95"]
        said = f"validation accuracy {100 * val['accuracy']:.1f} % [{low:.1f}, {high:.1f}], loss {val['loss']:.4f}"
        lines.insert(1, f"{said}, after update {val['update']} of {record['updates']}")
    return "\n".join(lines)
