"""Which exit and rows an update gets: by the seed, the update's number and, for "harm", the latest validation pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgesafe.align.settings import FOCUS, HARM, ROTATING, AlignConfig
from edgesafe.format.exits import Exit

HARM_FLOOR = 0.02  # an exit without harm in a validation pass of some dozen rows is still drawn now and then


def focused_exits(config: AlignConfig, exits: tuple[Exit, ...], reference: Exit) -> tuple[Exit, ...]:
    """The exits within `config.focus`; all of them where there is none.

    >>> " ".join(map(str, focused_exits(AlignConfig(focus=(0.4, 0.7)), tuple(map(Exit, range(1, 14))), Exit(12))))
    '5 6 7 8'
    """
    low, high = (share * reference.depth for share in config.focus)
    return tuple(exit for exit in exits if low <= exit.depth <= high) or exits


def exit_shares(
    config: AlignConfig, exits: Sequence[Exit], reference: Exit, harm: Mapping[Exit, float] | None = None
) -> list[float]:
    """The probability of each exit.

    Args:
        config: its sampler, focus and focus_share.
        exits: what to draw from.
        reference: the exit to whose depth the shares of `focus` refer.
        harm: harmful_rate of each exit in the latest validation pass, for the sampler "harm"; None before the first one.

    >>> exit_shares(AlignConfig(focus=(0.5, 0.5), focus_share=0.5), (Exit(3), Exit(6)), Exit(12))
    [0.25, 0.75]
    >>> shares = exit_shares(AlignConfig(sampler="harm"), (Exit(3), Exit(6)), Exit(12), {Exit(3): 0.28, Exit(6): 0.08})
    >>> [round(share, 4) for share in shares]  # 0.30 / 0.40 and 0.10 / 0.40, with the floor of 0.02
    [0.75, 0.25]
    """
    even = [1 / len(exits)] * len(exits)
    if config.sampler == FOCUS:
        among = focused_exits(config, tuple(exits), reference)
        share = config.focus_share
        return [share * (exit in among) / len(among) + (1 - share) * e for exit, e in zip(exits, even, strict=True)]
    if config.sampler == HARM and harm:
        weights = [harm[exit] + HARM_FLOOR for exit in exits]
        return [w / sum(weights) for w in weights]
    return even


def draw_exit(config: AlignConfig, exits: Sequence[Exit], shares: Sequence[float], number: int) -> Exit:
    """The exit of update `number`; "rotating" goes through a new seeded order of all exits after the other.

    >>> exits = Exit(2), Exit(4), Exit(6)
    >>> sorted(draw_exit(AlignConfig(sampler="rotating"), exits, [], k) for k in (3, 4, 5)) == list(exits)
    True
    """
    if config.sampler == ROTATING:
        round_, place = divmod(number, len(exits))
        return exits[int(np.random.default_rng([config.seed, 3, round_]).permutation(len(exits))[place])]
    return exits[int(np.random.default_rng([config.seed, 1, number]).choice(len(exits), p=shares))]


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
