"""PPO's arithmetic against hand arithmetic, numpy loops and TRL's numbers; each listed wrong version must fail its check.

A wrong version is the shipped source with one edit, so a check that it passed would let the same slip into the code itself.
`trl_vectors.json` holds what TRL's own functions say; `trl_vectors.py` made it and says how.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from edgesafe.align.objectives import ppo, rollout
from mutants import wrong

TRL = json.loads((Path(__file__).parent / "trl_vectors.json").read_text())
SETTINGS = TRL["settings"]
IN = {
    name: torch.tensor(value, dtype=torch.int64 if name == "targets" else torch.float64)
    for name, value in TRL["inputs"].items()
}
MASK = IN["mask"].bool()


def trl(name: str, version: str = "0.11.4"):
    value = TRL[f"trl-{version}"][name]
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value


def same(got, want, tolerance: float = 1e-6) -> None:
    """Equal within the tolerance; where both are [3, 5], on answer tokens."""
    got, want = (torch.as_tensor(value, dtype=torch.float64) for value in (got, want))
    if got.shape == MASK.shape:
        got, want = got[MASK], want[MASK]
    assert got.shape == want.shape and torch.allclose(got, want, rtol=tolerance, atol=tolerance), (got, want)


# The checks; each takes the function that it checks.


def check_masked_mean(masked_mean):
    assert masked_mean(torch.tensor([[2.0, 4.0, 90.0]]), torch.tensor([[True, True, False]])).item() == 3.0
    same(masked_mean(IN["values"], MASK), trl("masked_mean"))
    assert masked_mean(torch.full((1, 2), math.nan), torch.zeros(1, 2, dtype=torch.bool)).item() == 0.0


def check_whiten(whiten):
    # By hand: 1, 3, 8 have the mean 4 and the variance (9 + 1 + 16) / 3.
    got = whiten(torch.tensor([[1.0, 3.0], [8.0, 70.0]]), torch.tensor([[True, True], [True, False]]))
    same(got[[0, 0, 1], [0, 1, 0]], [value / math.sqrt(26 / 3) for value in (-3, -1, 4)])
    assert got[1, 1] == 0.0
    # TRL divides by the variance of a sample, n - 1; we by the population's.
    n = int(MASK.sum())
    advantages = trl("returns") - IN["values"]
    same(whiten(advantages, MASK) * math.sqrt((n - 1) / n), trl("whitened_advantages"), 1e-5)
    given = whiten(advantages, MASK, (torch.tensor(1.0), torch.tensor(4.0)))
    same(given, (advantages - 1) / 2)


def check_kl_estimates(kl_estimates):
    k1, k2, k3 = kl_estimates(torch.tensor(-0.5).double(), torch.tensor(-1.5).double())  # log ratio 1
    same(torch.stack([k1, k2, k3]), [1.0, 0.5, math.exp(-1)])
    p, q = (torch.log_softmax(IN["logits"][0, t], -1) for t in (0, 4))
    exact = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    mean1, _, mean3 = ((p.exp() * k).sum() for k in kl_estimates(p, q))  # over all tokens, as often as the policy picks them
    same(mean1, exact)
    same(mean3, exact)
    same(ppo.masked_mean(kl_estimates(IN["new_logprobs"], IN["ref_logprobs"])[2], MASK), trl("k3", "1.16.0"))


def check_token_rewards(token_rewards):
    got = token_rewards(IN["scores"], IN["logprobs"], IN["ref_logprobs"], MASK, SETTINGS["kl_coef"])
    same(got, trl("token_rewards"))
    assert (got[~MASK] == 0).all()
    none = token_rewards(torch.ones(1), torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool), 0.1)
    assert none.tolist() == [[0.0, 0.0]]


def advantages_by_sums(rewards, values, gamma, lam):
    """Equation 16 of 1506.02438 as it stands, a sum for each token of one answer."""
    after = [*values[1:], 0.0]
    delta = [r + gamma * nxt - v for r, v, nxt in zip(rewards, values, after, strict=True)]
    return [sum((gamma * lam) ** i * d for i, d in enumerate(delta[t:])) for t in range(len(delta))]


def check_gae(gae):
    rewards = trl("token_rewards")
    got, returns = gae(rewards, IN["values"], MASK, SETTINGS["gamma"], SETTINGS["lam"])
    same(returns, trl("returns"))
    assert (got[~MASK] == 0).all() and (returns[~MASK] == 0).all()
    for gamma, lam in ((1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.8, 1.0)):
        got, returns = gae(rewards, IN["values"], MASK, gamma, lam)
        for row, length in enumerate(MASK.sum(1).tolist()):
            want = advantages_by_sums(rewards[row, :length].tolist(), IN["values"][row, :length].tolist(), gamma, lam)
            assert got[row, :length].tolist() == pytest.approx(want)
            assert returns[row, :length].tolist() == pytest.approx(
                (np.array(want) + IN["values"][row, :length].numpy()).tolist()
            )
    # The paper's A = R - V(s), R the rewards still to come: gamma = lambda = 1.
    whole, _ = gae(rewards, IN["values"], MASK, 1.0, 1.0)
    ahead = rewards.masked_fill(~MASK, 0).flip(1).cumsum(1).flip(1)
    same(whole, ahead - IN["values"])


def check_policy_terms(policy_terms):
    # By hand, ratio 2 and 1/2 at a clip of 0.2, A = 1 and -1: -1.2, 2 (never clipped), -0.5 (never clipped), 0.8.
    new, old = torch.log(torch.tensor([0.5, 0.5, 0.2, 0.2])), torch.log(torch.tensor([0.25, 0.25, 0.4, 0.4]))
    same(policy_terms(new, old, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2), [-1.2, 2.0, -0.5, 0.8])
    terms = policy_terms(IN["new_logprobs"], IN["logprobs"], trl("whitened_advantages"), SETTINGS["cliprange"])
    same(ppo.masked_mean(terms, MASK), trl("policy_loss"))
    k3 = ppo.kl_estimates(IN["new_logprobs"], IN["ref_logprobs"])[2]
    same(ppo.masked_mean(terms + 0.7 * k3, MASK), trl("clipped_plus_k3", "1.16.0"))
    one = torch.zeros(1, requires_grad=True)
    loss = policy_terms(one, torch.zeros(1), torch.ones(1), 0.2).sum()
    assert (
        loss.requires_grad and torch.autograd.grad(loss, one)[0].item() == -1.0
    )  # stepping down makes what was better than expected more likely


def check_value_terms(value_terms):
    # By hand: 1 moved from 0 by 0.2 at most, return 1: 0.8^2 / 2; return 0.1: the unclipped 0.9^2 / 2 is the larger.
    one, nought = torch.ones(2), torch.zeros(2)
    same(value_terms(one, nought, torch.tensor([1.0, 0.1]), 0.2), [0.32, 0.405])
    terms = value_terms(IN["new_values"], IN["values"], trl("returns"), SETTINGS["cliprange_value"])
    same(ppo.masked_mean(terms, MASK), trl("value_loss"))


def check_adapt_kl_coef(adapt_kl_coef):
    kl_coef = 0.1
    for kl, want in zip((9.0, 6.3, 5.1, 0.0), trl("kl_coefs"), strict=True):
        kl_coef = adapt_kl_coef(kl_coef, kl, 6.0, 10)
        same(kl_coef, want)


def check_token_logprobs(token_logprobs):
    same(token_logprobs(IN["logits"], IN["targets"], 0.7), trl("token_logprobs", "1.16.0"), 1e-5)


CHECKS = [
    (check_masked_mean, ppo.masked_mean),
    (check_whiten, ppo.whiten),
    (check_kl_estimates, ppo.kl_estimates),
    (check_token_rewards, ppo.token_rewards),
    (check_gae, ppo.gae),
    (check_policy_terms, ppo.policy_terms),
    (check_value_terms, ppo.value_terms),
    (check_adapt_kl_coef, ppo.adapt_kl_coef),
    (check_token_logprobs, rollout.token_logprobs),
]


@pytest.mark.parametrize(("check", "function"), CHECKS, ids=[function.__name__ for _, function in CHECKS])
def test_as_by_hand_and_by_trl(check, function):
    check(function)


WRONG = {
    ppo.masked_mean: {
        "mask ignored": [("values.masked_fill(~mask, 0.0)", "values")],
        "mean over the padding too": [("mask.sum().clamp(min=1)", "mask.numel()")],
    },
    ppo.whiten: {
        "mean not removed": [("(values - mean) * torch", "values * torch")],
        "variance not divided by": [("torch.rsqrt(variance + 1e-8)", "1.0")],
        "divided by the variance": [("torch.rsqrt(variance + 1e-8)", "(1 / variance)")],
        "mask ignored": [(", mask), masked_mean((values", ", mask | True), masked_mean((values")],
        "padding whitened": [(".masked_fill(~mask, 0.0)", "")],
        "given moments ignored": [("moments or ", "")],
    },
    ppo.kl_estimates: {
        "sign flipped": [("logprobs - ref_logprobs", "ref_logprobs - logprobs")],
        "k2 not halved": [("log_ratio**2 / 2", "log_ratio**2")],
        "k3 of the ratio the other way round": [("torch.expm1(-log_ratio) + log_ratio", "torch.expm1(log_ratio) - log_ratio")],
        "k3 without its linear term": [("torch.expm1(-log_ratio) + log_ratio", "torch.expm1(-log_ratio)")],
    },
    ppo.token_rewards: {
        "sign flipped": [("(-kl_coef * k1)", "(kl_coef * k1)")],
        "KL dropped": [("(-kl_coef * k1)", "(0 * k1)")],
        "KL on the last token alone": [("(-kl_coef * k1)", "(-kl_coef * k1 * (mask.cumsum(1) == mask.sum(1, keepdim=True)))")],
        "mask ignored": [(".masked_fill(~mask, 0.0)", "")],
        "score on the first token": [("mask.sum(1, keepdim=True) - 1", "mask.sum(1, keepdim=True) * 0")],
        "score one token early": [("mask.sum(1, keepdim=True) - 1", "mask.sum(1, keepdim=True) - 2")],
        "score in the last column": [("mask.sum(1, keepdim=True) - 1", "mask.sum(1, keepdim=True) * 0 + mask.shape[1] - 1")],
        "score for no answer": [("torch.where(last >= 0, scores.unsqueeze(1), 0.0)", "scores.unsqueeze(1)")],
    },
    ppo.gae: {
        "sign of the value flipped": [("- values[:, t]", "+ values[:, t]")],
        "mask ignored": [("keep = mask.to(values.dtype)", "keep = torch.ones_like(values)")],
        "lambda dropped": [("gamma * gae_lambda * ahead", "gamma * ahead")],
        "gamma dropped": [("gamma * gae_lambda * ahead", "gae_lambda * ahead")],
        "next value dropped": [("gamma * value_ahead", "0")],
        "the same value instead of the next": [("gamma * value_ahead", "gamma * values[:, t]")],
        "forwards in time": [("range(values.shape[1] - 1, -1, -1)", "range(values.shape[1])")],
        "returns without the value": [("return advantages, advantages + values", "return advantages, advantages")],
        "values of the padding": [("rewards, values = rewards * keep, values * keep", "rewards = rewards * keep")],
    },
    ppo.policy_terms: {
        "sign flipped": [("torch.maximum(-ratio * advantages, -ratio", "-torch.maximum(-ratio * advantages, -ratio")],
        "the paper's arg max": [("torch.maximum(", "-torch.minimum(-1 * -1 * ")],
        "the smaller of the two": [("torch.maximum(", "torch.minimum(")],
        "not clipped": [("-ratio.clamp(1 - clip_range, 1 + clip_range)", "-ratio")],
        "clipped above alone": [("clamp(1 - clip_range, 1 + clip_range)", "clamp(max=1 + clip_range)")],
        "ratio turned over": [("torch.exp(logprobs - old_logprobs)", "torch.exp(old_logprobs - logprobs)")],
        "old policy differentiated away": [
            ("torch.exp(logprobs - old_logprobs)", "torch.exp(logprobs - old_logprobs).detach()")
        ],
    },
    ppo.value_terms: {
        "not clipped": [("(clipped - returns)", "(values - returns)")],
        "the smaller of the two": [("torch.maximum(", "torch.minimum(")],
        "not halved": [(" / 2\n", "\n")],
        "clipped around the return": [
            ("clipped = old_values + (values - old_values)", "clipped = returns + (values - returns)")
        ],
    },
    ppo.adapt_kl_coef: {
        "sign flipped": [("(1 + error / horizon)", "(1 - error / horizon)")],
        "not clipped": [("min(max(kl / target - 1, -0.2), 0.2)", "kl / target - 1")],
        "horizon dropped": [("error / horizon)", "error)")],
    },
    rollout.token_logprobs: {
        "temperature dropped": [("logits.float() / temperature", "logits.float()")],
        "logits taken for log-probabilities": [
            ("torch.log_softmax(logits.float() / temperature, -1)", "(logits / temperature)")
        ],
    },
}
CHECK_OF = {function: check for check, function in CHECKS}
CASES = [(function, name) for function, cases in WRONG.items() for name in cases]


@pytest.mark.parametrize(("function", "name"), CASES, ids=[f"{function.__name__}: {name}" for function, name in CASES])
def test_a_wrong_version_is_seen(function, name):
    with pytest.raises(AssertionError):
        CHECK_OF[function](wrong(function, *WRONG[function][name]))
