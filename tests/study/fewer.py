"""Other ways than the product's striding to make a picture's tokens fewer, to compare with it.

Each takes the place of the product's for the length of a run; no checkpoint or bundle holds one.

B pictures, P patches, W tower width, D text width, n tokens that are left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from edgesafe.align import features
from edgesafe.checkpoint import exit_model
from edgesafe.checkpoint.exit_maps import projector_input
from edgesafe.checkpoint.exit_model import ExitModel
from edgesafe.evaluate import answers
from edgesafe.format.exits import Exit, kept_places
from study.plan import AVERAGED_BEFORE, AVERAGED_BEHIND

# The model, an exit with fewer tokens, the tower's states by depth [B, P, W], and the pixels that they are of [B, 3, H, W].
Reduction = Callable[[ExitModel, Exit, Sequence[Tensor], Tensor], Tensor]

_SEED = 0


def averaged(tokens: Tensor, count: int) -> Tensor:
    """Means over the squares of a square of tokens: [B, P, D] to [B, count, D]."""
    side, kept = math.isqrt(tokens.shape[1]), math.isqrt(count)
    square = tokens.transpose(1, 2).unflatten(2, (side, side))
    return functional.avg_pool2d(square, side // kept).flatten(2).transpose(1, 2)


def random_places(pictures: int, patches: int, count: int) -> Tensor:
    """Places [B, count], ascending, drawn for each picture; those of a smaller count are among those of a larger one."""
    drawn = torch.rand(pictures, patches, generator=torch.Generator().manual_seed(_SEED))
    return _largest(drawn, count)


def shrunk(pixels: Tensor, times: float) -> Tensor:
    """Pixels [B, 3, H, W] averaged to a picture whose sides are so many times shorter."""
    return functional.adaptive_avg_pool2d(pixels, round(pixels.shape[-1] / times))


def class_attention(model: ExitModel, pixels: Tensor, depth: int) -> Tensor:
    """How much the class token attends to each patch in the last of `depth` blocks, the mean of the heads [B, P]."""
    tower = model.model.get_submodule(model.recipe.tower)
    with patch.object(tower.config, "_attn_implementation_internal", "eager"):
        found = tower(pixels, output_attentions=True).attentions[depth - 1]
    return found[:, :, 0, model.geometry.dropped :].mean(1)


def _largest(values: Tensor, count: int) -> Tensor:
    return values.topk(count, dim=1).indices.sort(dim=1).values


def _kept(read: Tensor, places: Tensor) -> Tensor:
    return read.gather(1, places.unsqueeze(-1).expand(-1, -1, read.shape[-1]))


def _read(model: ExitModel, exit: Exit, states: Sequence[Tensor]) -> Tensor:
    return projector_input(model.model, model.recipe, states[exit.depth], exit.depth)


def _count(exit: Exit) -> int:
    assert exit.visual_tokens is not None
    return exit.visual_tokens


def _before(model: ExitModel, exit: Exit, states: Sequence[Tensor], pixels: Tensor) -> Tensor:
    """Averages of what the projector would read."""
    return averaged(_read(model, exit, states), _count(exit))


def _behind(model: ExitModel, exit: Exit, states: Sequence[Tensor], pixels: Tensor) -> Tensor:
    """All of them: `_averaging` makes them fewer behind the projector."""
    return _read(model, exit, states)


def _random(model: ExitModel, exit: Exit, states: Sequence[Tensor], pixels: Tensor) -> Tensor:
    read = _read(model, exit, states)
    return _kept(read, random_places(*read.shape[:2], _count(exit)))


def _attended(model: ExitModel, exit: Exit, states: Sequence[Tensor], pixels: Tensor) -> Tensor:
    """The tokens that the class token attends to most."""
    return _kept(_read(model, exit, states), _largest(class_attention(model, pixels, exit.depth), _count(exit)))


def _blurred(model: ExitModel, exit: Exit, states: Sequence[Tensor], pixels: Tensor) -> Tensor:
    """The tower sees all patches of a picture that was averaged and enlarged again; its tokens are strided as the product's."""
    patches = states[0].shape[1]
    small = shrunk(pixels, math.sqrt(patches / _count(exit)))
    back = functional.interpolate(small, pixels.shape[-2:], mode="bicubic")
    read = _read(model, exit, exit_model.exit_states(model, back))
    return read[:, kept_places(patches, _count(exit))]


@torch.no_grad()
def _smaller(model: ExitModel, exit: Exit, states: Sequence[Tensor], pixels: Tensor) -> Tensor:
    """The tower sees the averaged picture itself, in patches of the size that it knows, at positions between the known ones."""
    small = shrunk(pixels, math.sqrt(states[0].shape[1] / _count(exit)))
    tower = model.model.get_submodule(model.recipe.tower)
    found = tower(small, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    return _read(model, exit, [state[:, model.geometry.dropped :] for state in found])


REDUCTIONS: Mapping[str, Reduction] = {
    AVERAGED_BEFORE: _before,
    AVERAGED_BEHIND: _behind,
    "random places": _random,
    "smaller picture": _smaller,
    "blurred picture": _blurred,
    "most attended": _attended,
}


@contextmanager
def reduced(how: str) -> Iterator[None]:
    """Until the block ends, exits with fewer tokens train and answer with tokens made fewer by one of `REDUCTIONS`.

    Args:
        how: Which one.
    """
    seen: list[Tensor] = []

    def exit_states(model: ExitModel, pixels: Tensor, deepest: int | None = None) -> tuple[Tensor, ...]:
        seen[:] = [pixels]
        return exit_model.exit_states(model, pixels, deepest)

    @torch.no_grad()
    def exit_state(model: ExitModel, states: Sequence[Tensor], exit: Exit) -> Tensor:
        if exit.visual_tokens is None:
            return exit_model.exit_state(model, states, exit)
        return REDUCTIONS[how](model, exit, states, seen[0])

    with ExitStack() as patches:
        for module in (features, answers):
            patches.enter_context(patch.multiple(module, exit_states=exit_states, exit_state=exit_state))
        if how == AVERAGED_BEHIND:
            patches.enter_context(_averaging())
        yield


@contextmanager
def _averaging() -> Iterator[None]:
    """Behind the projector, a row's tokens become as many averages as the row has image tokens."""
    counts: list[int] = []
    embed, project = exit_model.embed, exit_model.project

    def counted(model: ExitModel, ids: Tensor, states: Tensor) -> Tensor:
        counts[:] = (ids == model.geometry.image_token_id).sum(1).tolist()
        return embed(model, ids, states)

    def fewer(model: ExitModel, states: Tensor) -> Tensor:
        rows = project(model, states).split(1)
        return pad_sequence([averaged(row, count)[0] for row, count in zip(rows, counts, strict=True)], batch_first=True)

    with patch.multiple(exit_model, embed=counted, project=fewer):
        yield
