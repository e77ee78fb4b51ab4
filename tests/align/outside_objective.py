"""An objective that is no part of the package, in this one module: `method = "outside_objective:OBJECTIVE"`.

Label-smoothed cross-entropy on the rows with the longest answers, with a table `[smoothed]` of its own in the config.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from edgesafe.align.features import Features
from edgesafe.align.objectives.losses import answer_mean
from edgesafe.align.settings import AlignConfig, Limits, Section
from edgesafe.align.sizes import Footprint, Lengths, Sizes
from edgesafe.align.trainer import Objective, Trainer
from edgesafe.format.exits import Exit


@dataclass(frozen=True)
class SmoothedConfig:
    """smoothing: share of the probability that is spread evenly. rows: how many of the longest answers are trained on."""

    smoothing: float = 0.1
    rows: int = 8


@dataclass(frozen=True)
class Item:
    """A training row."""

    row: int


def _limits(own: SmoothedConfig) -> Limits:
    return {"smoothing": (own.smoothing < 1, own.smoothing, "0..1, below 1")}


SMOOTHED = Section("smoothed", SmoothedConfig(), {"rows": 1}, _limits)


def longest(t: Trainer) -> dict[Exit, list[Item]]:
    """The rows with the longest answers, at every exit but the shallowest."""
    order = sorted(range(len(t.examples)), key=lambda row: (-len(t.examples[row].answer), row))
    return {exit: [Item(row) for row in order[: SMOOTHED.of(t.config).rows]] for exit in t.exits[1:]}


def update(t: Trainer, features: Features, exit: Exit, items: Sequence[Item], number: int) -> dict[str, float]:
    """One step down the smoothed cross-entropy at the exit."""
    rows = t.mine([item.row for item in items])
    batch = t.batch([t.examples[row] for row in rows])
    logits, _ = t.forward(batch, t.states(features, rows, [exit] * len(rows)))  # [B, A, V]
    smoothing = SMOOTHED.of(t.config).smoothing
    token = F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none", label_smoothing=smoothing)
    weight = torch.ones(len(rows), device=token.device)
    loss = answer_mean(token, batch.mask, weight)
    return t.descend(loss * t.share(weight.sum()), f"update {number}") | {"smoothed": loss.item()}


def _memory(config: AlignConfig, s: Sizes, lengths: Lengths, rows: int) -> Footprint:
    """As for a cross-entropy, after a phase that is larger than all others."""
    return Footprint(lengths.answer, phases={"sorting the rows": 2**28})


def _at_most_a_row_each(config: AlignConfig, processes: int) -> Limits:
    own = SMOOTHED.of(config)
    return {"smoothed.rows": (own.rows >= processes, own.rows, f"at least {processes}, one for each process")}


OBJECTIVE = Objective("smoothed", update, prepare=longest, memory=_memory, section=SMOOTHED, limits=_at_most_a_row_each)

# What a config may name by mistake.
NOT_AN_OBJECTIVE = SMOOTHED
TAKEN = Objective("taken", update, section=Section("ppo", SmoothedConfig()))
NAMED_AS_A_SETTING = Objective("named", update, section=Section("steps", SmoothedConfig()))
WITH_A_VALUE_HEAD = Objective("valued", update, has_value_head=True)
