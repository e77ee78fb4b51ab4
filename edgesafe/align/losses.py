"""The objectives, as pure functions of logits. B sequences padded to S positions, V tokens in the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def answer_mean(values: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over answers of the mean over each answer's tokens.

    Args:
        values: [B, S] a figure for each position.
        mask: bool [B, S]; True at positions that predict an answer token.
        weight: [B] weight of each row.

    >>> answer_mean(torch.tensor([[1., 3., 9.], [5., 9., 9.]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(),
    ...             torch.tensor([1., 3.])).item()
    4.25
    """
    rows = (values * mask).sum(1) / mask.sum(1).clamp(min=1)
    return (rows * weight).sum() / weight.sum()


def sft_loss(logits: Tensor, targets: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy on answer tokens: logits [B, S, V], targets [B, S] (the token that each position should predict)."""
    token = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    return answer_mean(token, mask, weight)


def distill_loss(student: Tensor, teacher: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """KL(teacher || student) on answer tokens.

    Args:
        student: [B, S, V] logits at the exit depth.
        teacher: [B, S, V] logits of the untouched model at its reference depth, teacher-forced on the same answer.
        mask: bool [B, S]; True at positions that predict an answer token.
        weight: [B].

    Source: Hinton et al. 2015, arXiv 1503.02531, eq. 1 at temperature 1; exits as students of the last exit: Phuong and
        Lampert, ICCV 2019.
    """
    log_p = F.log_softmax(teacher.float(), -1)
    log_q = F.log_softmax(student.float(), -1)
    return answer_mean((log_p.exp() * (log_p - log_q)).sum(-1), mask, weight)


def row_weights(harmful: Tensor, harm_weight: float) -> Tensor:
    """[B] bool -> [B] float: a harmful row counts `harm_weight` times.

    >>> row_weights(torch.tensor([True, False]), 2.0).tolist()
    [2.0, 1.0]
    """
    return torch.where(harmful, harm_weight, 1.0)
