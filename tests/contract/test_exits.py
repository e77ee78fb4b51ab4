"""Exits and ladders against expectations worked out by hand from the definition: a depth is the number of blocks run."""

from __future__ import annotations

import dataclasses
import itertools
import random

import numpy as np
import pytest

import edgesafe
from edgesafe.errors import BundleError, ConfigError, InputError
from edgesafe.format.bundle import Bundle
from edgesafe.format.exits import Exit, default_ladder, parse_exits, read_exit, reference_depth, segments
from edgesafe.format.fields import Fields
from edgesafe.format.manifest import Manifest

# From the cheapest to the dearest: fewer blocks first, then fewer tokens, and all of the tower's tokens last.
IN_ORDER = [Exit(1, 1), Exit(1), Exit(2, 9), Exit(2, 10), Exit(2, 576), Exit(2), Exit(10, 1), Exit(10), Exit(11)]
TEXTS = ["1@1", "1", "2@9", "2@10", "2@576", "2", "10@1", "10", "11"]
NOT_TEXTS = ["", " ", "06", "6@09", " 6", "6 ", "6\n", "6@", "@6", "6@0", "0", "0@6", "-1", "+6", "6.0", "1_0", "6@9@9", "6 @9"]
NOT_TEXTS += ["²", "٦", "６", "6@²", "six", "None", "6@None", "1e3", "0x6", "9" * 7, "6@" + "9" * 7, "9" * 5000]
NOT_DEPTHS = [True, False, 0, -1, 1.0, 6.5, None, [6], (6,), b"6", 10**6, 10**400, np.int64(0)]


def exits(*depths: int) -> tuple[Exit, ...]:
    return tuple(map(Exit, depths))


def test_exits_are_ordered_by_depth_and_then_by_tokens():
    shuffled = IN_ORDER[:]
    random.Random(0).shuffle(shuffled)
    assert sorted(shuffled) == IN_ORDER and max(shuffled) == Exit(11) and min(shuffled) == Exit(1, 1)
    for (i, a), (j, b) in itertools.product(enumerate(IN_ORDER), repeat=2):
        assert [a < b, a <= b, a == b, a >= b, a > b, a != b] == [i < j, i <= j, i == j, i >= j, i > j, i != j]


def test_an_exit_is_a_key_and_never_changes():
    times = {exit: i for i, exit in enumerate(IN_ORDER)}
    assert len(times) == len(IN_ORDER) and times[Exit(2, 9)] == 2 and Exit(3) not in times
    # Neither a depth nor a text is one: a table that mixes them up finds nothing instead of the wrong row.
    assert Exit(6) not in {6, "6"} and Exit(6) != 6 and Exit(6) != "6"
    with pytest.raises(TypeError):
        _ = Exit(6) < 7
    with pytest.raises(dataclasses.FrozenInstanceError):
        Exit(6).depth = 7


def test_an_exit_s_text_reads_back():
    assert [str(exit) for exit in IN_ORDER] == [f"{exit}" for exit in IN_ORDER] == TEXTS
    for exit in [*IN_ORDER, Exit(999_999), Exit(1, 999_999)]:
        assert Exit.parse(str(exit)) == exit == Exit.of(exit) == Exit.of(str(exit))
        assert hash(Exit.parse(str(exit))) == hash(exit)
    assert Exit.of(6) == Exit.of("6") == Exit(6) and Exit.of("6@9") == Exit(6, 9)
    assert edgesafe.Exit is Exit


@pytest.mark.parametrize("text", NOT_TEXTS)
def test_a_text_that_str_does_not_write_is_refused(text):
    for read in (Exit.parse, Exit.of):
        with pytest.raises(InputError, match="depth such as 6") as caught:
            read(text)
        assert caught.value.where == "exit"


@pytest.mark.parametrize("value", NOT_DEPTHS)
def test_what_is_no_depth_is_refused(value):
    for make in (Exit, Exit.of, lambda v: Exit(6, v) if v is not None else Exit(v)):
        with pytest.raises(InputError, match="whole number") as caught:
            make(value)
        assert caught.value.where == "exit"


@pytest.mark.parametrize("value", [6, None, Exit(6), b"6"])
def test_only_a_text_is_parsed(value):
    with pytest.raises(InputError):
        Exit.parse(value)


def test_a_table_names_its_exit_by_text_or_in_earlier_formats_by_depth():
    def read(table: dict, key: str = "exit", *, by_depth: bool = False) -> Exit:
        fields = Fields(table, "table", BundleError)
        found = read_exit(fields, key, by_depth=by_depth)
        fields.done()
        return found

    assert read({"exit": "6"}) == read({"exit_depth": 6}, by_depth=True) == Exit(6)
    assert read({"exit": "6@9"}) == Exit(6, 9)
    assert read({"reference": "12"}, "reference") == read({"reference_depth": 12}, "reference", by_depth=True) == Exit(12)
    wrong = [
        *({"exit": value} for value in (*NOT_TEXTS, *NOT_DEPTHS, 6)),
        {"exit_depth": 6},
        {"exit": "6", "exit_depth": 6},
        {},
    ]
    for table in wrong:
        with pytest.raises(BundleError, match="exit"):
            read(table)
    for table in [*({"exit_depth": value} for value in (*NOT_DEPTHS, "6")), {"exit": "6"}, {}]:
        with pytest.raises(BundleError, match="exit"):
            read(table, by_depth=True)


def test_a_bundle_of_an_earlier_format_has_all_visual_tokens(handmade):
    obj = Bundle.open(handmade).manifest.to_dict()
    graphs = obj["exits"][0]["graphs"]
    with pytest.raises(BundleError, match="1@9, 1, 2, 3 has fewer visual tokens") as caught:
        Manifest.from_dict({**obj, "exits": [{"exit": "1@9", "graphs": graphs}, *obj["exits"]]})
    assert caught.value.expected == "depths alone in format 3"


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
        ("1,every:5", 12, (1, 5, 10)),
    ],
)
def test_parse_exits(spec, n_blocks, depths):
    assert parse_exits(spec, n_blocks) == exits(*depths)


BAD = [
    "",
    "0",
    "13",
    "1-13",
    "0-3",
    "5-3",
    "a",
    "1,,2",
    "-2",
    "1.5",
    "every:0",
    "every:",
    "every:13",
    "²",
    "1-99999999999",
    "9" * 5000,
    "6@0",
    "6@x",
    "6@",
    "@9",
    "6@9@4",
    "13@9",
    "6@-9",
    "all@",
    "all@9,all@4",  # 24 exits with fewer tokens
    "6@" + "9" * 7,
]


@pytest.mark.parametrize("spec", BAD)
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
    assert default_ladder(12, 11) == exits(*range(1, 12))
    assert default_ladder(13, 12) == exits(*range(1, 13))
    # 23 * i / 8, half up: 2.875 5.75 8.625 11.5 14.375 17.25 20.125 23
    assert default_ladder(24, 23) == exits(3, 6, 9, 12, 14, 17, 20, 23)
    assert default_ladder(4, 1) == exits(1)
    with pytest.raises(ConfigError):
        default_ladder(12, 13)


def test_segments_lie_between_depths_whatever_the_tokens():
    assert segments((Exit(3, 9), Exit(3), Exit(6, 9), Exit(9))) == [(0, 3), (3, 6), (6, 9)]
