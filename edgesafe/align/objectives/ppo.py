"""The settings of PPO, and its arithmetic as pure functions of arrays.

B answers padded to A tokens; masks are True on answer tokens.

Source for all: Schulman et al. 2017 (arXiv 1707.06347), with the per-token reward of Ziegler et al. 2019 (1909.08593); the use
at an exit depth: L-PPO, arXiv 2411.04291, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgesafe.align.settings import Limits, Section


@dataclass(frozen=True)
class PpoConfig:
    """Settings of `l-ppo`, table `[ppo]`.

    epochs, minibatches: passes over an update's rollouts, and the parts of a pass; an optimizer step each.
    clip_range: of the probability ratio. value_clip_range: of the value's move. vf_coef: weight of the value loss (the paper's
        c1).
    kl_coef: weight of the per-token KL in the reward (the paper's eta), nats. kl_target: above 0, `kl_coef` adapts until an
        answer is this many nats away from the reference policy. kl_horizon: updates over which it adapts. max_kl: nats an
        answer, above which a run has diverged.
    gamma, gae_lambda: of generalized advantage estimation.
    temperature, max_new_tokens: of the sampled answers. missing_eos_penalty: taken off the reward of an answer that does not
        end.
    """

    epochs: int = 4
    minibatches: int = 4
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    vf_coef: float = 0.1
    kl_coef: float = 0.05
    kl_target: float = 0.0
    kl_horizon: int = 50
    max_kl: float = 100.0
    gamma: float = 1.0
    gae_lambda: float = 0.95
    temperature: float = 1.0
    max_new_tokens: int = 32
    missing_eos_penalty: float = 1.0


def _limits(ppo: PpoConfig) -> Limits:
    return {
        "clip_range": (0 < ppo.clip_range < 1, ppo.clip_range, "above 0 and below 1"),
        "gamma": (0 < ppo.gamma <= 1, ppo.gamma, "above 0, at most 1"),
        "gae_lambda": (ppo.gae_lambda <= 1, ppo.gae_lambda, "0..1"),
        "temperature": (ppo.temperature > 0, ppo.temperature, "above 0"),
    }


PPO = Section("ppo", PpoConfig(), dict.fromkeys(("epochs", "minibatches", "max_new_tokens", "kl_horizon"), 1), _limits)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True positions of a mask, 0 where there is none.

    >>> masked_mean(torch.tensor([[1., 3., 50.]]), torch.tensor([[True, True, False]])).item()
    2.0
    """
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor, moments: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Values with mean 0 and variance 1 over the True positions, 0 elsewhere.

    Args:
        values: [B, A].
        mask: bool [B, A].
        moments: mean and (population) variance to use instead of these values' own, e.g. those of all processes.

    >>> whiten(torch.tensor([[1., 3., 50.]]), torch.tensor([[True, True, False]])).round(decimals=4).tolist()
    [[-1.0, 1.0, 0.0]]
    """
    mean, variance = moments or (masked_mean(values, mask), masked_mean((values - masked_mean(values, mask)) ** 2, mask))
    return ((values - mean) * torch.rsqrt(variance + 1e-8)).masked_fill(~mask, 0.0)


def kl_estimates(logprobs: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three estimates a token of KL(policy || ref_policy) from tokens that the policy sampled, in nats.

    k1 = log p/q is unbiased, k2 = (log p/q)^2 / 2 has little variance, k3 = q/p - 1 - log q/p has both and is never negative.

    Source: Schulman, "Approximating KL divergence", 2020.

    >>> [round(k.item(), 4) for k in kl_estimates(torch.tensor(-0.5), torch.tensor(-1.5))]
    [1.0, 0.5, 0.3679]
    """
    log_ratio = logprobs - ref_logprobs
    return log_ratio, log_ratio**2 / 2, torch.expm1(-log_ratio) + log_ratio


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Reward of each answer token: -kl_coef * k1, and the answer's score on its last token; 0 behind it.

    Args:
        scores: [B] rewards of whole answers.
        logprobs: [B, A] of the sampled tokens under the policy that sampled them.
        ref_logprobs: [B, A] under the reference policy at the same exit depth.
        mask: bool [B, A], a prefix of each row.
        kl_coef: the paper's eta, per nat.

    >>> token_rewards(torch.tensor([2.]), torch.tensor([[-1., -1., 0.]]), torch.tensor([[-2., -1., 0.]]),
    ...               torch.tensor([[True, True, False]]), 0.5).tolist()
    [[-0.5, 2.0, 0.0]]
    """
    k1, _, _ = kl_estimates(logprobs, ref_logprobs)
    rewards = (-kl_coef * k1).masked_fill(~mask, 0.0)
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last.clamp(min=0), torch.where(last >= 0, scores.unsqueeze(1), 0.0))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates and the returns that the value head should predict.

    Args:
        rewards: [B, A] of each token.
        values: [B, A] V(s) before each token.
        mask: bool [B, A], a prefix of each row; an answer ends with its last token, so nothing follows it.
        gamma: discount per token, 0..1.
        gae_lambda: weight of the later estimates, 0..1.

    Returns:
        Advantages and returns (advantage + value), [B, A] each, 0 where the mask is False.

    Source: Schulman et al. 2015 (1506.02438), equation 16.
    Differs: the paper writes A = R - V(s), which is this at gae_lambda = 1.

    >>> a, r = gae(torch.tensor([[0., 1.]]), torch.tensor([[0.5, 0.25]]), torch.tensor([[True, True]]), 1.0, 0.5)
    >>> a.tolist(), r.tolist()  # 1 - .25 = .75; 0 + .25 - .5 + .5 * .75 = .125
    ([[0.125, 0.75]], [[0.625, 1.0]])
    """
    keep = mask.to(values.dtype)
    rewards, values = rewards * keep, values * keep
    advantages = torch.zeros_like(values)
    ahead, value_ahead = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * value_ahead - values[:, t]
        ahead = (delta + gamma * gae_lambda * ahead) * keep[:, t]
        value_ahead = values[:, t]
        advantages[:, t] = ahead
    return advantages, advantages + values


def policy_terms(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """The clipped loss of each token, to be minimised: max(-K A, -clip(K, 1 - eps, 1 + eps) A), K the probability ratio.

    Source: arXiv 2411.04291, section 4; its Algorithm 1 prints arg max of this, a slip of sign.

    >>> ratio_2 = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    >>> round(policy_terms(*ratio_2, torch.tensor([1.0]), 0.2).item(), 4)  # clipped at 1.2
    -1.2
    """
    ratio = torch.exp(logprobs - old_logprobs)
    return torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def value_terms(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """The clipped squared error of each token's value: max((V - R)^2, (V_clipped - R)^2) / 2.

    V_clipped stays within `clip_range` of the value before the update.

    >>> one, nought = torch.tensor([1.0]), torch.tensor([0.0])
    >>> round(value_terms(one, nought, one, 0.2).item(), 4)  # moved too far: .8^2 / 2
    0.32
    """
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) / 2


def adapt_kl_coef(kl_coef: float, kl: float, target: float, horizon: int) -> float:
    """The next KL coefficient: up to 20 % / horizon more or less, by how far an answer's KL is from its target.

    Args:
        kl_coef: the current one.
        kl: mean KL of an answer, nats.
        target: the wanted one, above 0.
        horizon: updates.

    Source: Ziegler et al. 2019 (1909.08593), section 2.2, an update for their batch.

    >>> round(adapt_kl_coef(0.1, 9.0, 6.0, 10), 4), round(adapt_kl_coef(0.1, 5.4, 6.0, 10), 4)
    (0.102, 0.099)
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error / horizon)
