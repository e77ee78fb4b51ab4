"""Which exit and rows an update gets: by the seed, the update's number and, for "harm", the latest validation pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgesafe.align.settings import FOCUS, HARM, ROTATING, AlignConfig

HARM_FLOOR = 0.02  # an exit without harm in a validation pass of some dozen rows is still drawn now and then


def focused_exits(config: AlignConfig, exits: tuple[int, ...], reference_depth: int) -> tuple[int, ...]:
    """The exits within `config.focus`; all of them where there is none.

    >>> focused_exits(AlignConfig(focus=(0.4, 0.7)), tuple(range(1, 14)), 12)
    (5, 6, 7, 8)
    """
    low, high = (share * reference_depth for share in config.focus)
    return tuple(d for d in exits if low <= d <= high) or exits


def exit_shares(
    config: AlignConfig, exits: Sequence[int], reference_depth: int, harm: Mapping[int, float] | None = None
) -> list[float]:
    """The probability of each exit.

    Args:
        config: its sampler, focus and focus_share.
        exits: depths to draw from.
        reference_depth: what the shares of `focus` refer to.
        harm: harmful_rate of each exit in the latest validation pass, for the sampler "harm"; None before the first one.

    >>> exit_shares(AlignConfig(focus=(0.5, 0.5), focus_share=0.5), (3, 6), 12)
    [0.25, 0.75]
    >>> shares = exit_shares(AlignConfig(sampler="harm"), (3, 6), 12, {3: 0.28, 6: 0.08})
    >>> [round(share, 4) for share in shares]  # 0.30 / 0.40 and 0.10 / 0.40, with the floor of 0.02
    [0.75, 0.25]
    """
    even = [1 / len(exits)] * len(exits)
    if config.sampler == FOCUS:
        among = focused_exits(config, tuple(exits), reference_depth)
        share = config.focus_share
        return [share * (d in among) / len(among) + (1 - share) * e for d, e in zip(exits, even, strict=True)]
    if config.sampler == HARM and harm:
        weights = [harm[d] + HARM_FLOOR for d in exits]
        return [w / sum(weights) for w in weights]
    return even


def draw_depth(config: AlignConfig, exits: Sequence[int], shares: Sequence[float], number: int) -> int:
    """The exit of update `number`; "rotating" goes through a new seeded order of all exits after the other.

    >>> sorted(draw_depth(AlignConfig(sampler="rotating"), (2, 4, 6), [], k) for k in (3, 4, 5))
    [2, 4, 6]
    """
    if config.sampler == ROTATING:
        round_, place = divmod(number, len(exits))
        return int(np.random.default_rng([config.seed, 3, round_]).permutation(exits)[place])
    return int(np.random.default_rng([config.seed, 1, number]).choice(exits, p=shares))


def draw_rows(seed: int, rows: int, count: int, number: int) -> list[int]:
    """Row numbers of the `number`-th draw of `count` rows: from one shuffle of all rows after the other.

    >>> sorted(draw_rows(0, 4, 2, 0) + draw_rows(0, 4, 2, 1))
    [0, 1, 2, 3]
    """
    first, picked = number * count, list[int]()
    while len(picked) < count:
        epoch, start = divmod(first + len(picked), rows)
        order = np.random.default_rng([seed, 2, epoch]).permutation(rows)
        picked += order[start : start + count - len(picked)].tolist()
    return picked
