"""Exits with fewer visual tokens on disk: which tokens are kept, what a manifest may say, and the order by cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgesafe.errors import BundleError, ConfigError, InputError
from edgesafe.format.bundle import Bundle
from edgesafe.format.exits import MOST_RUNGS, Exit, kept_places, parse_exits, prompt_at
from edgesafe.format.manifest import Manifest
from mutants import wrong
from rungs import ONE, with_rungs


# Of 6 a side 3 are kept: (1, 3, 5) * 6 // 6 = 1, 3, 5. Of 6 two: (1, 3) * 6 // 4 = 1, 4. Of 37 (DINOv2 on 518 px) five:
# (1, 3, 5, 7, 9) * 37 // 10 = 3, 11, 18, 25, 33.
@pytest.mark.parametrize(
    ("side", "kept", "at"), [(6, 3, [1, 3, 5]), (6, 2, [1, 4]), (6, 1, [3]), (24, 3, [4, 12, 20]), (37, 5, [3, 11, 18, 25, 33])]
)
def test_the_middle_of_each_part_is_kept(side, kept, at):
    assert kept_places(side * side, kept * kept) == [row * side + column for row in at for column in at]


def test_every_smaller_square_is_kept_whole_and_in_order():
    for side in range(2, 41):
        for kept in range(1, side):
            places = kept_places(side * side, kept * kept)
            assert len(set(places)) == kept * kept and places == sorted(places) and places[0] >= 0 and places[-1] < side * side


@pytest.mark.parametrize(("tokens", "kept"), [(36, 36), (36, 49), (36, 5), (36, 0), (35, 9), (37, 9), (1, 1), (36, 10**6)])
def test_what_is_no_smaller_square_is_a_config_error(tokens, kept):
    with pytest.raises(ConfigError, match=f"{tokens} visual tokens can't become {kept}") as caught:
        kept_places(tokens, kept)
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
    first = wrong(kept_places, ("(2 * i + 1) * side // (2 * kept)", "i * side // kept"))
    assert first(36, 9) != kept_places(36, 9) == [7, 9, 11, 19, 21, 23, 31, 33, 35]
    columns = wrong(kept_places, ("row * side + column", "column * side + row"))
    assert columns(36, 9) != kept_places(36, 9)
    behind = wrong(prompt_at, ("ids[first + image_tokens :]", "ids[first + exit.visual_tokens :]"))
    assert behind([5, 7, 7, 7, 7, 5], Exit(3, 1), 7, 4) != [5, 7, 5]
    with pytest.raises(InputError):
        Exit.parse("6@0")
