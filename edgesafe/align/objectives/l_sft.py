"""`self-distill` and `l-sft`: objectives on the wanted answers, which differ in the teacher alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from edgesafe.align.features import Features
from edgesafe.align.objectives.losses import row_weights, wanted_loss
from edgesafe.align.settings import AlignConfig
from edgesafe.align.sizes import Footprint, Lengths, Sizes, wanted_answers
from edgesafe.align.trainer import Objective, Trainer
from edgesafe.format.exits import Exit


def update(t: Trainer, features: Features, exit: Exit, rows: Sequence[int], number: int) -> dict[str, float]:
    """One step down `update_loss`; see `Objective.update`."""
    loss, figures = update_loss(t, features, exit, rows)
    return t.descend(loss, f"update {number}, exit {exit}") | figures


def update_loss(t: Trainer, features: Features, exit: Exit, rows: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
    """Loss of one update: the rows at the exit, the first `reference_rows` of them also at the reference, in one pass.

    The two parts weigh the same.
    """
    mine, again = t.mine(rows), t.mine(rows[: t.config.reference_rows])
    both = [*mine, *again]
    exits = [exit] * len(mine) + [t.llava.reference] * len(again)
    batch = t.batch(t.at_exits([t.examples[row] for row in both], exits))
    teacher = features.stack_teacher(both)
    teacher = None if teacher is None else teacher.to(t.llava.device)
    logits, _ = t.forward(batch, t.states(features, both, exits))
    weight = row_weights(batch.harmful, t.harm_weights(exits))
    parts = {"exit": slice(0, len(mine)), "reference": slice(len(mine), None)}
    if not again:
        del parts["reference"]
    total, figures = torch.zeros((), device=logits.device), {}
    for name, part in parts.items():
        taught = None if teacher is None else teacher[part]
        loss, terms = wanted_loss(
            logits[part], taught, batch.targets[part], batch.mask[part], weight[part], t.config.sft_weight
        )
        total = total + loss * t.share(weight[part].sum()) / len(parts)
        figures.update({f"{name}_{term}": value for term, value in terms.items()})
    return total, figures


def _taught(config: AlignConfig, s: Sizes, lengths: Lengths, rows: int) -> Footprint:
    """The teacher's log-probabilities, their exponentials and their difference to the policy's come on top."""
    return replace(wanted_answers(config, s, lengths, rows), arrays=3)


SELF_DISTILL = Objective("self-distill", update, needs_teacher=True, memory=_taught)
L_SFT = Objective("l-sft", update)
