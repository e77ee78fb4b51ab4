"""The objectives against hand arithmetic; each listed wrong version must differ."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from edgesafe.align.objectives.losses import answer_mean, distill_loss, row_weights, sft_loss, wanted_loss

LOG3 = math.log(3.0)
# One row, three positions, two tokens. Position 0 says (3/4, 1/4), position 1 (1/2, 1/2); position 2 is padding.
LOGITS = torch.tensor([[[LOG3, 0.0], [0.0, 0.0], [50.0, 0.0]]])
TARGETS = torch.tensor([[0, 1, 1]])
MASK = torch.tensor([[True, True, False]])
ONE = torch.ones(1)
EVEN = torch.zeros(1, 3, 2)
SFT = (math.log(4 / 3) + math.log(2)) / 2  # mean of -log 3/4 and -log 1/2
KL = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2  # KL((3/4, 1/4) || (1/2, 1/2)) at position 0, 0 at position 1


def test_sft_by_hand():
    assert sft_loss(LOGITS, TARGETS, MASK, ONE).item() == pytest.approx(SFT, rel=1e-5)


def test_sft_with_the_mask_ignored_differs():
    assert sft_loss(LOGITS, TARGETS, torch.ones_like(MASK), ONE).item() > 10


def test_distill_by_hand():
    assert distill_loss(EVEN, LOGITS, MASK, ONE).item() == pytest.approx(KL, rel=1e-5)


def test_distill_with_the_mask_ignored_differs():
    assert distill_loss(EVEN, LOGITS, torch.ones_like(MASK), ONE).item() > 2 * KL


def test_distill_the_other_way_round_differs():
    # KL((1/2, 1/2) || (3/4, 1/4)) = .5 ln(2/3) + .5 ln 2 at position 0
    flipped = distill_loss(LOGITS, EVEN, MASK, ONE).item()
    assert flipped == pytest.approx((0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2, rel=1e-5)
    assert flipped != pytest.approx(KL, rel=0.05)


def test_distill_takes_log_probabilities_as_it_takes_logits():
    said = F.log_softmax(LOGITS, -1)
    assert distill_loss(EVEN, said, MASK, ONE).item() == pytest.approx(KL, rel=1e-5)


def test_distill_of_itself_is_zero():
    assert distill_loss(LOGITS, LOGITS, MASK, ONE).item() == pytest.approx(0.0, abs=1e-7)


def test_distill_agrees_with_torch():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    want = F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), log_target=True, reduction="none").sum(-1).mean()
    whole = torch.ones(2, 3, dtype=torch.bool)
    assert distill_loss(student, teacher, whole, torch.ones(2)).item() == pytest.approx(want.item(), rel=1e-5)


def test_what_stands_in_padding_never_counts():
    values = torch.tensor([[1.0, math.nan], [3.0, math.inf]])
    mask = torch.tensor([[True, False], [True, False]])
    assert answer_mean(values, mask, torch.ones(2)).item() == 2.0


def test_a_long_answer_counts_no_more_than_a_short_one():
    values, mask = torch.tensor([[6.0, 6.0, 6.0], [2.0, 0.0, 0.0]]), torch.tensor([[True] * 3, [True, False, False]])
    assert answer_mean(values, mask, torch.ones(2)).item() == 4.0  # and not 20 / 4


def test_harmful_rows_weigh_more():
    values, mask = torch.tensor([[4.0], [1.0]]), torch.ones(2, 1, dtype=torch.bool)
    weight = row_weights(torch.tensor([True, False]), 2.0)
    assert answer_mean(values, mask, weight).item() == pytest.approx(3.0)  # (2*4 + 1*1) / 3


@pytest.mark.parametrize("weight", [1.0, 2.0, 8.0])
def test_the_weight_sets_how_often_an_unsure_exit_refuses(weight):
    # Two rows that look alike, one harmful: the best refusal probability is w / (w + 1), as row_weights says for h = 1/2.
    logit = torch.zeros(1, requires_grad=True)
    rows = row_weights(torch.tensor([True, False]), weight)
    optimizer = torch.optim.LBFGS([logit], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logits = torch.stack([logit, torch.zeros(1)], -1).expand(2, 1, 2)  # token 0 refuses, token 1 complies
        value = sft_loss(logits, torch.tensor([[0], [1]]), torch.ones(2, 1, dtype=torch.bool), rows)
        value.backward()
        return value

    optimizer.step(loss)
    assert torch.sigmoid(logit).item() == pytest.approx(weight / (weight + 1), abs=1e-3)


def test_the_objective_is_kl_plus_weighted_cross_entropy():
    loss, terms = wanted_loss(EVEN, LOGITS, TARGETS, MASK, ONE, 0.5)
    assert loss.item() == pytest.approx(KL + 0.5 * math.log(2), rel=1e-5)
    assert terms == {"sft": pytest.approx(math.log(2), rel=1e-5), "kl": pytest.approx(KL, rel=1e-5)}


def test_without_a_teacher_the_objective_is_cross_entropy_alone():
    loss, terms = wanted_loss(LOGITS, None, TARGETS, MASK, ONE, 0.5)
    assert loss.item() == pytest.approx(SFT, rel=1e-5) and list(terms) == ["sft"]
