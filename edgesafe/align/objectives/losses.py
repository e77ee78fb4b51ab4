"""The losses, as pure functions of logits. B answers padded to A tokens, V tokens in the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def answer_mean(values: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over answers of the mean over each answer's tokens.

    Args:
        values: [B, A] a figure for each position.
        mask: bool [B, A]; True where an answer token is predicted.
        weight: [B] weight of each row, 0 or more, not all 0.

    Returns:
        A scalar. A long answer counts no more than a short one.

    >>> answer_mean(torch.tensor([[1., 3., 9.], [5., 9., 9.]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(),
    ...             torch.tensor([1., 3.])).item()
    4.25
    """
    rows = values.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    return (rows * weight).sum() / weight.sum()


def sft_loss(logits: Tensor, targets: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy on answer tokens, in nats a token.

    Args:
        logits: [B, A, V].
        targets: int64 [B, A], the token that each position should predict.
        mask: bool [B, A]; True where an answer token is predicted.
        weight: [B].

    >>> even = torch.zeros(1, 2, 4)
    >>> round(sft_loss(even, torch.tensor([[3, 0]]), torch.tensor([[True, False]]), torch.ones(1)).item(), 4)  # ln 4
    1.3863
    """
    token = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    return answer_mean(token, mask, weight)


def distill_loss(student: Tensor, teacher: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """KL(teacher || student) on answer tokens, in nats a token.

    Args:
        student: [B, A, V] logits at the exit depth.
        teacher: [B, A, V] logits or log-probabilities of the untouched model at its reference depth, teacher-forced on the
            same answer.
        mask: bool [B, A]; True where an answer token is predicted.
        weight: [B].

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2, at temperature 1; exits as students of the last exit: Phuong and
        Lampert, ICCV 2019.
    Differs: this direction makes the student cover all that the teacher does. KL(student || teacher), the direction of PPO's
        penalty, would let an exit settle on either refusing or complying where the teacher is sure of one.

    >>> teacher, student = torch.tensor([[[0.75, 0.25]]]).log(), torch.zeros(1, 1, 2)
    >>> round(distill_loss(student, teacher, torch.tensor([[True]]), torch.ones(1)).item(), 4)  # .75 ln 1.5 + .25 ln .5
    0.1308
    """
    log_p = F.log_softmax(teacher.float(), -1)
    log_q = F.log_softmax(student.float(), -1)
    return answer_mean((log_p.exp() * (log_p - log_q)).sum(-1), mask, weight)


def dpo_terms(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta * (chosen - rejected)) of each pair, in nats.

    Args:
        chosen: [B] log pi(y) / pi_ref(y) of the better answer, summed over its tokens.
        rejected: [B] the same of the worse answer.
        beta: above 0.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7.

    >>> round(dpo_terms(torch.tensor([2.0]), torch.tensor([-1.0]), 0.5).item(), 4)  # log(1 + e^-1.5)
    0.2014
    """
    return -F.logsigmoid(beta * (chosen - rejected))


def row_weights(harmful: Tensor, harm_weight: Tensor | float) -> Tensor:
    """[B] bool -> [B] float: a harmful row counts `harm_weight` times (one figure, or one per row).

    Why: where an exit can't tell dangerous from harmless, the loss is least at a refusal probability of
    w h / (w h + 1 - h), h the share of harmful rows among those that look alike and w this weight.

    >>> row_weights(torch.tensor([True, False]), 2.0).tolist()
    [2.0, 1.0]
    """
    return torch.where(harmful, harm_weight, 1.0)


def wanted_loss(
    student: Tensor, teacher: Tensor | None, targets: Tensor, mask: Tensor, weight: Tensor, sft_weight: float
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one part of an update (the exit's or the reference depth's) and its terms by name.

    `teacher` None is the method `l-sft`; otherwise `self-distill`: KL + sft_weight * cross-entropy. Shapes as above.
    """
    supervised = sft_loss(student, targets, mask, weight)
    if teacher is None:
        return supervised, {"sft": supervised.item()}
    distilled = distill_loss(student, teacher, mask, weight)
    return distilled + sft_weight * supervised, {"sft": supervised.item(), "kl": distilled.item()}
