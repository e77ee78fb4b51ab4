"""One map from sums over tokens: ridge regression, its strength and rank by held-out pictures, never by harm.

The ridge draws the map towards the identity, not towards nothing: where few pictures say little, a state stays as it is.

W tower width, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgesafe.checkpoint.exit_maps import full_map, half, low_rank_map
from edgesafe.maps.moments import Centred

# Ridge strengths that are tried, times the mean variance of a state's channel.
RIDGES = tuple(10.0**power for power in range(-6, 2))
# A lower rank is taken where it misses at most so much more of the held-out variance: "where it costs nothing".
RANK_COST = 1.01
# Of a channel's mean square: below it a variance is what rounding left of the sums, and nothing may be divided by it.
_NOISE = 1e-10
_LEAST = 1e-30


@dataclass(frozen=True)
class Solved:
    """A map, how it was chosen, and the share of the held-out variance that it reaches, beside what the raw state does.

    `full` is the share that the map of full rank reaches.
    """

    module: nn.Module
    ridge: float
    rank: int
    raw: float
    mapped: float
    full: float


def solve(fit: Centred, held: Centred) -> Solved:
    """The map of a depth.

    Args:
        fit: Of the pictures that the strength's candidates are fitted to.
        held: Of those that choose among them. The map itself is then fitted to both.
    """
    eye = torch.eye(len(fit.x), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(fit.xx)
    turned = vectors.T @ (fit.xy - fit.xx)
    tried = {r: eye + vectors @ (turned / (values.clamp(min=0) + _strength(fit, r))[:, None]) for r in RIDGES}
    missed = {ridge: held.unexplained(*_with_bias(fit, matrix)) for ridge, matrix in tried.items()}
    ridge = min(missed, key=lambda one: (missed[one], -one))
    rank, own = _rank(fit, held, tried[ridge], missed[ridge])
    both = pooled(fit, held)
    matrix = eye + torch.linalg.solve(both.xx + _strength(both, ridge) * eye, both.xy - both.xx)
    raw = held.unexplained(eye, torch.zeros_like(fit.x))
    return Solved(_module(both, matrix, rank), ridge, rank, 1 - raw, 1 - own, 1 - missed[ridge])


def _strength(part: Centred, ridge: float) -> float:
    """What is added to every variance."""
    variance = float(part.xx.diagonal().mean())
    return max(ridge * variance, _NOISE * (variance + float(part.x.square().mean())), _LEAST)


def pooled(a: Centred, b: Centred) -> Centred:
    """Means and covariances over both sets of tokens."""
    n = a.tokens + b.tokens
    p, q = a.tokens / n, b.tokens / n
    dx, dy = a.x - b.x, a.y - b.y
    return Centred(
        n,
        p * a.x + q * b.x,
        p * a.y + q * b.y,
        p * a.xx + q * b.xx + p * q * torch.outer(dx, dx),
        p * a.xy + q * b.xy + p * q * torch.outer(dx, dy),
        p * a.yy + q * b.yy + p * q * float(dy.square().sum()),
    )


def _rank(fit: Centred, held: Centred, matrix: Tensor, missed: float) -> tuple[int, float]:
    """The lowest of W/16, W/8, W/4 that costs nothing on the held-out pictures, else W, and the share that it misses.

    Two factors of rank W/2 would save no bytes.
    """
    width, best = len(fit.x), _directions(fit, matrix)
    for rank in (width // 16, width // 8, width // 4):
        own = held.unexplained(*_with_bias(fit, matrix @ best[:, :rank] @ best[:, :rank].T))
        if rank >= 2 and own <= RANK_COST * missed:  # one row could not be told from a column in an exported graph
            return rank, own
    return width, missed


def _directions(fit: Centred, matrix: Tensor) -> Tensor:
    """Directions [W, W] of what the map gives, those in which it varies most first (reduced-rank regression)."""
    vectors: Tensor = torch.linalg.eigh(matrix.T @ fit.xx @ matrix).eigenvectors
    return vectors.flip(1)


def _with_bias(fit: Centred, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix and the bias that brings the mean to the reference's."""
    return matrix, fit.y - fit.x @ matrix


def _module(both: Centred, matrix: Tensor, rank: int) -> nn.Module:
    """The map in the numbers that its file will hold."""
    if rank == len(both.x):
        return full_map(_stored(matrix.T), _stored(_with_bias(both, matrix)[1]))
    kept = _directions(both, matrix)[:, :rank]
    return low_rank_map(_stored((matrix @ kept).T), _stored(kept), _stored(_with_bias(both, matrix @ kept @ kept.T)[1]))


def _stored(values: Tensor) -> Tensor:
    return half(values.float()).float().contiguous()
