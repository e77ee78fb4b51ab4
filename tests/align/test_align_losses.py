"""The objectives against hand arithmetic; each listed wrong version must differ."""

from __future__ import annotations

import math

import pytest
import torch

from edgesafe.align.losses import answer_mean, distill_loss, row_weights, sft_loss

LOG3 = math.log(3.0)
# One row, three positions, two tokens. Position 0 says (3/4, 1/4), position 1 (1/2, 1/2); position 2 is padding.
LOGITS = torch.tensor([[[LOG3, 0.0], [0.0, 0.0], [50.0, 0.0]]])
TARGETS = torch.tensor([[0, 1, 1]])
MASK = torch.tensor([[True, True, False]])
ONE = torch.ones(1)


def test_sft_by_hand():
    # mean of -log 3/4 and -log 1/2
    assert sft_loss(LOGITS, TARGETS, MASK, ONE).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, rel=1e-5)


def test_sft_with_the_mask_ignored_differs():
    assert sft_loss(LOGITS, TARGETS, torch.ones_like(MASK), ONE).item() > 10


def test_distill_by_hand():
    # KL((3/4, 1/4) || (1/2, 1/2)) at position 0, 0 at position 1
    student = torch.zeros(1, 3, 2)
    want = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert distill_loss(student, LOGITS, MASK, ONE).item() == pytest.approx(want, rel=1e-5)


def test_distill_the_other_way_round_differs():
    student = torch.zeros(1, 3, 2)
    assert distill_loss(LOGITS, student, MASK, ONE).item() != pytest.approx(
        distill_loss(student, LOGITS, MASK, ONE).item(), rel=0.05
    )


def test_distill_of_itself_is_zero():
    assert distill_loss(LOGITS, LOGITS, MASK, ONE).item() == pytest.approx(0.0, abs=1e-7)


def test_harmful_rows_weigh_more():
    values, mask = torch.tensor([[4.0], [1.0]]), torch.ones(2, 1, dtype=torch.bool)
    weight = row_weights(torch.tensor([True, False]), 2.0)
    assert answer_mean(values, mask, weight).item() == pytest.approx(3.0)  # (2*4 + 1*1) / 3
