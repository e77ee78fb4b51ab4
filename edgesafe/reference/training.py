"""What every stage of the reference model's training uses: autocast, a log and the optimizer."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgesafe.checkpoint.load import bf16_is_fast


def autocast() -> Any:
    """Matrix products in bfloat16 where the CPU has tiles for them (AMX); elsewhere float32 is the faster of the two."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16_is_fast())


LOG = "training.jsonl"


class Log:
    """Training log: one JSON line per entry, to a file and (short) to a callback."""

    def __init__(self, path: Path, say: Callable[[str], None], keep: bool = False) -> None:
        self.path, self.say, self.start = path, say, time.time()
        if not keep:
            path.write_text("")

    def __call__(self, stage: str, **figures: float | int | str) -> None:
        """Write an entry: its stage, the seconds since the start, and figures by name."""
        entry = {"stage": stage, "seconds": round(time.time() - self.start, 1), **figures}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self.say(" ".join(f"{k}={v}" for k, v in entry.items()))


class Optimizer:
    """Muon for the matrices of the blocks, AdamW for the rest, both on one one-cycle schedule.

    Muon (torch.optim.Muon) brings a transformer of this size to the same loss in about half of AdamW's steps. The
    learning rate of Muon falls by `falloff` from each block to the next.
    """

    def __init__(self, modules: list[nn.Module], lr: float, steps: int, falloff: float = 1.0) -> None:
        blocks: dict[int, list[nn.Parameter]] = {}
        rest = []
        for name, p in (named for module in modules for named in module.named_parameters()):
            block = re.search(r"\blayers\.(\d+)\.", name)
            if block and p.ndim == 2:
                blocks.setdefault(int(block[1]), []).append(p)
            else:
                rest.append(p)
        self.params = [*rest, *(p for matrices in blocks.values() for p in matrices)]
        adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
        self.parts: list[Any] = [adamw, _one_cycle(adamw, [lr], steps)]
        if blocks:
            groups = [{"params": matrices} for matrices in blocks.values()]
            muon = torch.optim.Muon(groups, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
            self.parts += [muon, _one_cycle(muon, [lr * falloff**i for i in blocks], steps)]

    def step(self, loss: Tensor) -> None:
        """One update along the gradient of `loss`."""
        for p in self.params:
            p.grad = None
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for part in self.parts:
            part.step()


def _one_cycle(optimizer: torch.optim.Optimizer, lr: list[float], steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.08, cycle_momentum=False)
