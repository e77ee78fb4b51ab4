"""Exit depths against expectations worked out by hand from the definition: a depth is the number of blocks run."""

from __future__ import annotations

import pytest

from edgesafe.errors import ConfigError
from edgesafe.format.exits import default_ladder, parse_exits, reference_depth


@pytest.mark.parametrize(
    ("spec", "n_blocks", "depths"),
    [
        ("all", 4, (1, 2, 3, 4)),
        ("ALL ", 2, (1, 2)),
        ("1-11", 12, tuple(range(1, 12))),
        ("2,4,6", 12, (2, 4, 6)),
        ("6,2,4,4", 12, (2, 4, 6)),
        ("1-3,8", 12, (1, 2, 3, 8)),
        ("every:2", 12, (2, 4, 6, 8, 10, 12)),
        ("every:5", 12, (5, 10)),
        ("12", 12, (12,)),
    ],
)
def test_parse_exits(spec, n_blocks, depths):
    assert parse_exits(spec, n_blocks) == depths


@pytest.mark.parametrize(
    "spec",
    ["", "0", "13", "1-13", "0-3", "5-3", "a", "1,,2", "-2", "1.5", "every:0", "every:", "every:13", "²", "1-99999999999"],
)
def test_a_wrong_spec_is_a_config_error(spec):
    with pytest.raises(ConfigError) as caught:
        parse_exits(spec, 12)
    assert caught.value.expected


@pytest.mark.parametrize(
    ("n_blocks", "layer", "depth"),
    # LLaVA-1.5 has 24 blocks, reads hidden_states[-2] of 25 states, index 23, the state after 23 blocks.
    [(24, -2, 23), (12, -2, 11), (12, -1, 12), (12, 12, 12), (12, 1, 1), (12, -12, 1)],
)
def test_reference_depth(n_blocks, layer, depth):
    assert reference_depth(n_blocks, layer) == depth
    # The oracle is Python's own indexing of the n + 1 states.
    assert list(range(n_blocks + 1))[layer] == depth


@pytest.mark.parametrize("layer", [0, 13, -13, -14])
def test_a_layer_that_is_no_block(layer):
    with pytest.raises(ConfigError):
        reference_depth(12, layer)


def test_default_ladder():
    assert default_ladder(12, 11) == tuple(range(1, 12))
    assert default_ladder(13, 12) == tuple(range(1, 13))
    # 23 * i / 8, half up: 2.875 5.75 8.625 11.5 14.375 17.25 20.125 23
    assert default_ladder(24, 23) == (3, 6, 9, 12, 14, 17, 20, 23)
    assert default_ladder(4, 1) == (1,)
    with pytest.raises(ConfigError):
        default_ladder(12, 13)
