"""The alignment loop: each update draws one exit depth, and the reference depth is always in the batch.

Frozen: vision tower and projector. Trained: LoRA factors on the language model, merged into the written checkpoint.
Depth `d` of update `k` and its rows depend on the seed and `k` alone, so a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgesafe.align.config import AlignConfig
from edgesafe.align.data import Batch, Example, collate, read_examples
from edgesafe.align.losses import distill_loss, row_weights, sft_loss
from edgesafe.align.model import Llava, embed, exit_states, load
from edgesafe.bundle import digest_folder
from edgesafe.errors import ConfigError, DivergedError, InputError
from edgesafe.exits import parse_exits
from edgesafe.progress import bar

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Trainer:
    """What changes during a run."""

    llava: Llava
    config: AlignConfig
    examples: list[Example]
    exits: tuple[int, ...]
    params: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer


def draw_update(config: AlignConfig, exits: tuple[int, ...], rows: int, number: int) -> tuple[int, list[int]]:
    """Exit depth and row numbers of update `number`: a function of the seed and the number."""
    rng = np.random.default_rng([config.seed, number])
    depth = exits[int(rng.integers(len(exits)))]
    return depth, rng.choice(rows, size=min(config.batch_size, rows), replace=False).tolist()


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


def answer_logits(llava: Llava, batch: Batch, states: Tensor) -> Tensor:
    """Logits [B, S, V] of the language model on pictures seen through `states` [B, P, W]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=states.dtype == torch.bfloat16):
        embeds = embed(llava, batch.ids, states)
        hidden = llava.model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return llava.model.lm_head(hidden)


def update_loss(llava: Llava, config: AlignConfig, batch: Batch, depth: int) -> tuple[Tensor, dict[str, float]]:
    """Loss of one update: the exit's half and the reference depth's half of the batch weigh the same."""
    states = exit_states(llava, batch.pixels)
    reference = states[llava.reference_depth]
    both = Batch(
        batch.pixels, batch.ids.repeat(2, 1), batch.targets.repeat(2, 1), batch.mask.repeat(2, 1), batch.harmful.repeat(2)
    )
    logits = answer_logits(llava, both, torch.cat([states[depth], reference]))
    weight = row_weights(batch.harmful, config.harm_weight)
    half = len(batch.ids)
    figures: dict[str, float] = {}
    total = logits.new_zeros(())
    teacher = None
    if config.method == "self-distill":
        with torch.no_grad(), llava.model.disable_adapter():
            teacher = answer_logits(llava, batch, reference)
    for name, part in (("exit", logits[:half]), ("reference", logits[half:])):
        supervised = sft_loss(part, batch.targets, batch.mask, weight)
        figures[f"{name}_sft"] = supervised.item()
        if teacher is None:
            total = total + supervised
        else:
            distilled = distill_loss(part, teacher, batch.mask, weight)
            figures[f"{name}_kl"] = distilled.item()
            total = total + distilled + config.sft_weight * supervised
    return total / 2, figures


def align(model_dir: Path, config: AlignConfig, out: Path, *, resume: bool = False) -> Path:
    """Align a checkpoint and write the merged one.

    Args:
        model_dir: checkpoint folder.
        config: settings; `config.data` names the data folder.
        out: new folder; `<out>.partial` holds metrics and checkpoints while it runs.
        resume: go on from the last checkpoint in `<out>.partial`.

    Returns:
        `out`.

    Raises:
        ConfigError: exits that the model does not have, or nothing to resume.
        InputError: `out` exists, or the data can't be used.
        DivergedError: a loss that is not finite; the last checkpoint stays in `<out>.partial`.
    """
    if out.exists():
        raise InputError("the output exists already", where=str(out), expected="a new folder", todo="name another --out")
    partial = out.with_name(out.name + ".partial")
    if partial.exists() and not resume:
        shutil.rmtree(partial)
    trainer = _prepare(model_dir, config)
    partial.mkdir(parents=True, exist_ok=True)
    start = _resume(trainer, partial) if resume else 0
    _loop(trainer, partial, start)
    return _write(trainer, model_dir, partial, out)


def _prepare(model_dir: Path, config: AlignConfig) -> Trainer:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(config.seed)
    llava = load(model_dir)
    exits = parse_exits(config.exits, llava.n_blocks)
    examples = read_examples(Path(config.data), llava)
    names = [n for n, _ in llava.model.named_modules() if ".language_model." in n and n.split(".")[-1] in TARGETS]
    lora = LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=names, lora_dropout=0.0, bias="none")
    wrapped = get_peft_model(llava.model, lora)
    # peft changes the modules in place: the model keeps its class, and gains a switch to run without the adapter.
    llava.model.disable_adapter = wrapped.disable_adapter
    llava.model.merge_and_unload = wrapped.merge_and_unload
    params = [p for p in llava.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)
    return Trainer(llava, config, examples, exits, params, optimizer)


def _loop(t: Trainer, partial: Path, start: int) -> None:
    with (partial / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        for number in bar(range(start, t.config.steps), t.config.steps - start, "align"):
            began = time.perf_counter()
            depth, pick = draw_update(t.config, t.exits, len(t.examples), number)
            batch = collate(t.llava, [t.examples[i] for i in pick])
            for group in t.optimizer.param_groups:
                group["lr"] = learning_rate(t.config, number)
            loss, figures = update_loss(t.llava, t.config, batch, depth)
            t.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(t.params, 1.0))
            if not math.isfinite(loss.item()) or not math.isfinite(norm):
                raise DivergedError(
                    f"loss {loss.item()}, gradient norm {norm} at update {number}",
                    where=str(partial),
                    expected="finite figures",
                    todo="lower lr, then run again with --resume",
                )
            t.optimizer.step()
            line: dict[str, Any] = {
                "update": number,
                "exit_depth": depth,
                "loss": loss.item(),
                **figures,
                "seconds": time.perf_counter() - began,
            }
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            if (number + 1) % t.config.checkpoint_every == 0:
                _checkpoint(t, partial, number + 1)


def _checkpoint(t: Trainer, partial: Path, done: int) -> None:
    state = {
        "done": done,
        "config": asdict(t.config),
        "params": [p.detach() for p in t.params],
        "optimizer": t.optimizer.state_dict(),
    }
    temporary = partial / "checkpoint.pt.partial"
    torch.save(state, temporary)
    temporary.replace(partial / "checkpoint.pt")


def _resume(t: Trainer, partial: Path) -> int:
    path = partial / "checkpoint.pt"
    if not path.is_file():
        raise ConfigError(
            "nothing to resume", where=str(path), expected="a checkpoint of an interrupted run", todo="run without --resume"
        )
    state = torch.load(path, weights_only=True)
    if state["config"] != asdict(t.config):
        raise ConfigError(
            "the config differs from the interrupted run's",
            where=str(path),
            expected="the same settings",
            todo="use the same config, or start again without --resume",
        )
    with torch.no_grad():
        for p, saved in zip(t.params, state["params"], strict=True):
            p.copy_(saved)
    t.optimizer.load_state_dict(state["optimizer"])
    lines = (partial / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[: state["done"]]
    (partial / "metrics.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return int(state["done"])


def _write(t: Trainer, model_dir: Path, partial: Path, out: Path) -> Path:
    from safetensors import safe_open

    with safe_open(next(iter(sorted(model_dir.glob("*.safetensors")))), framework="pt") as weights:
        stored = weights.get_tensor(next(iter(weights.keys()))).dtype
    t.llava.model.merge_and_unload()
    t.llava.model.to(stored).save_pretrained(partial)
    for file in model_dir.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja", ".model", ".txt") and not (partial / file.name).exists():
            shutil.copy2(file, partial / file.name)
    record = {
        "step": "align",
        "parent": digest_folder(model_dir),
        "config": asdict(t.config),
        "exits": list(t.exits),
        "versions": {n: version(n) for n in ("torch", "transformers", "peft")},
    }
    record["config"]["data"] = digest_folder(Path(t.config.data))
    (partial / "edgesafe.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (partial / "checkpoint.pt").unlink(missing_ok=True)
    partial.replace(out)
    return out
