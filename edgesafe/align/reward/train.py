"""`edgesafe reward-model`: train a reward model on preference pairs, -log sigmoid(r_chosen - r_rejected).

Pairs and dropout of an update depend on the seed and its number alone, so a resumed run repeats an uninterrupted one. It trains
on a GPU where there is one.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgesafe.align import files
from edgesafe.align.reward.model import encode, read_scores, set_padding
from edgesafe.align.reward.preferences import Pair, in_validation, read_pairs
from edgesafe.align.reward.settings import RewardTraining, check
from edgesafe.certify.stats import wilson
from edgesafe.checkpoint.text_models import content_id, context_length, display_name, read_errors
from edgesafe.errors import ConfigError, DivergedError, InputError
from edgesafe.format.files import sha256_file, write_atomically
from edgesafe.format.targets import check_target, work_folder
from edgesafe.progress import bar

BEST = "best.pt"
WARMUP = 0.1  # share of the updates that lead up to the highest learning rate
VALIDATIONS = 10  # validation passes, and checkpoints, of a run


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
        """Updates between two validation passes and checkpoints."""
        return max(1, self.steps // VALIDATIONS)


def pair_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean of -log sigmoid(r_chosen - r_rejected).

    Args:
        chosen: [pairs] scores of the preferred answers.
        rejected: [pairs] scores of the others.

    Source: Ouyang et al. 2022 (2203.02155) equation 1.

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
        resume: continue from the last checkpoint in `<out>.partial`.

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
    if not resume:
        files.start_over(partial)
    start = files.load_checkpoint(partial, run.identity, run.params, run.optimizer) if resume else 0
    train(run, partial, start)
    record = write(run, partial)
    os.replace(partial, place)
    return record


def prepare(base: str, data: Path, config: RewardTraining) -> RewardRun:
    """Load base and pairs; the head is drawn from the seed."""
    check(config)
    torch.manual_seed(config.seed)
    model, tokenizer = open_base(base)
    if config.max_length > context_length(model, tokenizer):
        raise ConfigError(
            f"max_length = {config.max_length} is out of range",
            where=base,
            expected=f"at most {context_length(model, tokenizer)} tokens, which is what the model reads",
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
            todo="use pairs with more prompts, or another --val-share (0: no validation)",
        )
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=config.lr, weight_decay=0.0)
    identity = {
        "parent": {"kind": "checkpoint", "name": display_name(base), **content_id(base, model)},
        "data": sha256_file(data),
        "config": asdict(config),
        "pairs": {"train": len(train), "val": len(val), "skipped": skipped},
    }
    return RewardRun(model, tokenizer, config, train, val, params, optimizer, identity)


def open_base(base: str) -> tuple[Any, Any]:
    """A checkpoint as a model with one label, in float32, and its tokenizer.

    Raises:
        InputError: it is an adapter.
        ConfigError: it can't be fetched or read, is of a kind without a classification head, or weights other than the
            head's are missing.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with read_errors(base, AutoModelForSequenceClassification):
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
    best = min(past_validations(partial), default=(math.inf, 0))[0]
    with (partial / files.METRICS).open("a", encoding="utf-8") as metrics:
        for number in bar(range(start, run.steps), run.steps - start, "reward model"):
            began = time.perf_counter()
            line: dict[str, Any] = {"update": number, **_update(run, number, partial)}
            due = (number + 1) % run.every == 0 or number + 1 == run.steps
            if due and run.val:
                line["val"] = validate(run)
                _finite(partial, f"validation loss {line['val']['loss']} after update {number}", line["val"]["loss"])
                if line["val"]["loss"] < best:
                    best = line["val"]["loss"]
                    _keep(run, partial, number + 1)
            line["seconds"] = round(time.perf_counter() - began, 4)
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            if due and number + 1 < run.steps:
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
    loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
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
def validate(run: RewardRun) -> dict[str, float | int]:
    """Loss and accuracy on the validation pairs; a tie is not a right answer."""
    run.model.eval()
    total, right = 0.0, 0
    for start in range(0, len(run.val), run.config.batch_size):
        chosen, rejected = pair_scores(run.model, run.val[start : start + run.config.batch_size])
        total += pair_loss(chosen, rejected).item() * len(chosen)
        right += int((chosen > rejected).sum())
    return {"loss": total / len(run.val), "accuracy": right / len(run.val), "k": right, "n": len(run.val)}


def past_validations(partial: Path) -> list[tuple[float, int, int]]:
    """Validation loss, updates done and right pairs of every validation pass in the metrics."""
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
        loss, update, right = min(past_validations(partial))
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
