"""A whole `l-ppo` update and its sampling on a tiny checkpoint, against transformers' logits and numpy; wrong ones fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_align_ppo import advantages_by_sums

from edgesafe.align.features import Features
from edgesafe.align.objectives import l_ppo, rollout
from edgesafe.align.objectives.ppo import PPO, PpoConfig
from edgesafe.align.prepare import prepare
from edgesafe.align.settings import AlignConfig, LoraConfig, RewardConfig
from edgesafe.align.trainer import Trainer
from edgesafe.checkpoint.exit_model import exit_state, exit_states, open_images, pixel_values
from edgesafe.format.exits import Exit, parse_exits
from mutants import wrong

EXIT, ROWS, NUMBER = Exit(1), [0, 5, 2, 7], 3


@pytest.fixture(scope="module")
def run(tiny_llava, rows) -> Trainer:
    """A policy that is not the reference policy any more, with a value head that says something."""
    config = AlignConfig(
        method="l-ppo",
        tune="lora",
        data=str(rows),
        batch_size=4,
        reference_rows=2,
        lr=1e-4,
        precision="fp32",
        optimizer="adamw",
        lora=LoraConfig(r=4, alpha=8),
        reward=RewardConfig(harmlessness=1.0, helpfulness=0.5),  # near 0, so that the KL is no small part of the reward
        sections={
            "ppo": PpoConfig(
                epochs=1,
                minibatches=1,
                max_new_tokens=6,
                kl_coef=0.5,
                gamma=0.9,
                vf_coef=0.5,
                temperature=1.3,
                missing_eos_penalty=0.5,
            )
        },
    )
    t = prepare(tiny_llava, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in t.params:
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return t


@pytest.fixture(scope="module")
def features(run):
    """Tower states of the rows at every exit, so that a wrong one can be read as easily as the right one; not rounded."""
    states = {}
    for row in ROWS:
        seen = exit_states(run.llava, pixel_values(run.llava, open_images([run.examples[row].image])))
        states |= {(row, exit): exit_state(run.llava, seen, exit)[0] for exit in parse_exits("all", run.llava.n_blocks)}
    return Features(states, {})


@torch.no_grad()
def transformers_say(run, row, exit, answer):
    """Log-probabilities of an answer's tokens at the run's temperature, and the hidden states before them: [A], [A, D]."""
    e = run.examples[row]
    pixels = pixel_values(run.llava, open_images([e.image]))
    ids = torch.tensor([[*e.prompt, *answer]])
    out = run.llava.model(input_ids=ids, pixel_values=pixels, vision_feature_layer=exit.depth, output_hidden_states=True)
    before = slice(len(e.prompt) - 1, ids.shape[1] - 1)
    logp = torch.log_softmax(out.logits[0, before] / PPO.of(run.config).temperature, -1)
    return logp.gather(-1, torch.tensor(answer)[:, None])[:, 0], out.hidden_states[-1][0, before]


def independently(run, said) -> dict[str, float]:
    """The figures of the update, from the sampled answers alone."""
    c, head = PPO.of(run.config), run.policy.value_head
    kl, advantages, scores = [], [], []
    for k, answer in enumerate(said):
        row, exit = [*ROWS, *ROWS[:2]][k], EXIT if k < 4 else run.llava.reference
        logp, hidden = transformers_say(run, row, exit, answer)
        with run.peft.disable_adapter():
            ref, _ = transformers_say(run, row, exit, answer)
        text = run.llava.processor.tokenizer.decode(answer, skip_special_tokens=True)
        score = run.reward([run.examples[row].row], [text])[0] - c.missing_eos_penalty * (run.llava.eos_id not in answer)
        rewards = (-c.kl_coef * (logp - ref)).tolist()
        rewards[-1] += score
        values = (hidden @ head.weight[0] + head.bias).tolist()
        advantages += advantages_by_sums(rewards, values, c.gamma, c.gae_lambda)
        kl.append((logp - ref).sum().item())
        scores.append(score)
    a = np.array(advantages)
    # Before the first step the ratio is 1 and V the old V: the losses are the mean of whitened advantages, 0, and of A^2 / 2.
    return {
        "policy_loss": 0.0,
        "value_loss": float((a**2).mean() / 2),
        "loss": float(c.vf_coef * (a**2).mean() / 2),
        "kl": float(np.mean(kl)),
        "exit_score": float(np.mean(scores[:4])),
        "reference_score": float(np.mean(scores[4:])),
        "clipped": 0.0,
    }


def check_update(run, features) -> dict[str, float]:
    """Runs the update from the same weights each time, and compares."""
    kept, seen, real = [p.detach().clone() for p in run.params], [], Trainer.batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "batch", lambda self, examples: seen.append(real(self, examples)) or seen[-1])
        try:
            run.state.clear()
            figures = l_ppo.ppo_update(run, features, EXIT, ROWS, NUMBER)
        finally:
            with torch.no_grad():
                for p, before in zip(run.params, kept, strict=True):
                    p.copy_(before)
    batch = seen[0]
    want = independently(run, [t[m].tolist() for t, m in zip(batch.targets, batch.mask, strict=True)])
    for name, value in want.items():
        assert figures[name] == pytest.approx(value, rel=1e-4, abs=1e-5), f"{name} is wrong"
    assert figures["logprob_gap"] < 1e-4
    return figures


def test_an_update_is_what_transformers_and_numpy_give(run, features):
    figures = check_update(run, features)
    # Nothing that the wrong versions below change is too small to be seen.
    assert abs(figures["kl"]) > 0.1 and figures["value_loss"] > 0.1 and figures["exit_score"] != figures["reference_score"]


def _wrong_update(run, features, patch, mutant):
    """Puts a wrong version in place."""
    if mutant == "depth off by one":
        real = Trainer.states
        shift = lambda self, f, rows, exits: real(self, f, rows, [Exit(2) if e == EXIT else e for e in exits])  # noqa: E731
        patch.setattr(Trainer, "states", shift)
    elif mutant == "reference at the wrong depth":
        deeper = run.states(features, [*ROWS, *ROWS[:2]], [run.llava.reference] * 6)
        edit = (
            "ref_logprobs, _ = _logprobs_and_values(t, batch, states)",
            "ref_logprobs, _ = _logprobs_and_values(t, batch, deeper)",
        )
        patch.setattr(l_ppo, "roll_out", wrong(rollout.roll_out, edit, deeper=deeper))
    elif mutant == "reference is the policy itself":
        patch.setattr(l_ppo, "roll_out", wrong(rollout.roll_out, ("with t.untouched():", "if True:")))
    elif mutant == "no penalty without an end":
        patch.setattr(rollout, "_scores", wrong(rollout._scores, (" - PPO.of(t.config).missing_eos_penalty * open_ended", "")))
    elif mutant == "mean not removed":
        patch.setattr(l_ppo, "_moments", wrong(l_ppo._moments, ("return mean, ", "return 0 * mean, ")))
    elif mutant == "value loss not weighed":
        patch.setattr(l_ppo, "ppo_loss", wrong(l_ppo.ppo_loss, ("ppo.vf_coef * value", "value")))
    else:
        edits = {
            "KL dropped": ("trajectory.ref_logprobs, mask, kl_coef)", "trajectory.ref_logprobs, mask, 0.0)"),
            "KL sign flipped": ("trajectory.ref_logprobs, mask, kl_coef)", "trajectory.ref_logprobs, mask, -kl_coef)"),
            "all rows at the exit": ("exit if place < len(rows) else t.llava.reference", "exit"),
            "values dropped": ("trajectory.values.masked_fill(~mask, 0.0)", "0 * trajectory.values"),
        }
        patch.setattr(l_ppo, "ppo_update", wrong(l_ppo.ppo_update, edits[mutant]))


@pytest.mark.parametrize(
    ("mutant", "figure"),
    [
        ("depth off by one", "value_loss"),
        ("reference at the wrong depth", "value_loss"),
        ("reference is the policy itself", "value_loss"),
        ("no penalty without an end", "value_loss"),
        ("mean not removed", "policy_loss"),
        ("value loss not weighed", "loss"),
        ("KL dropped", "value_loss"),
        ("KL sign flipped", "value_loss"),
        ("all rows at the exit", "value_loss"),
        ("values dropped", "value_loss"),
    ],
)
def test_a_wrong_update_is_seen(run, features, monkeypatch, mutant, figure):
    _wrong_update(run, features, monkeypatch, mutant)
    with pytest.raises(AssertionError, match=f"^{figure} is wrong"):
        check_update(run, features)


# A minibatch after some steps: the policy is no longer the one that sampled, and answers differ in length.


@pytest.fixture(scope="module")
def minibatch(run, features):
    """Wanted answers as if they had been sampled by another policy: trajectory, advantages, returns, all [4, A]."""
    generator = torch.Generator().manual_seed(2)
    batch = run.batch([run.examples[row] for row in ROWS])
    noise = [torch.randn(batch.mask.shape, generator=generator) for _ in range(4)]
    logprobs = torch.zeros(batch.mask.shape)
    for k, row in enumerate(ROWS):
        said, _ = transformers_say(run, row, EXIT, run.examples[row].answer)
        logprobs[k, : len(said)] = said
    old = logprobs + 0.3 * noise[0]
    states = run.states(features, ROWS, [EXIT] * 4)
    return rollout.Trajectory(batch, states, torch.zeros(4), old, old, noise[1], old), noise[2], noise[3], logprobs


def check_ppo_loss(ppo_loss, run, minibatch):
    some, advantages, returns, logprobs = minibatch
    assert not some.batch.mask.all()
    with torch.no_grad():
        loss, terms = ppo_loss(run, some, advantages, returns)
    head, policy, value, clipped = run.policy.value_head, [], [], []
    for k, row in enumerate(ROWS):
        answer = run.examples[row].answer
        _, hidden = transformers_say(run, row, EXIT, answer)
        v = (hidden @ head.weight[0] + head.bias).tolist()
        for t in range(len(answer)):
            a, r, old_v = advantages[k, t].item(), returns[k, t].item(), some.values[k, t].item()
            ratio = math.exp(logprobs[k, t].item() - some.logprobs[k, t].item())
            policy.append(max(-ratio * a, -min(max(ratio, 0.8), 1.2) * a))
            near = min(max(v[t], old_v - 0.2), old_v + 0.2)
            value.append(max((v[t] - r) ** 2, (near - r) ** 2) / 2)
            clipped.append(abs(ratio - 1) > 0.2)
    assert terms == pytest.approx(
        {"policy_loss": np.mean(policy), "value_loss": np.mean(value), "clipped": np.mean(clipped)}, rel=1e-4
    )
    assert loss.item() == pytest.approx(np.mean(policy) + 0.5 * np.mean(value), rel=1e-4)
    assert 0.2 < np.mean(clipped) < 0.8


def test_a_minibatch_is_what_transformers_and_plain_loops_give(run, minibatch):
    check_ppo_loss(l_ppo.ppo_loss, run, minibatch)


@pytest.mark.parametrize(
    "edit",
    [
        ("ppo, mask = PPO.of(t.config), some.batch.mask", "ppo, mask = PPO.of(t.config), torch.ones_like(some.batch.mask)"),
        ("some.logprobs, advantages, ppo.clip_range", "some.logprobs, -advantages, ppo.clip_range"),
        ("policy_terms(logprobs, some.logprobs,", "policy_terms(some.logprobs, logprobs,"),
        ("advantages, ppo.clip_range)", "returns, ppo.clip_range)"),
        ("value_terms(values, some.values,", "value_terms(some.values, values,"),
        ("some.batch.targets, ppo.temperature", "some.batch.targets, 1.0"),
        ("policy + ppo.vf_coef * value", "policy - ppo.vf_coef * value"),
        ("policy + ppo.vf_coef * value", "policy"),
    ],
    ids=[
        "mask ignored",
        "sign flipped",
        "old and new swapped",
        "returns for advantages",
        "values swapped",
        "temperature dropped",
        "value loss climbed",
        "value loss dropped",
    ],
)
def test_a_wrong_minibatch_is_seen(run, minibatch, edit):
    with pytest.raises(AssertionError):
        check_ppo_loss(wrong(l_ppo.ppo_loss, edit), run, minibatch)


# Sampling.


def check_sample(sample, run, features):
    """Each token is where its draw falls in transformers' distribution; the rows beside a row change nothing about it."""
    uniforms = np.random.default_rng(11).random((4, 6))
    states, prompts = run.states(features, ROWS, [EXIT] * 4), [run.examples[row].prompt for row in ROWS]
    said, logprobs = sample(run.llava, prompts, states, uniforms, 1.3)
    alone, _ = sample(run.llava, prompts[2:3], states[2:3], uniforms[2:3], 1.3)
    assert alone == said[2:3]
    for k, answer in enumerate(said):
        pixels = pixel_values(run.llava, open_images([run.examples[ROWS[k]].image]))
        ids = torch.tensor([[*prompts[k], *answer]])
        with torch.no_grad():
            logits = run.llava.model(input_ids=ids, pixel_values=pixels, vision_feature_layer=EXIT.depth).logits[0]
        p = torch.softmax(logits[len(prompts[k]) - 1 : -1].double() / 1.3, -1).numpy()
        ends = p.cumsum(-1)
        for t, token in enumerate(answer):
            assert ends[t, token] - p[t, token] - 1e-6 <= uniforms[k, t] <= ends[t, token] + 1e-6
            assert logprobs[k][t] == pytest.approx(math.log(p[t, token]), abs=1e-4)


def test_samples_follow_transformers_distribution(run, features):
    check_sample(rollout.sample, run, features)


@pytest.mark.parametrize(
    "edit",
    [
        ("logits.float() / temperature", "logits.float()"),
        ("draws[rows, step, None]", "draws[rows * 0, step, None]"),
        ("draws[rows, step, None]", "draws[rows, 0, None]"),
        ("right=True).clamp(max=logits.shape[-1] - 1)", "right=True).add(1).clamp(max=logits.shape[-1] - 1)"),
    ],
    ids=["temperature dropped", "one draw for all rows", "one draw for all tokens", "token off by one"],
)
def test_a_wrong_sampler_is_seen(run, features, edit):
    with pytest.raises(AssertionError):
        check_sample(wrong(rollout.sample, edit), run, features)
