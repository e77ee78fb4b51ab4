"""The manifest's `tiles` table is read strictly: null without tiles, required in format 2 and unknown in format 1."""

from __future__ import annotations

import copy

import pytest

from edgesafe.errors import BundleError
from edgesafe.format.bundle import MANIFEST, Bundle
from edgesafe.format.manifest import Manifest
from edgesafe.format.seal import seal, unseal
from edgesafe.format.tiles import Cut, cut_of, prompt_runs

TEXTS = {"tile": "[{row}-{col}]<image>", "row_end": "\n", "whole": "all <image>", "alone": "<image>"}
GRID = {"cut": "grid", "longest_edge": 24, "canvases": [], "limit": None, "newline": False, "texts": TEXTS}
CANVAS = {"cut": "canvas", "longest_edge": 0, "canvases": [[8, 16], [16, 8]], "limit": 2, "newline": False, "texts": None}


@pytest.fixture
def tiled(handmade):
    """A manifest as JSON whose pictures are cut; the handmade one's tower takes 8 px."""
    obj = copy.deepcopy(Bundle.open(handmade).manifest.to_dict())
    obj["image"] |= {"resize": "exact", "resize_to": [8, 8], "center_crop": False}
    return obj | {"tiles": copy.deepcopy(GRID)}


def of_format(obj: dict, version: int) -> dict:
    """The same manifest as format 1 or 2 wrote it: exits by depth and no control texts; format 1 has no tiles."""
    old = copy.deepcopy(obj) | {"format_version": version, "reference_depth": int(obj["reference"])}
    old["exits"] = [{"exit_depth": int(e["exit"]), "graphs": e["graphs"]} for e in obj["exits"]]
    for table, key in ((old, "reference"), (old["chat"], "control"), *([(old, "tiles")] if version == 1 else [])):
        del table[key]
    return old


@pytest.mark.parametrize("table", [GRID, CANVAS, {**GRID, "cut": "never"}], ids=["grid", "canvas", "never"])
def test_tiles_read_back_as_they_were_written(tiled, table):
    manifest = Manifest.from_dict(tiled | {"tiles": table})
    assert manifest.tiles is not None and manifest.to_dict()["format_version"] == 3
    assert manifest.to_dict()["tiles"] == table
    assert Manifest.from_dict(manifest.to_dict()) == manifest == Manifest.from_dict(of_format(tiled | {"tiles": table}, 2))


def test_without_tiles_the_table_is_null(handmade):
    data = (handmade / MANIFEST).read_bytes()
    obj = unseal(data, MANIFEST)
    assert obj["format_version"] == 3 and obj["tiles"] is None
    manifest = Bundle.open(handmade).manifest
    assert seal(manifest.to_dict()) == data and Manifest.from_dict(of_format(manifest.to_dict(), 1)) == manifest


def test_the_version_says_whether_there_are_tiles(tiled):
    with pytest.raises(BundleError, match="unknown key 'tiles'"):
        Manifest.from_dict(of_format(tiled, 1) | {"tiles": tiled["tiles"]})
    earlier = of_format(tiled, 2)
    del earlier["tiles"]
    with pytest.raises(BundleError, match="'tiles' is missing"):
        Manifest.from_dict(earlier)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_format_names_exits_in_its_own_way_alone(tiled, version):
    obj = tiled if version == 3 else of_format(tiled, version)
    other = of_format(tiled, 2) if version == 3 else tiled
    for key in ("reference", "reference_depth"):
        if key in other:
            with pytest.raises(BundleError, match=key):
                Manifest.from_dict(obj | {key: other[key]})
    both = [mine | theirs for mine, theirs in zip(obj["exits"], other["exits"], strict=True)]
    for exits in (both, other["exits"]):
        with pytest.raises(BundleError, match="exit"):
            Manifest.from_dict(obj | {"exits": exits})


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"cut": "spiral"}, "cut"),
        ({"longest_edge": 0}, "longest_edge"),
        ({"longest_edge": 5000}, "longest_edge"),
        ({"canvases": [[8, 8]]}, "canvases"),
        ({"limit": 3}, "limit"),
        ({"newline": True}, "newline"),
        ({"newline": 1}, "newline"),
        ({"texts": None}, "texts"),
        ({"texts": {**TEXTS, "alone": "no picture"}}, "image token"),
        ({"texts": {**TEXTS, "row_end": "<image>"}}, "image token"),
        ({"texts": {**TEXTS, "more": ""}}, "more"),
        ({"tyles": 1}, "did you mean"),
        ({**CANVAS, "canvases": []}, "canvases"),
        ({**CANVAS, "canvases": [[8]]}, "canvases"),
        ({**CANVAS, "canvases": [[8, True]]}, "canvases"),
        ({**CANVAS, "canvases": [[8, 12]]}, "whole tiles"),
        ({**CANVAS, "canvases": [[8, 8000]]}, "canvases"),
        ({**CANVAS, "canvases": 8}, "canvases"),
        ({**CANVAS, "canvases": [[8, 16], [136, 128]]}, "too many tiles"),
        ({"longest_edge": 129}, "too many tiles"),
        ({**CANVAS, "limit": 0}, "limit"),
        ({**CANVAS, "texts": TEXTS}, "texts"),
        ({**CANVAS, "newline": True}, "image_features is"),
    ],
    ids=str,
)
def test_wrong_tiles_are_a_bundle_error(tiled, change, shown):
    with pytest.raises(BundleError, match=shown):
        Manifest.from_dict(tiled | {"tiles": {**GRID, **change}})


def test_tiles_of_another_resize_are_refused(tiled):
    tiled["image"] |= {"resize": "shortest_edge", "center_crop": True}
    with pytest.raises(BundleError, match="resized to another size"):
        Manifest.from_dict(tiled)


def test_a_prompt_s_texts_stand_where_the_image_token_stood(tiled):
    manifest = Manifest.from_dict(tiled)
    assert manifest.tiles is not None
    cut = cut_of(manifest.tiles, 8, (10, 20))
    assert cut == Cut(2, 3, 10, 20)
    text, runs = prompt_runs(manifest.tiles, cut, "<image>", manifest.image_tokens)
    rows = ["".join(f"[{r}-{c}]<image>" for c in (1, 2, 3)) for r in (1, 2)]
    assert text == "\n".join(rows) + "\nall <image>" and runs == [manifest.image_tokens] * 7
