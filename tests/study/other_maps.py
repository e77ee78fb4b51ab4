"""Exit maps of other kinds than the product's, to compare with it: the same pictures and states, one thing changed.

They are applied to an untouched model's states while it answers; no checkpoint holds them.

N pictures, T tokens, P patches, W tower width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from edgesafe.checkpoint.exit_maps import full_map, reads
from edgesafe.checkpoint.exit_model import ExitModel, exit_states, open_images, pixel_values
from edgesafe.maps.gather import HELD_OUT
from edgesafe.maps.moments import Centred, Moments
from edgesafe.maps.solve import RIDGES, solve

_CHUNK = 64  # pictures that the tower sees at once
_STEPS, _BATCH, _LR, _EACH = 1500, 2048, 2e-3, 100  # of a map that is trained; it is looked at each so many steps

Fit = Callable[[Tensor, Tensor, Tensor], nn.Module]  # states and the reference's [N, P, W], which pictures are held out [N]


class ByPosition(nn.Module):
    """An affine map for every position: weight [P, W, W], bias [P, W]."""

    def __init__(self, maps: Sequence[nn.Module], width: int) -> None:
        """Take the positions' maps, in order."""
        super().__init__()
        zero, eye = torch.zeros(1, width), torch.eye(width)
        self.bias = torch.cat([one(zero) for one in maps])
        self.weight = torch.stack([one(eye) - one(zero) for one in maps])

    def forward(self, states: Tensor) -> Tensor:
        """Map states [N, P, W]."""
        return torch.einsum("npw,pwv->npv", states, self.weight) + self.bias


class Shifted(nn.Module):
    """One map for all positions, between every position's own means [P, W] of what is read and of what is wanted."""

    def __init__(self, own: nn.Module, x: Tensor, y: Tensor) -> None:
        """Take the map of centred states, and the means."""
        super().__init__()
        self.own, self.x, self.y = own, x, y

    def forward(self, states: Tensor) -> Tensor:
        """Map states [N, P, W]."""
        mapped: Tensor = self.own(states - self.x) + self.y
        return mapped


class Nonlinear(nn.Module):
    """The state plus two layers that start at nothing, as the product's ridge draws a map to the identity."""

    def __init__(self, x: Tensor, times: int) -> None:
        """Take the states [T, W] that it reads, and how many times a linear map's numbers it has."""
        super().__init__()
        width = x.shape[1]
        hidden = times * width * width // (2 * width + 1)
        self.mean, self.spread = x.mean(0), x.std(0).clamp(min=1e-6)
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Map states [..., W]."""
        added: Tensor = self.up(nn.functional.gelu(self.down((states - self.mean) / self.spread)))
        return states + added


@torch.no_grad()
def picture_states(model: ExitModel, paths: Sequence[Path]) -> list[Tensor]:
    """What a map reads of pictures, and what it leads to: of every depth from 0 on [N, P, W]."""
    parts = []
    for start in range(0, len(paths), _CHUNK):
        raw = exit_states(model, pixel_values(model, open_images(paths[start : start + _CHUNK])))
        parts.append([reads(model.model, model.recipe, one) for one in raw])
    return [torch.cat(depth) for depth in zip(*parts, strict=True)]


def fit_kind(kind: str, states: Sequence[Tensor], reference: int, depths: Sequence[int]) -> dict[int, nn.Module]:
    """Maps by depth.

    Args:
        kind: One of `KINDS`.
        states: Of every depth from 0 on [N, P, W].
        reference: The depth that the maps lead to; it gets none.
        depths: Those that get one.
    """
    wanted = states[reference]
    held = torch.arange(len(wanted)) % HELD_OUT == 1  # as the product does
    return {depth: KINDS[kind](states[depth], wanted, held) for depth in depths if depth != reference}


def reached(mapped: Tensor, wanted: Tensor) -> float:
    """The share of the reference's variance that states [N, P, W] reach; below 0 where a constant would be nearer."""
    spread = wanted.double() - wanted.double().mean((0, 1))
    return 1 - float((mapped.double() - wanted.double()).square().sum() / spread.square().sum())


def _sums(x: Tensor, y: Tensor) -> Centred:
    """Means and covariances over tokens [T, W] of one depth."""
    sums = Moments.empty((1,), x.shape[-1])
    sums.add([x.reshape(-1, x.shape[-1])], y.reshape(-1, y.shape[-1]))
    return sums.centred(1)


def _solved(x: Tensor, y: Tensor, held: Tensor) -> nn.Module:
    return solve(_sums(x[~held], y[~held]), _sums(x[held], y[held])).module


def _affine(both: Centred, matrix: Tensor) -> nn.Module:
    return full_map(matrix.T.float().contiguous(), (both.y - both.x @ matrix).float())


def _rescaled(x: Tensor, y: Tensor, held: Tensor) -> nn.Module:
    """Every channel's mean and spread made those of the reference's."""
    both = _sums(x, y)
    spread = y.flatten(0, 1).double().std(0) / both.xx.diagonal().sqrt().clamp(min=1e-12)
    return _affine(both, spread.diag())


def _one_ridge(x: Tensor, y: Tensor, held: Tensor, *, ridge: float) -> nn.Module:
    both = _sums(x, y)
    eye = torch.eye(len(both.x), dtype=torch.float64)
    strength = ridge * both.xx.diagonal().mean()
    return _affine(both, eye + torch.linalg.solve(both.xx + strength * eye, both.xy - both.xx))


def _low_rank(x: Tensor, y: Tensor, held: Tensor, *, share: int) -> nn.Module:
    """The product's map with the directions alone in which what it gives varies most, one of so many."""
    both, own = _sums(x, y), ByPosition([_solved(x, y, held)], x.shape[-1])
    matrix = own.weight[0].double()
    best = torch.linalg.eigh(matrix.T @ both.xx @ matrix).eigenvectors[:, -(len(matrix) // share) :]
    return _affine(both, matrix @ best @ best.T)


def _by_position(x: Tensor, y: Tensor, held: Tensor) -> nn.Module:
    return ByPosition([_solved(x[:, [p]], y[:, [p]], held) for p in range(x.shape[1])], x.shape[-1])


def _own_means(x: Tensor, y: Tensor, held: Tensor) -> nn.Module:
    means = x.mean(0), y.mean(0)
    return Shifted(_solved(x - means[0], y - means[1], held), *means)


def _nonlinear(x: Tensor, y: Tensor, held: Tensor, *, times: int) -> nn.Module:
    """Trained on all but the held-out pictures, which say when to stop."""
    maker = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    own, wanted = x[~held].flatten(0, 1), y[~held].flatten(0, 1)
    module = Nonlinear(own, times)
    optimizer = torch.optim.AdamW(module.parameters(), _LR, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    best, kept = -float("inf"), module.state_dict()
    for step in range(1, _STEPS + 1):
        rows = torch.randint(len(own), (_BATCH,), generator=maker)
        optimizer.zero_grad()
        (module(own[rows]) - wanted[rows]).square().mean().backward()
        optimizer.step()
        schedule.step()
        if step % _EACH == 0:
            with torch.no_grad():
                now = reached(module(x[held]), y[held])
            if now > best:
                best, kept = now, {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(kept)
    return module.requires_grad_(False)


KINDS: Mapping[str, Fit] = {
    "rescaled": _rescaled,
    "rank a quarter": partial(_low_rank, share=4),
    "rank a sixteenth": partial(_low_rank, share=16),
    "least ridge": partial(_one_ridge, ridge=RIDGES[0]),
    "most ridge": partial(_one_ridge, ridge=RIDGES[-1]),
    "means by position": _own_means,
    "map by position": _by_position,
    "nonlinear": partial(_nonlinear, times=1),
    "nonlinear, four times": partial(_nonlinear, times=4),
}
