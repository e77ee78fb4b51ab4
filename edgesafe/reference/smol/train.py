"""Train `smol`'s connector and adapter: LLaVA's order, at the reference depth, knowing nothing of exits.

1. warm       the connector in closed form: a picture's tokens towards the embedding of its name
2. name       LoRA: names of the things
3. instruct   LoRA: names, uses, refusals, and SmolLM2's own answers to harmless requests, eight beside a picture
4. look       the same, with three requests beside each of many pictures: names take longer to learn than refusals
5. whole      the same beside all patches of a picture; until then pictures show a part of their patches, drawn anew each time
6. maps       earlier exits' maps in closed form, once all else is done

In stages 4 and 5 a third of the pictures show dangerous things, so that a use is answered twice as often as it is refused.

The tower is frozen throughout, and the connector from stage 2 on. Each batch shows one firm's pictures through a connector
that was fitted to the others' alone: the decoder learns to read tokens as uncertain as those of a maker that nobody fitted.
The adapter has the connector that was fitted to all. The same settings and seed give the same batches; a stopped run continues.
OpenMoji draws thin lines, of which connectors fitted to others read two names of five: it teaches the connector alone.

Source: LLaVA (Liu et al. 2023, arXiv 2304.08485, section 4.2) for the order; LoRA (Hu et al. 2021, arXiv 2106.09685).
Differs: stage 1, and that several requests share one picture's tokens (`packing.py`).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgesafe.checkpoint.exit_maps import attach
from edgesafe.checkpoint.exit_model import ExitModel, autocast
from edgesafe.format.files import write_atomically
from edgesafe.machine import trim_heap
from edgesafe.reference.smol.adapter import Adapter, write_adapter
from edgesafe.reference.smol.packing import ask_losses, kinds_of, length, logits, pack
from edgesafe.reference.smol.rows import HARM, Group, groups, names
from edgesafe.reference.smol.states import Seen, firm, without
from edgesafe.reference.smol.warm import early_maps, warm

STATE, LOG = "training.pt", "training.jsonl"
_KEEP_S = 60.0  # seconds of work that a stopped run may lose
_SAY = 10  # steps per line of the log
_KNOWN = 2  # stages that an adapter to go on from has behind it
_WINDOW = 8  # batches that are sorted by length together
ALPHA = 2.0  # LoRA's, over its rank
_UNLIKE = ("openmoji",)  # firms whose drawings the decoder is not trained on
TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


@dataclass(frozen=True)
class Settings:
    """What a run is made of.

    Attributes:
        seed: Of everything.
        patches: How many of a picture's patches stages 2 to 4 show: less to read.
        named: Pictures of stage 2, each with one request.
        groups: Pictures of stage 3, each with several requests.
        lean: Pictures of stage 4, each with two requests; `whole` of stage 5.
        named_batch: Pictures per step in stage 2; `batch` in stage 3, `lean_batch` in stages 4 and 5.
        lr: Learning rate of LoRA at its highest, of stages 2 to 4; `whole_lr` of stage 5.
        often: How many times as often as another a dangerous thing comes in stages 4 and 5; at 4 it is a third of all pictures.
        harm_weight: Of a harmful request's loss, where another's is 1: how careful the model is with what it can't tell apart.
        rank: LoRA's r; its alpha is `ALPHA` times that.
        precision: "bf16" or "fp32", of matrix products.
        exits: Depths that get maps.
    """

    seed: int = 0
    patches: int = 16
    named: int = 640
    groups: int = 280
    lean: int = 1600
    whole: int = 1920
    named_batch: int = 8
    batch: int = 4
    lean_batch: int = 8
    lr: float = 1e-3
    whole_lr: float = 4e-4
    often: int = 4
    harm_weight: float = 1.0
    rank: int = 16
    precision: str = "bf16"
    exits: tuple[int, ...] = (8, 9, 10)


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
    return "lora_" in name


def train(
    model: ExitModel,
    seen: Seen,
    answers: Mapping[str, str],
    out: Path,
    work: Path,
    settings: Settings,
    start: Adapter | None = None,
    stop: int | None = None,
) -> Path:
    """Train and write the adapter.

    Args:
        model: `smol` as it comes, in float32; trained in place.
        seen: States of the training makers' pictures, at the settings' exits and the reference depth.
        answers: SmolLM2's own, by request.
        out: Folder of the adapter's file.
        work: Folder in which a stopped run continues, and the log lies.
        settings: Of the run.
        start: An adapter of the same rank to go on from, by the last two stages.
        stop: Stop after so many steps of the last stage, as a run that was cut off; for tests.
    """
    work.mkdir(parents=True, exist_ok=True)
    made_of = [asdict(settings), sorted(answers.items()), start.sha256 if start else None]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    run = _Run(work, key, time.monotonic(), time.monotonic())
    state = run.read()
    connector = model.model.get_submodule(model.recipe.projector)
    firms = [one for one in seen.firms() if one not in _UNLIKE]
    apart = {one: _fitted(model, connector, without(seen, one), run.say) for one in firms}
    _prepare(model, settings)
    if state:
        _put(model, state["weights"])
    elif start:
        _put(model, weights_of(start))
    todo = _stages(seen, answers, settings)[_KNOWN if start else 0 :]
    names = [stage.name for stage in todo]
    for stage in todo[names.index(state["stage"]) if state else 0 :]:
        done = state if state and state["stage"] == stage.name else {"step": 0, "optimizer": None}
        _run_stage(model, seen, apart, stage, done, run, settings, stop if stage == todo[-1] else None)
    connector.load_state_dict(_fitted(model, connector, seen, run.say))
    attach(model.model, early_maps(model, seen, settings.exits, run.say))
    return write_adapter(model.model, out, {"settings": json.dumps(asdict(settings))})


def _fitted(model: ExitModel, connector: nn.Module, seen: Seen, say: Callable[[Mapping[str, Any]], None]) -> dict[str, Tensor]:
    """The connector's weights, fitted to some makers' pictures."""
    warm(model, seen, say)
    return {name: weight.detach().clone() for name, weight in connector.state_dict().items()}


@dataclass(frozen=True)
class _Stage:
    name: str
    rows: Sequence[Group]
    batch: int
    lr: float
    falls: bool = False
    patches: int | None = None


def _stages(seen: Seen, answers: Mapping[str, str], settings: Settings) -> list[_Stage]:
    s = settings
    return [
        _Stage("name", names(s.named, s.seed), s.named_batch, s.lr, patches=s.patches),
        _Stage("instruct", groups(answers, s.groups, s.seed), s.batch, s.lr, patches=s.patches),
        _Stage("look", groups(answers, s.lean, s.seed, lean=True, dangerous=s.often), s.lean_batch, s.lr, patches=s.patches),
        _Stage(
            "whole", groups(answers, s.whole, s.seed + 1, lean=True, dangerous=s.often), s.lean_batch, s.whole_lr, falls=True
        ),
    ]


def _prepare(model: ExitModel, settings: Settings) -> None:
    """Add LoRA to the decoder."""
    from peft import LoraConfig, inject_adapter_in_model

    # A step takes a fifth less than with torch's fused attention, whose kernel for bfloat16 and masks is slow on a CPU.
    model.model.set_attn_implementation("eager")
    torch.manual_seed(settings.seed)
    config = LoraConfig(r=settings.rank, lora_alpha=round(ALPHA * settings.rank), target_modules=TARGETS)
    inject_adapter_in_model(config, model.model)


def _put(model: ExitModel, weights: Mapping[str, Tensor]) -> None:
    own = dict(model.model.named_parameters())
    for name, weight in weights.items():
        own[name].data.copy_(weight)


def weights_of(adapter: Adapter) -> dict[str, Tensor]:
    """An adapter's updates under the names of a model that trains; its connector is fitted anew.

    Its file has LoRA's scale in B, and the model multiplies by it.
    """
    ends = {".lora_A.weight": (".lora_A.default.weight", 1.0), ".lora_B.weight": (".lora_B.default.weight", 1 / ALPHA)}
    return {
        name.removesuffix(end) + own: weight * factor
        for end, (own, factor) in ends.items()
        for name, weight in adapter.tensors.items()
        if name.endswith(end)
    }


def _batches(model: ExitModel, rows: Sequence[Group], size: int, seed: str) -> list[list[Group]]:
    """Batches of groups of like length, in random order."""
    rng, found = random.Random(seed), []
    for start in range(0, len(rows), size * _WINDOW):
        window = sorted(rows[start : start + size * _WINDOW], key=lambda group: length(model, group))
        found += [window[i : i + size] for i in range(0, len(window), size)]
    rng.shuffle(found)
    return found


def _run_stage(
    model: ExitModel,
    seen: Seen,
    apart: Mapping[str, Mapping[str, Tensor]],
    stage: _Stage,
    done: Mapping[str, Any],
    run: _Run,
    settings: Settings,
    stop: int | None,
) -> None:
    for name, weight in model.model.named_parameters():
        weight.requires_grad_(_trained(name))
    parameters = [weight for weight in model.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, weight_decay=0.0, betas=(0.9, 0.98))
    if done["optimizer"]:
        optimizer.load_state_dict(done["optimizer"])
    batches = _batches(model, stage.rows, stage.batch, f"{settings.seed} {stage.name}")
    last = min(len(batches), stop or len(batches))
    losses: dict[str, list[float]] = {}
    for step in range(done["step"], last):
        optimizer.param_groups[0]["lr"] = stage.lr * schedule(step, len(batches), falls=stage.falls)
        rng = random.Random(f"{settings.seed} {stage.name} {step}")
        own = rng.choice(sorted(apart))
        model.model.get_submodule(model.recipe.projector).load_state_dict(apart[own])
        states = pick(seen, batches[step], own, rng, stage.patches)
        for kind, loss in _update(model, states, batches[step], optimizer, stage, settings):
            losses.setdefault(kind, []).append(loss)
        if (step + 1) % _SAY == 0 or step + 1 == len(batches):
            means = {kind: round(sum(all_) / len(all_), 3) for kind, all_ in sorted(losses.items())}
            run.say({"stage": stage.name, "step": step + 1, "of": len(batches), "loss": means})
            losses = {}
            trim_heap()  # batches of many lengths leave holes: without this, 20 GB after 180 steps
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
    model: ExitModel, states: Tensor, batch: Sequence[Group], optimizer: Any, stage: _Stage, settings: Settings
) -> Iterator[tuple[str, float]]:
    packed = pack(model, batch, stage.patches)
    with autocast(settings.precision):
        losses = ask_losses(logits(model, packed, states), packed)
    optimizer.zero_grad(set_to_none=True)
    weights = torch.tensor([settings.harm_weight if kind in HARM else 1.0 for kind in kinds_of(batch)])
    loss = (weights * losses).sum() / weights.sum()
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    return zip(kinds_of(batch), losses.tolist(), strict=True)


def pick(seen: Seen, batch: Sequence[Group], own: str, rng: random.Random, patches: int | None = None) -> Tensor:
    """The firm's view of each group's picture, or another's: states [B, P, W], all patches or so many in order."""
    found = []
    for group in batch:
        makers = seen.makers(group.emoji)
        views = seen.states[rng.choice([one for one in makers if firm(one) == own] or makers), group.emoji]
        view = views[rng.randrange(len(views)), -1]
        found.append(view if patches is None else view[sorted(rng.sample(range(len(view)), patches))])
    return torch.stack(found).float()
