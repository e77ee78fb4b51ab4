"""Which exit and rows an update gets: shares by hand, the same draws by the same seed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from edgesafe.align.sampler import draw_exit, draw_rows, exit_shares, focused_exits
from edgesafe.align.settings import AlignConfig
from edgesafe.align.train import draw_update
from edgesafe.format.exits import Exit


def _drawn(config, depths, count, harm=None):
    """The depths of `count` draws from exits of these depths; harm: by depth."""
    exits = tuple(map(Exit, depths))
    shares = exit_shares(config, exits, Exit(4), {Exit(depth): one for depth, one in (harm or {}).items()})
    return [draw_exit(config, exits, shares, k).depth for k in range(count)]


def test_uniform_draws_all_exits_alike_and_by_the_seed():
    config = AlignConfig(seed=1, sampler="uniform")
    depths = _drawn(config, (1, 2, 3), 300)
    assert all(70 < depths.count(d) < 130 for d in (1, 2, 3))  # 100 each, four standard deviations
    assert depths == _drawn(config, (1, 2, 3), 300) != _drawn(dataclasses.replace(config, seed=2), (1, 2, 3), 300)


def test_focused_exits_get_their_share_and_the_others_the_rest():
    config = AlignConfig(focus_share=0.7, focus=(0.5, 0.75))  # of a reference depth of 4: exits 2 and 3
    depths = _drawn(config, (1, 2, 3, 4), 2000)
    # By hand: 0.7 / 2 + 0.3 / 4 = 0.425 for a focused exit, 0.3 / 4 = 0.075 for another; 2000 draws, four standard deviations.
    assert all(abs(depths.count(d) - 850) < 89 for d in (2, 3)) and all(abs(depths.count(d) - 150) < 48 for d in (1, 4))


def test_rotating_draws_every_exit_once_a_round_in_changing_orders():
    depths = _drawn(AlignConfig(sampler="rotating"), (1, 2, 3, 4), 40)
    rounds = [tuple(depths[i : i + 4]) for i in range(0, 40, 4)]
    assert all(sorted(r) == [1, 2, 3, 4] for r in rounds) and len(set(rounds)) > 3


def test_harm_draws_by_the_latest_validation_and_evenly_before_it():
    config = AlignConfig(sampler="harm")
    # By hand, with the floor of 0.02: 0.4 / 0.5 = 0.8 and 0.1 / 0.5 = 0.2 of 1000 draws; four standard deviations are 51.
    assert abs(_drawn(config, (1, 2), 1000, harm={1: 0.38, 2: 0.08}).count(1) - 800) < 51
    assert abs(_drawn(config, (1, 2), 1000).count(1) - 500) < 64


def test_rows_come_from_one_shuffle_after_the_other():
    draws = [draw_rows(1, 100, 7, k) for k in range(300)]
    assert set(Counter(row for rows in draws for row in rows).values()) == {21}  # 2100 draws of 100 rows
    assert draws == [draw_rows(1, 100, 7, k) for k in range(300)] != [draw_rows(2, 100, 7, k) for k in range(300)]


@pytest.mark.parametrize(
    ("focus", "want"), [((0.4, 0.7), (5, 6, 7, 8)), ((0.5, 0.5), (6,)), ((0.51, 0.52), tuple(range(1, 14)))], ids=str
)
def test_focus_is_in_shares_of_the_reference_depth_and_without_an_exit_in_it_all_count(focus, want):
    assert focused_exits(AlignConfig(focus=focus), tuple(map(Exit, range(1, 14))), Exit(12)) == tuple(map(Exit, want))


def test_the_draws_are_those_of_earlier_runs_which_drew_the_depths_as_numbers():
    depths = (3, 6, 9, 12, 14, 17, 20, 23)
    for k in range(40):
        even = np.random.default_rng([7, 1, k]).choice(depths, p=[1 / 8] * 8)
        assert _drawn(AlignConfig(seed=7, sampler="uniform"), depths, k + 1)[k] == even
        shuffled = np.random.default_rng([7, 3, k // 8]).permutation(depths)[k % 8]
        assert _drawn(AlignConfig(seed=7, sampler="rotating"), depths, k + 1)[k] == shuffled


def test_a_checkpoint_of_an_earlier_run_has_its_harm_by_depth():
    def draws(harm):
        t = SimpleNamespace(config=AlignConfig(sampler="harm"), pools=None, exits=(Exit(1), Exit(2)), examples=[None] * 99)
        t.llava, t.state = SimpleNamespace(reference=Exit(2)), {"harm": harm}
        return [draw_update(t, k)[0] for k in range(50)]

    assert draws({1: 0.98, 2: 0.0}) == draws({"1": 0.98, "2": 0.0}) and draws({1: 0.98, 2: 0.0}).count(Exit(1)) > 40


def test_fewer_rows_than_a_batch_are_seen_again():
    assert sorted(draw_rows(0, 2, 5, 0))[1:4] in ([0, 0, 1], [0, 1, 1])
