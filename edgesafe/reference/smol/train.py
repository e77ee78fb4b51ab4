"""Train `smol`'s connector and adapter: LLaVA's order, at the reference depth, knowing nothing of exits.

1. warm       the connector alone, without the decoder: a picture's tokens towards the embedding of its name
2. connector  the connector, the decoder frozen: names of 660 emoji
3. instruct   connector and LoRA: names, uses, refusals, and SmolLM2's own answers to harmless requests, nine beside a picture
4. look       the same, with two requests beside each of many pictures: names take longer to learn than refusals

The tower is frozen throughout. The same settings and seed give the same batches; a stopped run continues.

Source: LLaVA (Liu et al. 2023, arXiv 2304.08485, section 4.2) for the order; LoRA (Hu et al. 2021, arXiv 2106.09685).
Differs: stage 1, which costs a minute, and that several requests share one picture's tokens (`packing.py`).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgesafe.checkpoint.exit_model import ExitModel, autocast
from edgesafe.format.files import write_atomically
from edgesafe.reference.smol.adapter import write_adapter
from edgesafe.reference.smol.packing import ask_losses, kinds_of, length, logits, pack
from edgesafe.reference.smol.rows import Group, groups, naming
from edgesafe.reference.smol.states import Seen
from edgesafe.reference.smol.warm import warm

STATE, LOG = "training.pt", "training.jsonl"
_KEEP_S = 60.0  # seconds of work that a stopped run may lose
_SAY = 10  # steps per line of the log
_WINDOW = 8  # batches that are sorted by length together
TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


@dataclass(frozen=True)
class Settings:
    """What a run is made of.

    Attributes:
        seed: Of everything.
        warm_steps: Of stage 1.
        named: Pictures of stage 2.
        named_patches: How many of a picture's patches stage 2 shows, drawn anew each time: less to read.
        groups: Pictures of stage 3, each with several requests.
        batch: Pictures per step in stage 3; `named_batch` in stage 2, `lean_batch` in stage 4.
        lean: Pictures of stage 4, each with two requests.
        named_lr: Learning rate of stage 2, at its highest.
        lr: Of stage 3; `lean_lr` of stage 4.
        connector_share: The connector's learning rate over that: at the whole of it, it unlearns what stage 1 taught.
        rank: LoRA's r; its alpha is twice that.
        precision: "bf16" or "fp32", of matrix products.
    """

    seed: int = 0
    warm_steps: int = 400
    named: int = 1280
    named_patches: int = 16
    groups: int = 280
    batch: int = 4
    lean: int = 2400
    lean_batch: int = 4
    named_batch: int = 16
    named_lr: float = 1e-3
    lr: float = 5e-4
    lean_lr: float = 8e-4
    connector_share: float = 0.1
    rank: int = 16
    precision: str = "bf16"


@dataclass
class _Run:
    """A run in progress: what a stopped one needs to go on."""

    folder: Path
    key: str
    started: float
    kept: float

    def read(self) -> dict[str, Any]:
        """What was kept, or nothing where another run's state lies there."""
        path = self.folder / STATE
        state: dict[str, Any] = torch.load(path, weights_only=True) if path.is_file() else {}
        return state if state.get("key") == self.key else {}

    def keep(self, stage: str, step: int, model: ExitModel, optimizer: Any = None) -> None:
        """Keep the trained weights and the optimizer's state."""
        weights = {name: weight.detach() for name, weight in model.model.named_parameters() if _trained(name)}
        state = {"key": self.key, "stage": stage, "step": step, "weights": weights}
        buffer = io.BytesIO()
        torch.save({**state, "optimizer": optimizer.state_dict() if optimizer else None}, buffer)
        write_atomically(self.folder / STATE, buffer.getvalue())
        self.kept = time.monotonic()

    def say(self, line: Mapping[str, Any]) -> None:
        """Add a line to the log."""
        text = json.dumps({**line, "s": round(time.monotonic() - self.started)})
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def _trained(name: str) -> bool:
    return "multi_modal_projector" in name or "lora_" in name


def train(
    model: ExitModel, seen: Seen, answers: Mapping[str, str], out: Path, work: Path, settings: Settings, stop: int | None = None
) -> Path:
    """Train and write the adapter.

    Args:
        model: `smol` as it comes, in float32; trained in place.
        seen: States of the training makers' pictures.
        answers: SmolLM2's own, by request.
        out: Folder of the adapter's file.
        work: Folder in which a stopped run continues, and the log lies.
        settings: Of the run.
        stop: Stop after so many steps of the last stage, as a run that was cut off; for tests.
    """
    work.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(json.dumps([asdict(settings), sorted(answers.items())]).encode()).hexdigest()
    run = _Run(work, key, time.monotonic(), time.monotonic())
    state = run.read()
    _prepare(model, settings)
    if not state:
        warm(model, seen, settings.warm_steps, settings.seed, run.say)
        run.keep("connector", 0, model)
        state = run.read()
    _put(model, state["weights"])
    todo = _stages(seen, answers, settings)
    names = [stage.name for stage in todo]
    for stage in todo[names.index(state["stage"]) :]:
        done = state if state["stage"] == stage.name else {"step": 0, "optimizer": None}
        _run_stage(model, seen, stage, done, run, settings, stop if stage == todo[-1] else None)
    return write_adapter(model.model, out, {"settings": json.dumps(asdict(settings))})


@dataclass(frozen=True)
class _Stage:
    name: str
    rows: Sequence[Group]
    batch: int
    lr: float
    falls: bool = True
    only: str = ""
    patches: int | None = None


def _stages(seen: Seen, answers: Mapping[str, str], settings: Settings) -> list[_Stage]:
    s = settings
    named = _named(seen, s.named, random.Random(f"{s.seed} naming"))
    return [
        _Stage("connector", named, s.named_batch, s.named_lr, only="multi_modal_projector", patches=s.named_patches),
        _Stage("instruct", groups(answers, s.groups, s.seed), s.batch, s.lr, falls=False),
        _Stage("look", groups(answers, s.lean, s.seed, lean=True), s.lean_batch, s.lean_lr),
    ]


def _prepare(model: ExitModel, settings: Settings) -> None:
    """Add LoRA to the decoder."""
    from peft import LoraConfig, inject_adapter_in_model

    # A step takes a fifth less than with torch's fused attention, whose kernel for bfloat16 and masks is slow on a CPU.
    model.model.set_attn_implementation("eager")
    torch.manual_seed(settings.seed)
    config = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules=TARGETS)
    inject_adapter_in_model(config, model.model)


def _put(model: ExitModel, weights: Mapping[str, Tensor]) -> None:
    own = dict(model.model.named_parameters())
    for name, weight in weights.items():
        own[name].data.copy_(weight)


def _named(seen: Seen, count: int, rng: random.Random) -> list[Group]:
    found: list[Group] = []
    while len(found) < count:
        part = naming(seen.names, rng)
        rng.shuffle(part)
        found += [group for group in part if seen.makers(group.emoji)]
    return found[:count]


def _batches(model: ExitModel, rows: Sequence[Group], size: int, seed: str) -> list[list[Group]]:
    """Batches of groups of like length, in random order."""
    rng, found = random.Random(seed), []
    for start in range(0, len(rows), size * _WINDOW):
        window = sorted(rows[start : start + size * _WINDOW], key=lambda group: length(model, group))
        found += [window[i : i + size] for i in range(0, len(window), size)]
    rng.shuffle(found)
    return found


def _run_stage(
    model: ExitModel, seen: Seen, stage: _Stage, done: Mapping[str, Any], run: _Run, settings: Settings, stop: int | None
) -> None:
    parts: dict[float, list[Tensor]] = {}
    for name, weight in model.model.named_parameters():
        weight.requires_grad_(_trained(name) and stage.only in name)
        if weight.requires_grad:
            parts.setdefault(settings.connector_share if "lora_" not in name else 1.0, []).append(weight)
    parameters = [{"params": weights, "share": share} for share, weights in parts.items()]
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, weight_decay=0.0, betas=(0.9, 0.98))
    if done["optimizer"]:
        optimizer.load_state_dict(done["optimizer"])
    batches = _batches(model, stage.rows, stage.batch, f"{settings.seed} {stage.name}")
    last = min(len(batches), stop or len(batches))
    losses: dict[str, list[float]] = {}
    for step in range(done["step"], last):
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * group["share"] * schedule(step, len(batches), falls=stage.falls)
        for kind, loss in _update(
            model, seen, batches[step], optimizer, stage, settings, f"{settings.seed} {stage.name} {step}"
        ):
            losses.setdefault(kind, []).append(loss)
        if (step + 1) % _SAY == 0 or step + 1 == len(batches):
            means = {kind: round(sum(all_) / len(all_), 3) for kind, all_ in sorted(losses.items())}
            run.say({"stage": stage.name, "step": step + 1, "of": len(batches), "loss": means})
            losses = {}
        if time.monotonic() - run.kept > _KEEP_S:
            run.keep(stage.name, step + 1, model, optimizer)
    run.keep(stage.name, last, model, optimizer)


def schedule(step: int, steps: int, *, falls: bool = True) -> float:
    """The learning rate's factor: up over the first twentieth, then down a cosine, or level where another stage follows.

    >>> [round(schedule(step, 100), 2) for step in (0, 4, 52, 99)]
    [0.2, 1.0, 0.51, 0.0]
    """
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    if not falls:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def _update(
    model: ExitModel, seen: Seen, batch: Sequence[Group], optimizer: Any, stage: _Stage, settings: Settings, seed: str
) -> Iterator[tuple[str, float]]:
    states = pick(seen, batch, random.Random(seed), stage.patches)
    packed = pack(model, batch, stage.patches)
    with autocast(settings.precision):
        losses = ask_losses(logits(model, packed, states), packed)
    optimizer.zero_grad(set_to_none=True)
    losses.mean().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return zip(kinds_of(batch), losses.tolist(), strict=True)


def pick(seen: Seen, batch: Sequence[Group], rng: random.Random, patches: int | None = None) -> Tensor:
    """A maker's view of each group's picture: states [B, P, W], all patches or so many in their order."""
    found = []
    for group in batch:
        views = seen.states[rng.choice(seen.makers(group.emoji)), group.emoji]
        view = views[rng.randrange(len(views)), -1]
        found.append(view if patches is None else view[sorted(rng.sample(range(len(view)), patches))])
    return torch.stack(found).float()
