"""`l-ppo`: sampled answers at the exit and at the reference, then several epochs of clipped steps.

Source: L-PPO, arXiv 2411.04291, section 4 and Algorithm 1; what differs is in README.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edgesafe.align.features import Features
from edgesafe.align.objectives.ppo import PPO, adapt_kl_coef, gae, masked_mean, policy_terms, token_rewards, value_terms, whiten
from edgesafe.align.objectives.rollout import LOGIT_BYTES, Trajectory, roll_out, token_logprobs
from edgesafe.align.settings import AlignConfig, Limits
from edgesafe.align.sizes import LOGITS, Footprint, Lengths, Sizes
from edgesafe.align.trainer import Objective, Trainer
from edgesafe.errors import DivergedError
from edgesafe.format.exits import Exit


def ppo_update(t: Trainer, features: Features, exit: Exit, rows: Sequence[int], number: int) -> dict[str, float]:
    """Roll out, then step down the PPO loss `epochs` x `minibatches` times.

    Args:
        t: the run; its policy has a value head.
        features: tower states of the rows at the exit and at the reference.
        exit: which one.
        rows: row numbers of the update, all processes'; the first `reference_rows` also go through the reference.
        number: of the update.

    Returns:
        Figures for the metrics; `exit_score` and `reference_score` are mean rewards without the KL.

    Raises:
        AlignError: a reward that is not finite.
        DivergedError: a loss, gradient or KL beyond limits.
    """
    ppo, again = PPO.of(t.config), rows[: t.config.reference_rows]
    uniforms = np.random.default_rng([t.config.seed, 4, number]).random((len(rows) + len(again), ppo.max_new_tokens))
    mine, places = t.mine(rows) + t.mine(again), t.mine(range(len(rows))) + t.mine(range(len(rows), len(uniforms)))
    exits = [exit if place < len(rows) else t.llava.reference for place in places]
    states = t.states(features, mine, exits)
    trajectory = roll_out(t, t.at_exits([t.examples[row] for row in mine], exits), states, uniforms[places])
    kl_coef = float(t.state.setdefault("kl_coef", ppo.kl_coef))
    figures = _describe(t, trajectory, torch.tensor([place < len(rows) for place in places], device=states.device))
    where = f"update {number}, exit {exit}"
    _check_drift(figures["kl"], ppo.max_kl, where)
    mask = trajectory.batch.mask
    rewards = token_rewards(trajectory.scores, trajectory.logprobs, trajectory.ref_logprobs, mask, kl_coef)
    advantages, returns = gae(rewards, trajectory.values.masked_fill(~mask, 0.0), mask, ppo.gamma, ppo.gae_lambda)
    advantages = whiten(advantages, mask, _moments(t, advantages, mask))
    rng = np.random.default_rng([t.config.seed, 5, number])
    for _ in range(ppo.epochs):
        for part in np.array_split(rng.permutation(len(mine)), ppo.minibatches):
            some = torch.from_numpy(part).to(states.device)
            loss, terms = ppo_loss(t, trajectory[some], advantages[some], returns[some])
            figures |= terms | t.descend(loss, where)
    if ppo.kl_target:
        t.state["kl_coef"] = adapt_kl_coef(kl_coef, figures["kl"], ppo.kl_target, ppo.kl_horizon)
    return {**figures, "kl_coef": kl_coef}


def _check_drift(kl: float, max_kl: float, where: str) -> None:
    if not kl <= max_kl:  # NaN too
        raise DivergedError(
            f"an answer is {kl:g} nats away from the reference policy at {where}",
            expected=f"at most ppo.max_kl = {max_kl:g}",
            todo="run again with a lower lr or a higher kl_coef",
        )


def ppo_loss(t: Trainer, some: Trajectory, advantages: Tensor, returns: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Policy loss + vf_coef * value loss of a minibatch, means over its answer tokens.

    Args:
        t: the run.
        some: the minibatch's rollouts.
        advantages: [B, A], whitened.
        returns: [B, A], what the value head should predict.
    """
    ppo, mask = PPO.of(t.config), some.batch.mask
    logits, values = t.forward(some.batch, some.states)
    logprobs = token_logprobs(logits, some.batch.targets, ppo.temperature)
    policy = masked_mean(policy_terms(logprobs, some.logprobs, advantages, ppo.clip_range), mask)
    assert values is not None
    value = masked_mean(value_terms(values, some.values, returns, ppo.value_clip_range), mask)
    share = t.share(mask.sum())
    clipped = ((logprobs - some.logprobs).exp() - 1).abs() > ppo.clip_range
    terms = {"policy_loss": policy.item(), "value_loss": value.item(), "clipped": masked_mean(clipped.float(), mask).item()}
    return (policy + ppo.vf_coef * value) * share, terms


def _moments(t: Trainer, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the advantages over the answer tokens of all processes."""
    count = t.total(mask.sum().float())
    mean = t.total(advantages.sum()) / count
    return mean, t.total((advantages - mean).masked_fill(~mask, 0.0).square().sum()) / count


def _describe(t: Trainer, trajectory: Trajectory, at_exit: Tensor) -> dict[str, float]:
    """Figures of the rollouts for the metrics.

    Mean score at the exit and at the reference, KL of an answer (nats), its tokens, and how far sampling and training are
    apart on the log-probabilities.
    """
    mask = trajectory.batch.mask
    gap = (trajectory.logprobs - trajectory.sampled_logprobs).masked_fill(~mask, 0.0).abs().max()
    kl = (trajectory.logprobs - trajectory.ref_logprobs).masked_fill(~mask, 0.0).sum(1)

    def mean(values: Tensor, rows: Tensor) -> float:
        return float(t.total(values[rows].sum()) / t.total(rows.sum()).clamp(min=1))

    every = torch.ones_like(at_exit)
    return {
        "exit_score": mean(trajectory.scores, at_exit),
        "reference_score": mean(trajectory.scores, ~at_exit),
        "kl": mean(kl, every),
        "answer_tokens": mean(mask.sum(1).float(), every),
        "logprob_gap": gap.item(),
    }


def _memory(config: AlignConfig, s: Sizes, lengths: Lengths, rows: int) -> Footprint:
    """Answers as long as sampling allows, a minibatch of them at a time, and the sampling itself."""
    ppo = PPO.of(config)
    tokens, logits = lengths.request + ppo.max_new_tokens, ppo.max_new_tokens * s.vocabulary
    held = min(rows * logits, LOGIT_BYTES / 4 + logits)  # LOGIT_BYTES of float32
    sampling = rows * tokens * (2 * s.kv + s.plain) + (LOGITS + 1) * held
    return Footprint(ppo.max_new_tokens, parts=ppo.minibatches, phases={"sampling": sampling})


def _limits(config: AlignConfig, processes: int) -> Limits:
    ppo, rows = PPO.of(config), (config.batch_size + config.reference_rows) // processes
    return {
        "lora.dropout": (not config.lora.dropout, config.lora.dropout, "0: an answer's probability must not be random"),
        "ppo.minibatches": (
            ppo.minibatches <= rows,
            ppo.minibatches,
            f"at most {rows}, the rows of an update" + (" that a process has" if processes > 1 else ""),
        ),
    }


L_PPO = Objective("l-ppo", ppo_update, needs_reward=True, has_value_head=True, memory=_memory, section=PPO, limits=_limits)
