"""Several requests beside one picture, in one row: the picture's tokens are read once, and no request sees another.

Row by row this gives what each request alone would: every request stands directly behind the picture, by its positions and by
its mask. A row of `smol` is two thirds picture, so training takes less than half the time.

B groups, S tokens, N predicted tokens, P patches, W tower width, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgesafe.checkpoint.exit_model import ExitModel, answer_ids, embed, prompt_ids
from edgesafe.reference.smol.rows import Group

FIRST = 4.0  # tokens that an answer's first one counts as
_UNSEEN = -1e9  # added to the scores of what a token does not see


@dataclass(frozen=True)
class Packed:
    """A batch of groups.

    Attributes:
        ids: [B, S].
        mask: [B, 1, S, S]; True where the token of a row (third axis) sees that of a column.
        positions: [B, S].
        rows: [N], the group of each predicted token.
        columns: [N], the place from which it is predicted.
        targets: [N].
        asks: [N], the request that it belongs to, counted through the batch.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    asks: Tensor


def tokens_of(model: ExitModel, group: Group) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """The ids up to the picture's end, and of each request what follows it: the request, and the answer with its end."""
    image = model.model.config.image_token_id
    whole = [prompt_ids(model, ask.request) for ask in group.asks]
    end = len(whole[0]) - whole[0][::-1].index(image)
    return whole[0][:end], [(ids[end:], answer_ids(model, ask.answer)) for ids, ask in zip(whole, group.asks, strict=True)]


def length(model: ExitModel, group: Group) -> int:
    """How many tokens a group takes."""
    prefix, asked = tokens_of(model, group)
    return len(prefix) + sum(len(request) + len(answer) for request, answer in asked)


def pack(model: ExitModel, groups: Sequence[Group], patches: int | None = None) -> Packed:
    """Put groups into one batch, padded on the right.

    Args:
        model: Its processor makes tokens of texts.
        groups: B of them.
        patches: How many tokens a picture has; by default what `smol` has.
    """
    less = 0 if patches is None else model.image_tokens - patches
    read = [(prefix[: len(prefix) - less], asked) for prefix, asked in (tokens_of(model, group) for group in groups)]
    longest = max(len(prefix) + sum(len(r) + len(a) for r, a in asked) for prefix, asked in read)
    ids = torch.full((len(groups), longest), model.pad_id)
    positions = torch.zeros(len(groups), longest, dtype=torch.long)
    mask = torch.eye(longest, dtype=torch.bool).repeat(len(groups), 1, 1)  # a padded token sees itself: no row is empty
    predicted: list[tuple[int, int, int, int]] = []  # group, column, token, request
    count = 0
    for row, (prefix, asked) in enumerate(read):
        shared = len(prefix)
        ids[row, :shared], positions[row, :shared] = torch.tensor(prefix), torch.arange(shared)
        mask[row, :shared, :shared] = torch.ones(shared, shared, dtype=torch.bool).tril()
        start = shared
        for request, answer in asked:
            own = len(request) + len(answer)
            end = start + own
            ids[row, start:end] = torch.tensor(request + answer)
            positions[row, start:end] = torch.arange(shared, shared + own)
            mask[row, start:end, :shared] = True
            mask[row, start:end, start:end] = torch.ones(own, own, dtype=torch.bool).tril()
            first = start + len(request) - 1
            predicted += [(row, first + i, token, count) for i, token in enumerate(answer)]
            start, count = end, count + 1
    rows, columns, targets, asks = torch.tensor(predicted).T
    return Packed(ids, mask[:, None], positions, rows, columns, targets, asks)


def logits(model: ExitModel, packed: Packed, states: Tensor) -> Tensor:
    """Logits [N, V] of the predicted tokens, from the pictures' states [B, P, W]."""
    inputs = embed(model, packed.ids, states)
    added = torch.zeros(packed.mask.shape).masked_fill(~packed.mask, _UNSEEN)
    hidden = model.language(
        inputs_embeds=inputs, attention_mask=added, position_ids=packed.positions, use_cache=False
    ).last_hidden_state
    scores: Tensor = model.model.lm_head(hidden[packed.rows, packed.columns])
    return scores


def ask_losses(scores: Tensor, packed: Packed) -> Tensor:
    """The mean loss of each request's answer, in the groups' order: a long answer weighs no more than a name.

    The first token decides between an answer and a refusal, and counts as several.
    """
    losses = torch.nn.functional.cross_entropy(scores.float(), packed.targets, reduction="none")
    weights = torch.ones_like(losses)
    weights[1:][packed.asks.diff() == 0] = 1 / FIRST
    sums, totals = (torch.zeros(int(packed.asks[-1]) + 1).index_add(0, packed.asks, one) for one in (weights * losses, weights))
    return sums / totals


def kinds_of(groups: Sequence[Group]) -> list[str]:
    """The kinds of the requests, in the order of `ask_losses`."""
    return [ask.kind for group in groups for ask in group.asks]
