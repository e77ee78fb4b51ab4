"""Exits with fewer tiles, of every family that cuts pictures: what transformers makes of a smaller picture."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import numpy as np
import pytest

from edgesafe.checkpoint.geometry import check_exits
from edgesafe.checkpoint.recipe import load_recipes, recipe_from_dict, recipes_folder
from edgesafe.device import load_device
from edgesafe.errors import ConfigError, ParityError
from edgesafe.format import graph_io, manifest
from edgesafe.format import tiles as arithmetic
from edgesafe.format.bundle import Bundle
from edgesafe.format.exits import Exit
from edgesafe.format.tiles import caps
from edgesafe.runtime import tiles
from edgesafe_export import parity_model as parity
from edgesafe_export.export import FLOAT, probes, write
from edgesafe_export.plan import choose_ladder, make_plan
from edgesafe_export.quantize import EMBED_SCHEME, quantize
from edgesafe_export.skeleton import open_sketch
from edgesafe_export.tolerances import FLOAT_RELATIVE, QUANTIZED_FEATURES
from mutants import wrong
from tiny_families import TILE, picture

# Smaller pictures of the tiny checkpoints, by hand: 1 x 1 and 2 x 2 of 3 x 3 tiles and the whole one, or a canvas's and one.
CAPS = {"llava_next": [1, 3, 4], "llava_onevision": [1, 2, 3, 4, 5, 7], "idefics3": [1, 5], "smolvlm": [1, 5]}
FAMILIES = tuple(CAPS)


@pytest.fixture
def opened(cases, tmp_path):
    """A family's bundle with exits of fewer tiles, one of each number; the graphs are those of the depths."""

    def open_it(name: str, where: str = "b", quantized: bool = False):
        case = cases(name)
        fewer = [Exit(2, tiles=count) for count in CAPS[name]]
        job = replace(case.job, ladder=tuple(sorted({*case.job.ladder, *fewer, Exit(3, tiles=1)})))
        scheme = {graph_io.EMBED_PATH: EMBED_SCHEME, graph_io.DECODER_PATH: "int8-block32"}
        parts = case.parts
        if quantized:
            parts = {path: (quantize(m, scheme.get(path, "int8-dynamic")), spec) for path, (m, spec) in parts.items()}
        write(job, tmp_path / where, parts, FLOAT, {})
        return case.family, parity.open_session(tmp_path / where), probes(job)

    return open_it


@pytest.mark.parametrize("name", FAMILIES)
def test_every_number_of_tiles_is_transformers_smaller_picture(opened, tmp_path, name):
    family, session, rows = opened(name)
    assert caps(family.tiles, TILE) == CAPS[family.name]
    found = parity.check_float(family, session, rows[:2])
    for kind in ("float_relative", "logits_relative"):
        assert list(found[kind]) == [str(exit) for exit in session.manifest.ladder]
        assert 0 < max(found[kind].values()) < FLOAT_RELATIVE / 5
    wide = {exit.tiles: session.cut(picture(60, 60), exit).tiles for exit in session.manifest.ladder}
    assert all(seen <= (most or seen) for most, seen in wide.items()) and len(set(wide.values())) > 1
    assert Bundle.open(tmp_path / "b").manifest.to_dict()["format_version"] == 5
    inputs = parity.processed(family, picture(), "What?")  # no setting is left behind
    assert inputs["pixel_values"].flatten(0, 1).shape[0] == session.cut(picture()).tiles


@pytest.mark.parametrize("name", FAMILIES)
def test_quantized_exits_with_fewer_tiles_stay_within_tolerance(opened, name):
    (_, plain, _), (_, small, _) = opened(name, "plain"), opened(name, "small", quantized=True)
    exits = [exit for exit in plain.manifest.ladder if exit.tiles]
    want, got = plain.vision_states(picture(), exits), small.vision_states(picture(), exits)
    for exit in exits:
        off = np.sqrt(np.mean((got[exit] - want[exit]) ** 2) / np.mean(want[exit] ** 2))
        assert 0 < off < QUANTIZED_FEATURES


# What is wrong, whose function, and its edit; each in the families of grids and of canvases where it can be.
MUTANTS = {
    "one tile a side too many": (manifest, "at_most", ("math.isqrt(tiles - 1)", "math.isqrt(tiles - 1) + 1"), "smolvlm"),
    "one tile a side too few": (manifest, "at_most", ("math.isqrt(tiles - 1)", "math.isqrt(tiles - 1) - 1"), "smolvlm"),
    "a canvas too large": (manifest, "at_most", ("tile**2 < tiles", "tile**2 <= tiles"), "llava_onevision"),
    "a canvas too small": (manifest, "at_most", ("tile**2 < tiles", "tile**2 < tiles - 1"), "llava_onevision"),
    "a canvas for the whole picture alone": (tiles, "cut_of", ("and not spec.canvases", "and False"), "llava_next"),
    "another order": (tiles, "_split", ("for y in range(0, height, tile) for x in range(0, width, tile)",
                      "for x in range(0, width, tile) for y in range(0, height, tile)"), "smolvlm"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_other_tiles_are_refused(opened, monkeypatch, name):
    module, function, edit, family_name = MUTANTS[name]
    family, session, rows = opened(family_name)
    monkeypatch.setattr(module, function, wrong(getattr(arithmetic if function != "_split" else module, function), edit))
    for check in (parity.check_inputs, parity.check_features):
        with pytest.raises((ParityError, IndexError, ValueError)):
            check(family, *((session.tokenizer, session.manifest) if check is parity.check_inputs else (session,)), rows[:3])


@pytest.mark.parametrize("text", ["row_end", "whole", "alone"])
def test_a_lost_separator_is_refused(opened, text):
    family, session, rows = opened("smolvlm")
    texts = session.manifest.tiles.texts
    lost = replace(texts, **{text: getattr(texts, text).strip("\n").replace("<global-img>", "")})
    changed = replace(session.manifest, tiles=replace(session.manifest.tiles, texts=lost))
    with pytest.raises(ParityError, match="prompt's ids differ"):
        parity.check_prompt(family, session.tokenizer, changed, rows[:3])


def test_answers_come_at_every_number_of_tiles_and_a_budget_takes_fewer(opened):
    _, session, _ = opened("smolvlm")
    seen = {}
    for exit in ("3", "3x1", "2x5"):
        features = session.vision_states(picture(), [exit])[Exit.parse(exit)]
        want = session.answer_features(features, "What?", 8, session.cut(picture(), Exit.parse(exit)))
        talk = session.conversation(picture(), exit=exit)
        assert [talk.ask("What?", max_new_tokens=8).text for _ in range(2)] == [want, want]
        assert talk.reused_tokens > 5 and str(talk.exit) == exit
        seen[exit] = len(features)
    assert seen == {"3": 7 * 4, "3x1": 4, "2x5": 5 * 4}


@pytest.mark.parametrize(
    ("name", "exit", "shown"),
    [
        ("smolvlm", "2x2", "one of 1, 5"),
        ("smolvlm", "2x10", "one of 1, 5"),
        ("llava_next", "2x5", "one of 1, 3, 4"),
        ("llava", "2x1", "a depth alone, or with fewer visual tokens"),
    ],
)
def test_what_no_smaller_picture_has_is_refused(cases, name, exit, shown):
    family, asked = cases(name).family, Exit.parse(exit)
    with pytest.raises(ConfigError) as caught:
        check_exits([Exit(2), asked], family.recipe, family.geometry, family.tiles)
    assert caught.value.where == "exits" and caught.value.expected.startswith(shown) and exit in str(caught.value)


def test_where_a_picture_is_one_tile_no_exit_has_fewer(cases):
    family = cases("smolvlm").family  # as align and evaluate hold it
    with pytest.raises(ConfigError, match="exit 2x1 has fewer tiles, and one tile stands for a picture here"):
        check_exits([Exit(2, tiles=1)], family.recipe, family.geometry)
    table = tomllib.loads((recipes_folder() / "llava.toml").read_text(encoding="utf-8"))
    table["pictures"]["fewer"] = "tiles"
    with pytest.raises(ConfigError, match="cut into some"):
        recipe_from_dict(table, where="by hand")
    assert load_recipes()["smolvlm"].fewer == "tiles"


def test_a_plan_counts_the_tiles(cases):
    folder = cases("smolvlm").job.model_dir
    sketch, schemes = open_sketch(folder), {"vision": "fp32", "text": "fp32"}
    device = replace(load_device("host"), estimates={"gops_fp32": 1e-3, "gops_int8": 1e-3, "read_gb_s": 1e6})
    ladder = choose_ladder(sketch, "2,2x1,2x5")
    plan = make_plan(sketch, folder, "tiny", device, ladder, "chain", schemes)
    times = {str(one.exit): one.ttft_ms for one in plan.exits}
    # A picture of 640 x 480 is 3 x 3 tiles of a longest edge of three and the whole one; 2 x 2 of a longest edge of two.
    assert plan.tiles == 10
    assert (times["2"] - times["2x5"]) / 5 == pytest.approx((times["2x5"] - times["2x1"]) / 4, rel=0.1)
    assert len({one.bytes for one in plan.exits if one.exit.depth == 2}) == 1
