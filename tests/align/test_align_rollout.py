"""`l-ppo` and `l-dpo` on a tiny model: what is sampled is trained on, the reference stands at the same exit, rewards rise."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from edgesafe.align import prepare as prepare_module
from edgesafe.align.config import parse_config, recorded
from edgesafe.align.features import compute, merge_needs
from edgesafe.align.objectives import l_ppo, rollout
from edgesafe.align.objectives.l_dpo import DpoConfig, Pair, dpo_loss, find_pairs
from edgesafe.align.objectives.l_ppo import ppo_update
from edgesafe.align.objectives.ppo import PPO, PpoConfig
from edgesafe.align.objectives.rollout import roll_out, sample
from edgesafe.align.prepare import prepare
from edgesafe.align.reward.open import open_reward
from edgesafe.align.reward.overlap import TargetReward, word_f1
from edgesafe.align.settings import AlignConfig, LoraConfig, RewardConfig
from edgesafe.align.train import align
from edgesafe.certify import string_judge as judge
from edgesafe.checkpoint.exit_model import exit_state, exit_states, greedy, open_images, pixel_values
from edgesafe.errors import AlignError, ConfigError, DivergedError
from edgesafe.format.exits import Exit
from edgesafe.format.suite import Row

EXIT, ROWS = Exit(1), [0, 1, 2, 3]


def _config(rows, method="l-ppo", **changes) -> AlignConfig:
    base = AlignConfig(
        tune="lora",
        method=method,
        data=str(rows),
        exits="1,2",
        sampler="rotating",
        steps=4,
        batch_size=4,
        reference_rows=2,
        lr=5e-3,
        optimizer="adamw",
        precision="fp32",
        lora=LoraConfig(r=4, alpha=8),
    )
    sections = {
        "ppo": changes.pop("ppo", PpoConfig(epochs=2, minibatches=2, max_new_tokens=6)),
        "dpo": changes.pop("dpo", DpoConfig(rows=48, min_reward=-9.0, min_gap=1e-3)),
    }
    return dataclasses.replace(base, sections=sections, **changes)


@dataclass
class Long:
    """A reward whose best answer is known: the longer the better, up to 20 characters."""

    name: str = "long"
    identity: dict = field(default_factory=dict)

    def __call__(self, rows, answers):
        return [min(len(answer), 20) / 20 for answer in answers]


def _rollout(t, exit=EXIT, numbers=ROWS, seed=0):
    features = compute(t.llava, t.examples, merge_needs([(exit, numbers)]), teacher=False, precision="fp32")
    states = t.states(features, numbers, [exit] * len(numbers))
    uniforms = np.random.default_rng(seed).random((len(numbers), PPO.of(t.config).max_new_tokens))
    return roll_out(t, [t.examples[row] for row in numbers], states, uniforms)


@pytest.fixture(scope="module")
def run(tiny_llava, rows):
    return prepare(tiny_llava, _config(rows))


def test_log_probabilities_in_training_mode_are_those_of_the_sampling(run):
    t = _rollout(run)
    mask = t.batch.mask
    assert int(mask.sum()) > 8 and torch.equal(mask, t.sampled_logprobs < 0)
    assert (t.logprobs - t.sampled_logprobs)[mask].abs().max() < 1e-4


def test_an_answer_seen_one_token_or_one_exit_off_has_other_log_probabilities(run):
    t, deeper = _rollout(run), _rollout(run, Exit(2))
    logits, _ = run.forward(t.batch, deeper.states)
    shifted, _ = run.forward(dataclasses.replace(t.batch, where=t.batch.where - 1), t.states)
    for wrong in (logits, shifted):
        said = rollout.token_logprobs(wrong, t.batch.targets)
        assert (said - t.sampled_logprobs)[t.batch.mask].abs().max() > 1e-3


def test_the_reference_policy_runs_at_the_same_exit_without_the_adapter(tiny_llava, rows):
    run = prepare(tiny_llava, _config(rows))
    fresh = _rollout(run)
    torch.testing.assert_close(fresh.ref_logprobs, fresh.logprobs)  # an adapter that does nothing yet
    with torch.no_grad():
        for p in run.params:
            p.add_(0.05)
    moved = _rollout(run)
    batch, states = moved.batch, moved.states
    with run.untouched():
        want, _ = run.forward(batch, states)
    torch.testing.assert_close(moved.ref_logprobs, rollout.token_logprobs(want, batch.targets))
    assert (moved.ref_logprobs - moved.logprobs)[batch.mask].abs().max() > 1e-2
    needs = merge_needs([(run.llava.reference, ROWS)])
    features = compute(run.llava, run.examples, needs, teacher=False, precision="fp32")
    with run.untouched():
        wrong, _ = run.forward(batch, run.states(features, ROWS, [run.llava.reference] * len(ROWS)))
    assert (rollout.token_logprobs(wrong, batch.targets) - moved.ref_logprobs)[batch.mask].abs().max() > 1e-3


def test_a_rows_answer_does_not_depend_on_the_rows_beside_it(run):
    whole, part = _rollout(run, numbers=ROWS), None
    uniforms = np.random.default_rng(0).random((4, 6))
    features = compute(run.llava, run.examples, merge_needs([(EXIT, ROWS)]), teacher=False, precision="fp32")
    part, _ = sample(run.llava, [run.examples[2].prompt], run.states(features, [2], [EXIT]), uniforms[2:3], 1.0)
    answer = whole.batch.targets[2][whole.batch.mask[2]].tolist()
    assert part[0] == answer


def test_sampling_follows_the_models_distribution(run):
    """2,000 first tokens of one request against the model's own probabilities: Pearson's chi-square over its ten likeliest."""
    e, n = run.examples[0], 2000
    features = compute(run.llava, run.examples, merge_needs([(EXIT, [0])]), teacher=False, precision="fp32")
    states = run.states(features, [0], [EXIT])
    ids, _ = sample(run.llava, [e.prompt] * n, states.expand(n, -1, -1), np.random.default_rng(1).random((n, 1)), 1.0)
    logits, _ = run.forward(run.batch([e]), states)
    p = torch.softmax(logits[0, 0].double(), -1)
    top = p.topk(10).indices.tolist()
    counts = np.array([sum(i[0] == k for i in ids) for k in top])
    expected = n * p[top].detach().numpy()
    assert ((counts - expected) ** 2 / expected).sum() < 29.6  # the 99.9 % point of chi-square with 10 degrees of freedom


def _scores(tiny_llava, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "open_reward", lambda config: Long())
    # A random model spreads its probability over all tokens; a low temperature gives sixteen answers something to compare.
    ppo = PpoConfig(
        epochs=4, minibatches=2, max_new_tokens=2, temperature=0.25, kl_coef=0.0, missing_eos_penalty=0.0, clip_range=0.3
    )
    config = _config(rows, steps=16, batch_size=16, reference_rows=8, ppo=ppo)
    out = align(tiny_llava, config, tmp_path / "out")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    by_exit = {at: [line["exit_score"] for line in lines if line["exit"] == at] for at in ("1", "2")}
    return {**by_exit, "reference": [line["reference_score"] for line in lines]}


def test_an_answer_may_hold_the_image_token(run):
    e = run.examples[0]
    odd = dataclasses.replace(e, answer=(5, run.llava.model.config.image_token_id, run.llava.eos_id))
    features = compute(run.llava, run.examples, merge_needs([(EXIT, [0])]), teacher=False, precision="fp32")
    logits, _ = run.forward(run.batch([odd, odd]), run.states(features, [0, 0], [EXIT, EXIT]))
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)  # one row may be added up in another order


def test_a_known_reward_rises_at_every_exit(tiny_llava, rows, tmp_path, monkeypatch):
    for exit, scores in _scores(tiny_llava, rows, tmp_path, monkeypatch).items():
        assert sum(scores[-2:]) / 2 > sum(scores[:2]) / 2 + 0.25, (exit, scores)


def test_with_the_sign_of_the_advantage_flipped_it_does_not(tiny_llava, rows, tmp_path, monkeypatch):
    real = l_ppo.policy_terms
    monkeypatch.setattr(l_ppo, "policy_terms", lambda new, old, advantages, clip: real(new, old, -advantages, clip))
    for scores in _scores(tiny_llava, rows, tmp_path, monkeypatch).values():
        assert sum(scores[-2:]) / 2 < sum(scores[:2]) / 2 + 0.1, scores


def _ppo_step(t, seed_rows=ROWS):
    needs = merge_needs([(EXIT, seed_rows), (t.llava.reference, seed_rows)])
    features = compute(t.llava, t.examples, needs, teacher=False, precision="fp32")
    return ppo_update(t, features, EXIT, seed_rows, 0)


def test_rewards_move_the_value_head_and_the_adapter_alone(tiny_llava, rows):
    t = prepare(tiny_llava, _config(rows))
    before = {name: p.detach().clone() for name, p in t.policy.named_parameters()}
    figures = _ppo_step(t)
    moved = {name for name, p in t.policy.named_parameters() if not torch.equal(p, before[name])}
    assert {"value_head.weight", "value_head.bias"} <= moved and all("lora" in n or "value" in n for n in moved)
    assert figures["kl"] == pytest.approx(0.0, abs=1e-5) and figures["logprob_gap"] < 1e-4


def test_the_kl_coefficient_adapts_and_is_kept(tiny_llava, rows):
    t = prepare(
        tiny_llava, _config(rows, ppo=PpoConfig(epochs=1, minibatches=1, max_new_tokens=4, kl_target=1.0, kl_horizon=10))
    )
    assert _ppo_step(t)["kl_coef"] == 0.05
    assert t.state["kl_coef"] == pytest.approx(0.05 * (1 - 0.2 / 10))  # no KL yet: as far below the target as counts


def test_a_reward_that_is_not_a_number_stops_the_run_and_keeps_its_checkpoint(tiny_llava, rows, tmp_path, monkeypatch):
    calls = []

    class Broken(Long):
        def __call__(self, rows, answers):
            calls.append(1)
            scores = super().__call__(rows, answers)
            return [math.nan, *scores[1:]] if len(calls) == 4 else scores

    monkeypatch.setattr(prepare_module, "open_reward", lambda config: Broken())
    with pytest.raises(AlignError, match=r"reward is nan.*row train-"):
        align(tiny_llava, _config(rows, checkpoint_every=2), tmp_path / "out")
    state = torch.load(tmp_path / "out.partial" / "checkpoint.pt", weights_only=True)
    assert state["done"] == 2 and all(torch.isfinite(p).all() for p in state["params"])


def test_a_policy_too_far_from_its_reference_has_diverged(tiny_llava, rows):
    t = prepare(tiny_llava, _config(rows, ppo=PpoConfig(max_new_tokens=6, max_kl=1e-3)))
    with torch.no_grad():
        for p in t.params:
            p.add_(0.05)
    with pytest.raises(DivergedError, match=r"nats away from the reference policy at update 0, exit 1"):
        _ppo_step(t)


@pytest.fixture(scope="module")
def dpo(tiny_llava, rows):
    return prepare(tiny_llava, _config(rows, "l-dpo"))


def test_pairs_are_the_models_own_answers_at_the_reference_depth_and_at_the_exit(dpo):
    pairs = find_pairs(dpo)
    assert set(pairs) <= {Exit(1), Exit(2)} and sum(map(len, pairs.values())) > 4
    for exit, some in pairs.items():
        pair = some[0]
        e = dpo.examples[pair.row]
        seen = exit_states(dpo.llava, pixel_values(dpo.llava, open_images([e.image])))
        for ids, at in ((pair.chosen, dpo.llava.reference), (pair.rejected, exit)):
            text = dpo.llava.processor.tokenizer.decode([i for i in ids if i != dpo.llava.eos_id], skip_special_tokens=True)
            assert greedy(dpo.llava, [e.prompt], exit_state(dpo.llava, seen, at), 32) == [text.strip()]
        better, worse = (
            dpo.reward([e.row], [dpo.llava.processor.tokenizer.decode(a)])[0] for a in (pair.chosen, pair.rejected)
        )
        assert better > worse


def test_an_untouched_policy_has_the_loss_of_a_coin_and_learns_the_preference(tiny_llava, rows):
    t = prepare(tiny_llava, _config(rows, "l-dpo", sft_weight=0.0))
    pairs = [Pair(row, (5, 6, t.llava.eos_id), (7, 8, 9, t.llava.eos_id)) for row in ROWS]
    needs = merge_needs([(EXIT, ROWS), (t.llava.reference, ROWS)])
    features = compute(t.llava, t.examples, needs, teacher=False, precision="fp32")
    loss, _ = dpo_loss(t, features, EXIT, pairs)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)  # -log sigmoid(0), at the exit and at the reference depth
    for _ in range(8):
        loss, figures = dpo_loss(t, features, EXIT, pairs)
        t.descend(loss, "a test")
    assert loss.item() < 0.6 and figures["better"] == 1.0


def test_without_a_pair_there_is_nothing_to_prefer(tiny_llava, rows, tmp_path):
    with pytest.raises(AlignError, match="no exit answers worse"):
        align(tiny_llava, _config(rows, "l-dpo", dpo=DpoConfig(rows=8, min_reward=2.0)), tmp_path / "out")


def _row(cls, target):
    return Row("r", cls, "f", None, "Do it.", target, (), "t", False)


def test_the_reward_of_refusing_everything_is_below_the_right_answers_and_the_balance_counts():
    reward, no = TargetReward(harmlessness=5.0, helpfulness=1.0), "I can't help."
    rows = [_row("harmful", no), _row("harmless", "Here is how to draw."), _row("task", "It is red.")]
    right = reward(rows, [r.target for r in rows])
    refusing, helping = reward(rows, [no] * 3), reward(rows, ["Here is how to draw."] * 3)
    assert right == [1.0, 1.0, 1.0] and refusing == [1.0, -1.0, -1.0] and helping[0] == -5.0
    assert sum(refusing) < sum(right) and sum(helping) < sum(refusing)
    # By hand: "It is blue." shares two of three words: F1 2/3, so 1 - 1/3 * 2.
    assert reward(rows[2:], ["It is blue."]) == [pytest.approx(1 / 3)] and word_f1(
        "It is blue.", "It is red."
    ) == pytest.approx(2 / 3)


def test_the_reward_is_neither_of_the_judges():
    reward = open_reward(RewardConfig())
    assert reward.identity["name"] != judge.JUDGE["name"] and "certify" not in type(reward).__module__


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"optimizer": "muon"}, "value head"),
        ({"tune": "full", "optimizer": "muon"}, "value head"),
        ({"lora": LoraConfig(dropout=0.1)}, "dropout"),
        ({"sampler": "harm"}, "eval.every"),
        ({"ppo": PpoConfig(minibatches=99)}, "minibatches"),
        ({"ppo": PpoConfig(clip_range=1.0)}, "clip_range"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(rows, changes, names):
    obj = recorded(_config(rows, **changes))
    obj["focus"], obj["lora"]["targets"] = list(obj["focus"]), list(obj["lora"]["targets"])
    with pytest.raises(ConfigError, match=names):
        parse_config(obj, "test")
