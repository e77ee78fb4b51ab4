"""`l-dpo`: pairs for free, from the model's own answers.

Chosen is the answer at the reference where that is right, rejected the wrong answer to the same request at the exit.

Source: Direct preference optimization, Rafailov et al. 2023 (arXiv 2305.18290), equation 7, the reference policy at the same
    exit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgesafe.align.features import Features, chunk_of
from edgesafe.align.objectives.losses import dpo_terms, row_weights, sft_loss
from edgesafe.align.objectives.rollout import token_logprobs
from edgesafe.align.settings import AlignConfig, Section
from edgesafe.align.sizes import Footprint, Lengths, Sizes
from edgesafe.align.trainer import Objective, Trainer
from edgesafe.checkpoint.exit_model import exit_state, exit_states, generate, ids_at, open_images, pixel_values
from edgesafe.errors import AlignError
from edgesafe.format.exits import Exit
from edgesafe.progress import bar

MAX_NEW_TOKENS = 32  # of the answers that may become pairs


@dataclass(frozen=True)
class DpoConfig:
    """Settings of `l-dpo`, table `[dpo]`.

    beta: how far the policy may move from the reference policy; small is far. rows: how many training rows are answered at
        every exit before the first update to find pairs. min_reward: a chosen answer has at least this reward. min_gap: and the
        rejected one this much less.
    """

    beta: float = 0.1
    rows: int = 800
    min_reward: float = 0.99
    min_gap: float = 0.05


DPO = Section("dpo", DpoConfig(), {"min_reward": None}, lambda dpo: {"beta": (dpo.beta > 0, dpo.beta, "above 0")})


@dataclass(frozen=True)
class Pair:
    """Two answers to one row's request: the ids of the better and of the worse one."""

    row: int
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def is_pair(chosen: float, rejected: float, config: DpoConfig) -> bool:
    """Whether two answers' rewards make them a pair.

    >>> is_pair(1.0, 0.2, DpoConfig(min_reward=0.9, min_gap=0.5)), is_pair(0.8, 0.2, DpoConfig(min_reward=0.9, min_gap=0.5))
    (True, False)
    """
    return chosen >= config.min_reward and chosen - rejected >= config.min_gap


@torch.no_grad()
def find_pairs(t: Trainer) -> dict[Exit, list[Pair]]:
    """Pairs by exit from the untouched model's greedy answers to the first `dpo.rows` rows.

    Every process finds them for itself.

    Raises:
        AlignError: there are none at any exit.
    """
    pairs: dict[Exit, list[Pair]] = {exit: [] for exit in t.exits}
    count, size = min(DPO.of(t.config).rows, len(t.examples)), chunk_of(t.llava)
    t.policy.eval()
    with t.gathered(), t.untouched():
        for start in bar(range(0, count, size), -(-count // size), "pairs"):
            part = list(range(start, min(start + size, count)))
            for exit, pair in _pairs_of(t, part):
                pairs[exit].append(pair)
    pairs = {exit: some for exit, some in pairs.items() if some}
    if not pairs:
        raise AlignError(
            "no exit answers worse than the reference",
            where=f"the first {count} training rows",
            expected="some wrong answers at an exit that are right at the reference",
            todo="raise dpo.rows, or lower dpo.min_reward",
        )
    return pairs


def _pairs_of(t: Trainer, part: Sequence[int]) -> list[tuple[Exit, Pair]]:
    """(exit, pair) of some rows at every exit."""
    examples = [t.examples[row] for row in part]
    states = exit_states(t.llava, pixel_values(t.llava, open_images([e.image for e in examples])))

    def answer(exit: Exit) -> tuple[list[list[int]], list[float]]:
        ids = generate(
            t.llava,
            [ids_at(t.llava, e.prompt, exit) for e in examples],
            exit_state(t.llava, states, exit),
            MAX_NEW_TOKENS,
            lambda logits, *_: logits.argmax(-1),
        )
        t.tokens += sum(len(e.prompt) + len(line) for e, line in zip(examples, ids, strict=True))
        return ids, t.score(examples, ids)

    chosen, good = answer(t.llava.reference)
    out = []
    for exit in t.exits:
        rejected, bad = (chosen, good) if exit == t.llava.reference else answer(exit)
        for i, row in enumerate(part):
            if is_pair(good[i], bad[i], DPO.of(t.config)):
                out.append((exit, Pair(row, tuple(chosen[i]), tuple(rejected[i]))))
    return out


def update(t: Trainer, features: Features, exit: Exit, pairs: Sequence[Pair], number: int) -> dict[str, float]:
    """One step down `dpo_loss`; see `Objective.update`."""
    loss, figures = dpo_loss(t, features, exit, pairs)
    return t.descend(loss, f"update {number}, exit {exit}") | figures


def dpo_loss(t: Trainer, features: Features, exit: Exit, pairs: Sequence[Pair]) -> tuple[Tensor, dict[str, float]]:
    """Loss of one update: the pairs at the exit, the first `reference_rows` of them also at the reference.

    The two parts weigh the same. Plus `sft_weight` times the cross-entropy on the chosen answers.
    """
    mine, again = t.mine(pairs), t.mine(pairs[: t.config.reference_rows])
    both, n = [*mine, *again], len(mine) + len(again)
    exits = [exit] * len(mine) + [t.llava.reference] * len(again)
    asked = t.at_exits([t.examples[p.row] for p in both], exits)
    chosen, rejected = (
        [replace(e, answer=getattr(p, name)) for e, p in zip(asked, both, strict=True)] for name in ("chosen", "rejected")
    )
    batch = t.batch([*chosen, *rejected])
    states = t.states(features, [p.row for p in both] * 2, exits * 2)
    logits, _ = t.forward(batch, states)
    with torch.no_grad(), t.untouched():
        ref_logits, _ = t.forward(batch, states)
    gain = token_logprobs(logits, batch.targets) - token_logprobs(ref_logits, batch.targets)
    gain = gain.masked_fill(~batch.mask, 0.0).sum(1)
    terms = dpo_terms(gain[:n], gain[n:], DPO.of(t.config).beta)
    weight = row_weights(batch.harmful[:n], t.harm_weights(exits))
    parts = {"exit": slice(0, len(mine)), "reference": slice(len(mine), n)}
    if not again:
        del parts["reference"]
    total, figures = torch.zeros((), device=logits.device), {"better": (gain[:n] > gain[n:]).float().mean().item()}
    for name, part in parts.items():
        preferred = (terms[part] * weight[part]).sum() / weight[part].sum()
        wanted = sft_loss(logits[:n][part], batch.targets[:n][part], batch.mask[:n][part], weight[part])
        total = total + (preferred + t.config.sft_weight * wanted) * t.share(weight[part].sum()) / len(parts)
        figures |= {f"{name}_dpo": preferred.item(), f"{name}_sft": wanted.item()}
    return total, figures


def _memory(config: AlignConfig, s: Sizes, lengths: Lengths, rows: int) -> Footprint:
    """Two answers for each row, the reference policy's logits beside the policy's, and the search for pairs before it all."""
    answer = max(lengths.answer, MAX_NEW_TOKENS)
    tokens = lengths.request + answer
    finding = min(s.chunk, DPO.of(config).rows) * (s.tower + tokens * (2 * s.kv + s.plain))
    return Footprint(answer, answers=2, arrays=2, phases={"finding pairs": finding})


L_DPO = Objective("l-dpo", update, needs_reward=True, prepare=find_pairs, memory=_memory, section=DPO)
