"""Other ways than the product's averages to make a picture's tokens fewer, to compare with them.

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

from edgesafe.align import features
from edgesafe.checkpoint import exit_model
from edgesafe.checkpoint.exit_maps import projector_input
from edgesafe.checkpoint.exit_model import ExitModel
from edgesafe.evaluate import answers
from edgesafe.format.exits import Exit
from study.plan import AVERAGED_BEFORE, STRIDED

# The model, an exit with fewer tokens, the tower's states by depth [B, P, W], and the pixels that they are of [B, 3, H, W].
Reduction = Callable[[ExitModel, Exit, Sequence[Tensor], Tensor], Tensor]

_SEED = 0


def averaged(tokens: Tensor, count: int) -> Tensor:
    """Means over the squares of a square of tokens: [B, P, D] to [B, count, D]."""
    side, kept = math.isqrt(tokens.shape[1]), math.isqrt(count)
    square = tokens.transpose(1, 2).unflatten(2, (side, side))
    return functional.avg_pool2d(square, side // kept).flatten(2).transpose(1, 2)


def strided_places(patches: int, count: int) -> list[int]:
    """Of a square of tokens, row by row, the middle one of each of `count` squares; of two in the middle the later.

    >>> strided_places(36, 4), strided_places(9, 1)
    ([7, 10, 25, 28], [4])
    """
    side, kept = math.isqrt(patches), math.isqrt(count)
    at = [(2 * i + 1) * side // (2 * kept) for i in range(kept)]
    return [row * side + column for row in at for column in at]


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


def _strided(model: ExitModel, exit: Exit, states: Sequence[Tensor], pixels: Tensor) -> Tensor:
    read = _read(model, exit, states)
    return read[:, strided_places(read.shape[1], _count(exit))]


def _random(model: ExitModel, exit: Exit, states: Sequence[Tensor], pixels: Tensor) -> Tensor:
    read = _read(model, exit, states)
    return _kept(read, random_places(*read.shape[:2], _count(exit)))


def _attended(model: ExitModel, exit: Exit, states: Sequence[Tensor], pixels: Tensor) -> Tensor:
    """The tokens that the class token attends to most."""
    return _kept(_read(model, exit, states), _largest(class_attention(model, pixels, exit.depth), _count(exit)))


def _blurred(model: ExitModel, exit: Exit, states: Sequence[Tensor], pixels: Tensor) -> Tensor:
    """The tower sees all patches of a picture that was averaged and enlarged again; its tokens are strided."""
    small = shrunk(pixels, math.sqrt(states[0].shape[1] / _count(exit)))
    back = functional.interpolate(small, pixels.shape[-2:], mode="bicubic")
    return _strided(model, exit, exit_model.exit_states(model, back), pixels)


@torch.no_grad()
def _smaller(model: ExitModel, exit: Exit, states: Sequence[Tensor], pixels: Tensor) -> Tensor:
    """The tower sees the averaged picture itself, in patches of the size that it knows, at positions between the known ones."""
    small = shrunk(pixels, math.sqrt(states[0].shape[1] / _count(exit)))
    tower = model.model.get_submodule(model.recipe.tower)
    found = tower(small, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    return _read(model, exit, [state[:, model.geometry.dropped :] for state in found])


REDUCTIONS: Mapping[str, Reduction] = {
    AVERAGED_BEFORE: _before,
    STRIDED: _strided,
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
        whole = exit_model.exit_state(model, states, exit)
        if exit.visual_tokens is None:
            return whole
        fewer = REDUCTIONS[how](model, exit, states, seen[0])
        return functional.pad(fewer, (0, 0, 0, whole.shape[1] - fewer.shape[1]))  # states of a batch are of one size

    with ExitStack() as patches:
        for module in (features, answers):
            patches.enter_context(patch.multiple(module, exit_states=exit_states, exit_state=exit_state))
        patches.enter_context(patch.object(exit_model, "_pooled", lambda projected, count: projected[:count]))
        yield
