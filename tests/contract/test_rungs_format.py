"""Exits with fewer visual tokens on disk: what is averaged, what a manifest may say, and the order by cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgesafe.errors import BundleError, ConfigError, InputError
from edgesafe.format.bundle import Bundle
from edgesafe.format.exits import MOST_RUNGS, Exit, parse_exits, pool_windows, prompt_at
from edgesafe.format.manifest import Manifest
from mutants import wrong
from rungs import ONE, with_rungs


# Where the side is divided, equal parts; of 5 two: up to 2.5, the row in the middle counts for both.
@pytest.mark.parametrize(
    ("side", "fewer", "windows"),
    [(6, 3, [(0, 2), (2, 4), (4, 6)]), (6, 1, [(0, 6)]), (24, 2, [(0, 12), (12, 24)]), (5, 2, [(0, 3), (2, 5)])],
)
def test_the_windows_that_are_averaged(side, fewer, windows):
    assert pool_windows(side * side, fewer * fewer) == windows


def test_windows_are_those_of_torch():
    import torch

    for side in range(2, 41):
        rows = torch.arange(float(side)).square().reshape(1, 1, side)
        for fewer in range(1, side):
            means = [rows[0, 0, a:b].mean() for a, b in pool_windows(side * side, fewer * fewer)]
            torch.testing.assert_close(torch.stack(means), torch.nn.functional.adaptive_avg_pool1d(rows, fewer)[0, 0])


@pytest.mark.parametrize(("tokens", "kept"), [(36, 36), (36, 49), (36, 5), (36, 0), (35, 9), (37, 9), (1, 1), (36, 10**6)])
def test_what_is_no_smaller_square_is_a_config_error(tokens, kept):
    with pytest.raises(ConfigError, match=f"{tokens} visual tokens can't become {kept}") as caught:
        pool_windows(tokens, kept)
    assert caught.value.expected and caught.value.todo


@pytest.mark.parametrize(
    ("spec", "texts"),
    [
        ("6@9,12@36,12", "6@9 12@36 12"),
        ("1-3@4, 2", "1@4 2 2@4 3@4"),
        ("all@1", " ".join(f"{depth}@1" for depth in range(1, 13))),
        ("every:6,every:6@9", "6@9 6 12@9 12"),
        ("6@9,6@9,6@09", "6@9"),
    ],
)
def test_a_ladder_is_spelled_with_its_tokens(spec, texts):
    assert " ".join(map(str, parse_exits(spec, 12))) == " ".join(map(str, sorted(map(Exit.parse, texts.split()))))


def test_a_ladder_has_so_many_exits_with_fewer_tokens_and_no_more():
    assert len(parse_exits(f"1-{MOST_RUNGS}@9,all", 24)) == MOST_RUNGS + 24
    with pytest.raises(ConfigError, match="13 exits with fewer visual tokens or tiles, at most 12"):
        parse_exits(f"1-{MOST_RUNGS + 1}@9", 24)


def test_a_prompt_loses_its_last_image_tokens_alone():
    ids = [5, 7, 7, 7, 7, 5, 7]  # what a user may not write, an answer may hold
    assert prompt_at(ids, Exit(3), 7, 4) == ids and prompt_at(ids, Exit(3, 1), 7, 4) == [5, 7, 5, 7]


@pytest.fixture
def obj(handmade, copy_of) -> dict:
    return with_rungs(copy_of(handmade), "1@1", "1", "2", "3@1", "3").to_dict()


def test_a_manifest_with_rungs_reads_back_and_one_without_is_as_it_was(obj, handmade):
    assert obj["format_version"] == 4 and Manifest.from_dict(obj).to_dict() == obj
    before = Bundle.open(handmade).manifest
    assert before.to_dict()["format_version"] == 3 and before.by_cost == before.ladder


def _graphs_of(obj: dict, exit: str, graphs: list[str]) -> dict:
    return {**obj, "exits": [{**e, "graphs": graphs} if e["exit"] == exit else e for e in obj["exits"]]}


def test_what_does_not_fit_together_is_refused(obj):
    ways = {e["exit"]: e["graphs"] for e in obj["exits"]}
    tokens = obj["graphs"][ONE]
    wrong_ones = {
        "the tokens' graph is missing": _graphs_of(obj, "1@1", ways["1"]),
        "another depth's blocks": _graphs_of(obj, "1@1", ways["3@1"]),
        "nothing in front": _graphs_of(obj, "1@1", [ONE]),
        "all tokens that end in one": _graphs_of(obj, "2", [*ways["2"], ONE]),
        "twice": {**obj, "exits": [obj["exits"][0], *obj["exits"]]},
        "in another order": {**obj, "exits": [obj["exits"][1], obj["exits"][0], *obj["exits"][2:]]},
        "no square": {**obj, "exits": [{**obj["exits"][0], "exit": "1@2"}, *obj["exits"][1:]]},
        "as many as there are": {**obj, "exits": [{**obj["exits"][0], "exit": "1@4"}, *obj["exits"][1:]]},
        "of format 3": {**obj, "format_version": 3},
        "another number comes out": {**obj, "graphs": {**obj["graphs"], ONE: {**tokens, "outputs": tokens["inputs"]}}},
    }
    for name, one in wrong_ones.items():
        with pytest.raises(BundleError):
            print(name, Manifest.from_dict(one))


def test_a_bundle_with_tiles_has_no_rungs(handmade, copy_of):
    from handmade import GRID, TILE

    manifest = replace(with_rungs(copy_of(handmade), "3@1", "3"), tiles=GRID, image=TILE)
    with pytest.raises(BundleError, match="cut into tiles"):
        Manifest.from_dict(manifest.to_dict())


def test_exits_are_ordered_by_what_they_compute(handmade, copy_of):
    # A block and the head have 1,000,000 operations, so depth d has d + 1 of them; the decoder's are what each test says.
    manifest = with_rungs(copy_of(handmade), "1@1", "1", "2@1", "2", "3@1", "3")

    def order(decoder: int | None) -> str:
        spec = replace(manifest.graphs[manifest.text.decoder], flops=decoder)
        return " ".join(map(str, replace(manifest, graphs={**manifest.graphs, manifest.text.decoder: spec}).by_cost))

    # Three tokens more: 3,000,000 as against a block's 1,000,000. 3@1 costs 5, and 1 costs 6.
    assert order(1_000_000) == "1@1 2@1 3@1 1 2 3"
    # 400,000 a token, in millions: 1@1 2.4, 2@1 3.4, 1 3.6, 3@1 4.4, 2 4.6, 3 5.6.
    assert order(400_000) == "1@1 2@1 1 3@1 2 3"
    # Where something is unknown, by depth.
    assert order(None) == "1@1 1 2@1 2 3@1 3"


def test_twins():
    apart = wrong(pool_windows, ("-(-(i + 1) * side // fewer)", "(i + 1) * side // fewer"))
    assert apart(36, 9) == pool_windows(36, 9) and apart(25, 4) == [(0, 2), (2, 5)] != pool_windows(25, 4)
    late = wrong(pool_windows, ("(i * side // fewer,", "(i * side // fewer + 1,"))
    assert late(36, 9) != pool_windows(36, 9)
    behind = wrong(prompt_at, ("ids[first + image_tokens :]", "ids[first + exit.visual_tokens :]"))
    assert behind([5, 7, 7, 7, 7, 5], Exit(3, 1), 7, 4) != [5, 7, 5]
    with pytest.raises(InputError):
        Exit.parse("6@0")
