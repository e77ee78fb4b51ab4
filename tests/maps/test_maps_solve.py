"""The solved maps against numpy's least squares on the tokens themselves, which shares neither sums nor eigenvectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgesafe.checkpoint.exit_maps import tensors
from edgesafe.maps import solve as solving
from edgesafe.maps.moments import Moments
from edgesafe.maps.solve import RIDGES, pooled, solve

W, TOKENS = 24, 400


def _tokens(seed: int, rank: int = W, noise: float = 0.1, tokens: int = TOKENS) -> tuple[np.ndarray, np.ndarray]:
    """States and the reference's, which depend linearly on them by a matrix of some rank."""
    rng, world = np.random.default_rng(seed), np.random.default_rng(99)
    mix, hidden = world.normal(size=(W, W)), world.normal(size=(W, rank)) @ world.normal(size=(rank, W))
    x = rng.normal(size=(tokens, W)) @ mix + world.normal(size=W) * 3
    return x, x @ hidden + world.normal(size=W) + noise * rng.normal(size=(tokens, W))


def _moments(*pairs: tuple[np.ndarray, np.ndarray]) -> Moments:
    sums = Moments.empty((6,), W)
    for x, y in pairs:
        sums.add([torch.from_numpy(x)], torch.from_numpy(y))
    return sums


def _ridge(x: np.ndarray, y: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Least squares over the tokens with rows that draw the matrix to the identity; the means are free."""
    xc, yc = x - x.mean(0), y - y.mean(0)
    strength = ridge * (xc**2).mean(0).mean() * len(x)
    rows = np.concatenate([xc, np.sqrt(strength) * np.eye(W)])
    matrix = np.linalg.lstsq(rows, np.concatenate([yc, np.sqrt(strength) * np.eye(W)]), rcond=None)[0]
    return matrix, y.mean(0) - x.mean(0) @ matrix


def _missed(x: np.ndarray, y: np.ndarray, matrix: np.ndarray, bias: np.ndarray) -> float:
    return float(((x @ matrix + bias - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())


def _agrees(fit: tuple[np.ndarray, np.ndarray], held: tuple[np.ndarray, np.ndarray], solved: solving.Solved) -> bool:
    """Ridge, held-out shares and the map itself are those of the tokens."""
    missed = {ridge: _missed(*held, *_ridge(*fit, ridge)) for ridge in RIDGES}
    best = min(missed, key=lambda ridge: missed[ridge])
    matrix, bias = _ridge(np.concatenate([fit[0], held[0]]), np.concatenate([fit[1], held[1]]), best)
    got = solved.module(torch.from_numpy(held[0]).float()).double().numpy()
    near = np.abs(got - (held[0] @ matrix + bias)).max() < 5e-3 * np.abs(held[1]).max()  # the file's float16
    shares = np.allclose([solved.full, solved.raw], [1 - missed[best], 1 - _missed(*held, np.eye(W), np.zeros(W))], atol=1e-9)
    return bool(solved.ridge == best and near and shares)


@pytest.mark.parametrize(("noise", "tokens"), [(0.1, TOKENS), (3.0, TOKENS), (30.0, 40), (1.0, 12)])
def test_a_map_is_the_least_squares_of_the_tokens(noise, tokens):
    fit, held = _tokens(1, noise=noise, tokens=tokens), _tokens(2, noise=noise)
    solved = solve(_moments(fit).centred(6), _moments(held).centred(6))
    assert solved.rank == W and _agrees(fit, held, solved)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("_module", lambda both, matrix, rank: solving.full_map(matrix.float(), both.y.float())),
        ("pooled", lambda fit, held: fit),
        ("RIDGES", (10.0,)),
    ],
    ids=["transposed and a wrong bias", "held-out pictures left out of the map", "one ridge"],
)
def test_that_check_sees_a_wrong_map(monkeypatch, name, wrong):
    fit, held = _tokens(1, noise=3.0, tokens=60), _tokens(2, noise=3.0)
    assert _agrees(fit, held, solve(_moments(fit).centred(6), _moments(held).centred(6)))
    monkeypatch.setattr(solving, name, wrong)
    assert not _agrees(fit, held, solve(_moments(fit).centred(6), _moments(held).centred(6)))


def test_sums_of_parts_are_those_of_the_whole():
    one, two = _tokens(1), _tokens(2)
    whole = _moments((np.concatenate([one[0], two[0]]), np.concatenate([one[1], two[1]]))).centred(6)
    joined = pooled(_moments(one).centred(6), _moments(two).centred(6))
    both = _moments(one, two).centred(6)
    for key in ("x", "y", "xx", "xy"):
        torch.testing.assert_close(getattr(joined, key), getattr(whole, key))
        torch.testing.assert_close(getattr(both, key), getattr(whole, key))
    assert joined.tokens == whole.tokens and joined.yy == pytest.approx(whole.yy)


@pytest.mark.parametrize(("rank", "want"), [(1, 3), (3, 3), (6, 6), (24, 24)])
def test_a_lower_rank_is_taken_where_it_costs_nothing(rank, want):
    fit, held = _tokens(1, rank=rank), _tokens(2, rank=rank)
    solved = solve(_moments(fit).centred(6), _moments(held).centred(6))
    assert solved.rank == want and 1 - solved.mapped <= 1.01 * (1 - solved.full)
    got = solved.module(torch.from_numpy(held[0]).float()).double().numpy()
    assert ((got - held[1]) ** 2).sum() / ((held[1] - held[1].mean(0)) ** 2).sum() == pytest.approx(1 - solved.mapped, rel=0.2)
    assert sum(t.numel() for t in tensors({6: solved.module}).values()) == (W * W + W if want == W else 2 * want * W + W)


def test_few_tokens_leave_a_state_nearly_as_it_is():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(2000, W))
    y = x + 0.3 * rng.normal(size=(2000, W))
    solved = solve(_moments((x[:12], y[:12])).centred(6), _moments((x[12:20], y[12:20])).centred(6))
    got = solved.module(torch.from_numpy(x[20:]).float()).double().numpy()
    missed = ((got - y[20:]) ** 2).sum() / ((y[20:] - y[20:].mean(0)) ** 2).sum()
    assert missed < 1.5 * _missed(x[20:], y[20:], np.eye(W), np.zeros(W))
    toward_nothing = np.linalg.lstsq(x[:20], y[:20], rcond=None)[0]  # of all that fit, the one nearest to zero
    assert _missed(x[20:], y[20:], toward_nothing, np.zeros(W)) > 2 * missed


def test_a_state_that_never_changes_is_mapped_to_the_mean():
    fit, held = _tokens(1), _tokens(2)
    still = [(np.ones_like(x), y) for x, y in (fit, held)]
    solved = solve(_moments(still[0]).centred(6), _moments(still[1]).centred(6))
    assert abs(solved.mapped) < 0.1
    assert torch.isfinite(solved.module(torch.ones(1, W))).all()
