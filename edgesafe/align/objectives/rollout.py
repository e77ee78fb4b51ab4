"""Sampled answers and all that `l-ppo` needs to know about them. B answers padded to A tokens, P patches, W tower width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from edgesafe.align.data import Batch, Example
from edgesafe.align.objectives.ppo import PPO
from edgesafe.align.trainer import Trainer
from edgesafe.checkpoint.exit_model import ExitModel, generate
from edgesafe.errors import AlignError

LOGIT_BYTES = 2**28  # of the logits that one pass over the rollouts may hold at once


@dataclass(frozen=True)
class Trajectory:
    """Sampled answers.

    batch: requests and answers; `mask` is True on answer tokens, the end token included.
    states: [B, P, W] exit states. scores: [B] rewards of whole answers.
    logprobs, ref_logprobs: [B, A] of the sampled tokens under the policy before the update and under the reference policy at
        the same exit depth. values: [B, A] before the update. sampled_logprobs: [B, A] as they were while sampling.
    """

    batch: Batch
    states: Tensor
    scores: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    sampled_logprobs: Tensor

    def __getitem__(self, rows: Tensor) -> Trajectory:
        """Some of its rows."""
        return Trajectory(*(value[rows] for value in vars(self).values()))


def sample(
    llava: ExitModel, prompts: Sequence[Sequence[int]], states: Tensor, uniforms: np.ndarray, temperature: float
) -> tuple[list[list[int]], list[list[float]]]:
    """Sample answers by inverting the cumulative distribution, so that a row's answer does not depend on the rows beside it.

    Args:
        llava: the model that answers.
        prompts: B requests' ids.
        states: [B, P, W].
        uniforms: float [B, T] in 0..1, a draw for each of at most T tokens.
        temperature: above 0.

    Returns:
        Answers' ids and the log-probability of each, nats.
    """
    draws, logprobs = torch.from_numpy(uniforms).to(states.device), [list[float]() for _ in prompts]

    def pick(logits: Tensor, rows: Tensor, step: int) -> Tensor:
        logp = torch.log_softmax(logits.float() / temperature, -1)
        mass = logp.double().exp().cumsum(-1)
        token = torch.searchsorted(mass, draws[rows, step, None] * mass[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
        for row, value in zip(rows.tolist(), logp.gather(-1, token).flatten().tolist(), strict=True):
            logprobs[row].append(value)
        return token.flatten()

    return generate(llava, prompts, states, uniforms.shape[1], pick), logprobs


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [B, A] of given tokens [B, A] under logits [B, A, V]."""
    return torch.log_softmax(logits.float() / temperature, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def roll_out(t: Trainer, examples: Sequence[Example], states: Tensor, uniforms: np.ndarray) -> Trajectory:
    """Sample an answer to each example's request, score it, and run both policies over it again as training will.

    Raises:
        AlignError: a score that is not finite.
    """
    ppo = PPO.of(t.config)
    t.policy.eval()
    with t.gathered():
        answers, sampled = sample(t.llava, [e.prompt for e in examples], states, uniforms, ppo.temperature)
    t.tokens += sum(len(e.prompt) + len(ids) for e, ids in zip(examples, answers, strict=True))
    batch = t.batch([replace(e, answer=tuple(ids)) for e, ids in zip(examples, answers, strict=True)])
    t.policy.train()
    logprobs, values = _logprobs_and_values(t, batch, states)
    with t.untouched():
        ref_logprobs, _ = _logprobs_and_values(t, batch, states)
    padded = torch.zeros_like(batch.mask, dtype=torch.float32)
    for i, line in enumerate(sampled):
        padded[i, : len(line)] = torch.tensor(line)
    return Trajectory(
        batch,
        states,
        _scores(t, examples, answers).to(states.device),
        logprobs,
        ref_logprobs,
        values,
        padded,
    )


def _logprobs_and_values(t: Trainer, batch: Batch, states: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the sampled tokens and values, [B, A] each, a few rows at a time where the vocabulary is large."""
    ppo = PPO.of(t.config)
    # By the longest answer that there may be: processes must call the model equally often, whatever they sampled.
    size = max(1, LOGIT_BYTES // (4 * ppo.max_new_tokens * t.llava.model.config.text_config.vocab_size))
    logprobs, values = [], []
    for rows in torch.split(torch.arange(len(states), device=states.device), size):
        logits, some = t.forward(batch[rows], states[rows])
        assert some is not None
        logprobs.append(token_logprobs(logits, batch.targets[rows], ppo.temperature))
        values.append(some)
    return torch.cat(logprobs), torch.cat(values)


def _scores(t: Trainer, examples: Sequence[Example], answers: Sequence[Sequence[int]]) -> Tensor:
    """[B] rewards of whole answers, less the penalty of those that do not end."""
    scores = torch.tensor(t.score(examples, answers), dtype=torch.float32)
    if not bool(torch.isfinite(scores).all()):
        first = int(torch.nonzero(~torch.isfinite(scores))[0])
        row = examples[first].row
        raise AlignError(
            f"the reward is {scores[first].item()}",
            where=f"reward {t.reward and t.reward.name}, row {row.id if row else first}",
            expected="a finite figure for every answer",
            todo="use another reward model",
        )
    open_ended = torch.tensor([not set(t.llava.eos_ids) & set(ids) for ids in answers])
    return scores - PPO.of(t.config).missing_eos_penalty * open_ended
