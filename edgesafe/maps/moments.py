"""Sums over the tokens of pictures from which every map follows; nothing else of a picture is kept.

T tokens, W tower width, N depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums over tokens, float64.

    Attributes:
        depths: Those of the exits, in order.
        tokens: How many tokens were added.
        x: [N, W], sums of each depth's states.
        y: [W], of the reference's.
        xx: [N, W, W], of each depth's products with itself.
        xy: [N, W, W], of each depth's with the reference.
        yy: Of the reference's squares.
    """

    depths: tuple[int, ...]
    tokens: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: float

    @staticmethod
    def empty(depths: Sequence[int], width: int) -> Moments:
        """Sums over nothing."""
        count = len(depths)
        x, xx = (torch.zeros(count, *[width] * n, dtype=torch.float64) for n in (1, 2))
        return Moments(tuple(depths), 0, x, torch.zeros(width, dtype=torch.float64), xx, xx.clone(), 0.0)

    def add(self, states: Sequence[Tensor], reference: Tensor) -> None:
        """Add the tokens of some pictures.

        Args:
            states: [T, W] for each depth, what its map reads.
            reference: [T, W], where the maps lead.
        """
        wanted = reference.double().cpu()
        for i, state in enumerate(states):
            own = state.double().cpu()
            self.x[i] += own.sum(0)
            self.xx[i].addmm_(own.T, own)
            self.xy[i].addmm_(own.T, wanted)
        self.tokens += len(wanted)
        self.y += wanted.sum(0)
        self.yy += float(wanted.square().sum())

    def centred(self, depth: int) -> Centred:
        """A depth's means and covariances."""
        i, n = self.depths.index(depth), self.tokens
        x, y = self.x[i] / n, self.y / n
        yy = self.yy / n - float(y.square().sum())
        return Centred(n, x, y, self.xx[i] / n - torch.outer(x, x), self.xy[i] / n - torch.outer(x, y), yy)


@dataclass(frozen=True)
class Centred:
    """Means [W] and covariances [W, W] of a depth's states and the reference's; of the latter the whole variance alone."""

    tokens: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: float

    def unexplained(self, matrix: Tensor, bias: Tensor) -> float:
        """The share of the reference's variance that `x @ matrix + bias` misses; above 1 where a constant would be nearer.

        Args:
            matrix: [W, W].
            bias: [W].
        """
        off = self.x @ matrix + bias - self.y
        spread = self.yy - 2 * float((matrix * self.xy).sum()) + float((matrix * (self.xx @ matrix)).sum())
        return (spread + float(off.square().sum())) / self.yy if self.yy > 0 else 0.0
