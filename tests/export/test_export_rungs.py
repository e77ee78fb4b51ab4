"""Exports of exits with fewer visual tokens: parity at each, what is refused, and graphs that stay what they were without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edgesafe.checkpoint.geometry import check_exits
from edgesafe.checkpoint.recipe import load_recipes, recipe_from_dict
from edgesafe.cli import main
from edgesafe.errors import BundleError, ConfigError, InputError, ParityError
from edgesafe.format import graph_io
from edgesafe.format.bundle import Bundle
from edgesafe.format.exits import Exit, parse_exits, pool_windows
from edgesafe_export import export as export_module
from edgesafe_export import graphs
from edgesafe_export import parity_model as parity
from edgesafe_export import parity_pieces as compare
from edgesafe_export.estimate import exit_graphs
from edgesafe_export.export import FLOAT, probes, write
from edgesafe_export.front import front, read_accuracy
from edgesafe_export.modules import FewerTokens
from edgesafe_export.pieces import TOKENS, vision_pieces
from edgesafe_export.plan import choose_ladder, make_plan
from edgesafe_export.skeleton import open_sketch
from edgesafe_export.stream import make_pieces

LADDER = parse_exits("1-3,1@4,2-3@9", 4)
NINE, FOUR = graph_io.tokens_path(9), graph_io.tokens_path(4)


@pytest.fixture(scope="module")
def fewer(job, parts):
    """The tiny export with rungs: the traced graphs of its depths and two more."""
    more = {graph_io.tokens_path(n): graphs.fewer_tokens(job.family, n) for n in (9, 4)}
    return replace(job, ladder=LADDER), {**parts, **more}


def check(fewer, folder, how=parity.check_features, **changed):
    job, parts = fewer
    write(job, folder, {**parts, **changed}, FLOAT, {})
    return how(job.family, parity.open_session(folder), probes(job))


def test_every_rung_is_transformers_with_tokens_averaged(fewer, tmp_path):
    found = check(fewer, tmp_path / "b", parity.check_float)
    for kind in ("float_relative", "logits_relative"):
        assert list(found[kind]) == [str(exit) for exit in LADDER] and 0 < max(found[kind].values()) < 1e-5
    manifest = Bundle.open(tmp_path / "b").manifest
    assert [spec.graphs[-1] for spec in manifest.exits if spec.exit.visual_tokens] == [FOUR, NINE, NINE]
    assert manifest.graphs[NINE].weight_bytes < 1000 and manifest.graphs[NINE].flops == 0


def test_the_oracle_averages_tokens_as_written_by_hand(job):
    pixels = torch.randn(1, 3, 72, 72)
    whole = job.family.oracle({"pixel_values": pixels}, Exit(2)).reshape(6, 6, -1)
    for count, window in ((9, 2), (4, 3), (1, 6)):
        starts = range(0, 6, window)
        want = torch.stack([whole[i : i + window, j : j + window].flatten(0, 1).mean(0) for i in starts for j in starts])
        torch.testing.assert_close(job.family.oracle({"pixel_values": pixels}, Exit(2, count)), want)
    assert not job.family.model.model.multi_modal_projector._forward_hooks  # none is left behind


def test_a_side_that_is_not_divided_is_transformers_too(fewer, tmp_path):
    job, parts = fewer
    path, ladder = graph_io.tokens_path(16), parse_exits("1-3,2@16", 4)
    write(replace(job, ladder=ladder), tmp_path / "b", {**parts, path: graphs.fewer_tokens(job.family, 16)}, FLOAT, {})
    parity.check_features(job.family, parity.open_session(tmp_path / "b"), probes(replace(job, ladder=ladder)))


class Strided(FewerTokens):
    """Every second token as it is."""

    def forward(self, x):
        return x.reshape(6, 6, -1)[1::2, 1::2].reshape(9, -1)


class Transposed(FewerTokens):
    """The means column by column."""

    def forward(self, x):
        return super().forward(x).reshape(3, 3, -1).movedim(0, 1).reshape(9, -1)


WINDOWS = pool_windows(36, 9)
WRONG = {
    "one beside": FewerTokens(6, [(a + 1, min(b + 1, 6)) for a, b in WINDOWS]),
    "strided": Strided(6, WINDOWS),
    "transposed": Transposed(6, WINDOWS),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_tokens_are_refused(fewer, tmp_path, name):
    job, _ = fewer
    geometry, text_config = job.family.geometry, job.family.text_config
    family = SimpleNamespace(geometry=geometry, text_config=text_config, fewer_tokens=lambda _: WRONG[name].eval())
    with pytest.raises(ParityError, match="exit [23]@9 differs.*image features"):
        check(fewer, tmp_path / "b", **{NINE: graphs.fewer_tokens(family, 9)})


def test_a_prompt_with_all_image_tokens_is_refused(fewer, tmp_path, monkeypatch):
    monkeypatch.setattr(type(fewer[0].family), "prompt_at", lambda _, ids, __: ids)
    with pytest.raises(BundleError, match="returned 4 image features"):
        check(fewer, tmp_path / "b", parity.check_logits)


@pytest.fixture(scope="module")
def rung_pieces(tiny_llava):
    return list(vision_pieces(open_sketch(tiny_llava), parse_exits("1-3,2@9,1@9", 4), "chain"))


def test_the_graphs_of_the_depths_are_those_of_a_ladder_without_rungs(rung_pieces, tiny_pieces):
    with_, without = (
        {p.graph: p.blueprint.proto.SerializeToString(deterministic=True) for p in some if p.graph.startswith("vision/")}
        for some in (rung_pieces, tiny_pieces)
    )
    assert with_.keys() - without.keys() == {NINE} and without.items() <= with_.items()


@pytest.mark.parametrize("layout", ["chain", "standalone"])
def test_every_depth_shares_the_graph_that_averages_tokens(job, layout):
    ways = exit_graphs(job.family, LADDER, layout)
    assert all(
        ways[exit] == (*ways[Exit(exit.depth)], graph_io.tokens_path(exit.visual_tokens))
        for exit in LADDER
        if exit.visual_tokens
    )
    assert {exit: ways[exit] for exit in job.ladder} == exit_graphs(job.family, job.ladder, layout)


def test_the_pieces_are_exact_float_and_quantized(tiny_llava, rung_pieces, tmp_path, fewer):
    assert [p.at for p in rung_pieces if p.kind == TOKENS] == [(36, 9)]
    schemes = {"vision": "int8-dynamic", "text": "fp32"}
    made, measured = make_pieces(open_sketch(tiny_llava), rung_pieces, schemes, tmp_path, probes(fewer[0])[0])
    assert 0 <= measured[NINE]["float"] < 1e-6 and NINE in made
    # A piece with other rows is refused by its own comparison too.
    piece = next(p for p in rung_pieces if p.kind == TOKENS)
    state = np.random.default_rng(0).normal(size=(36, 64)).astype(np.float32)
    wanted = compare.want(piece, {}, state)
    with pytest.raises(ParityError, match="visual tokens"):
        compare.float_error(piece, state, wanted, wanted[::-1])


def test_a_plan_counts_the_shorter_prompt(tiny_llava):
    from edgesafe.device import load_device

    sketch, schemes = open_sketch(tiny_llava), {"vision": "fp32", "text": "fp32"}
    device = replace(load_device("host"), estimates={"gops_fp32": 1.0, "gops_int8": 1.0, "read_gb_s": 1e6})
    ladder = choose_ladder(sketch, "2,2@9,2@1")
    plan = make_plan(sketch, tiny_llava, "tiny", device, ladder, "chain", schemes)
    times = {str(one.exit): one.ttft_ms for one in plan.exits}
    # The head reads the last token alone; attention's two products are of each token by each, as prompts of one part have it.
    text, n = sketch.family.decoder().model, plan.prompt_tokens
    per_token = 2 * sum(w.weight.numel() for w in text.modules() if isinstance(w, torch.nn.Linear)) / 1e6
    scores = 4 * sketch.layers * sketch.family.text_config.hidden_size / 1e6
    assert n < 200
    assert times["2"] - times["2@9"] == pytest.approx(27 * per_token + scores * (n**2 - (n - 27) ** 2), abs=0.2)
    assert times["2@9"] - times["2@1"] == pytest.approx(8 * per_token + scores * ((n - 27) ** 2 - (n - 35) ** 2), abs=0.2)
    assert len({one.bytes for one in plan.exits if one.exit.depth == 2}) == 1


@pytest.mark.parametrize("exits", ["2@5", "2@36", "2@49", "2@x", "2@0", "5@9"])
def test_rungs_that_cannot_be_are_refused_before_anything_is_traced(tiny_llava, tmp_path, exits, monkeypatch):
    from edgesafe.device import load_device

    monkeypatch.setattr(export_module, "trace_pieces", None)
    with pytest.raises(ConfigError) as caught:
        export_module.export_bundle(tiny_llava, tmp_path / "b", load_device("host"), exits=exits)
    assert caught.value.where == "exits" and caught.value.expected and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["smolvlm", "llava_next", "llava_onevision", "idefics3"])
def test_a_family_of_tiles_refuses_a_rung(job, name):
    with pytest.raises(ConfigError, match=f"exit 6@9 has fewer visual tokens.*'{name}'") as caught:
        check_exits([Exit(6), Exit(6, 9)], load_recipes()[name], job.family.geometry)
    assert caught.value.todo == "write 6 in its place"


def test_a_tower_whose_projector_reads_cls_has_no_square(job):
    with pytest.raises(ConfigError, match="37 visual tokens can't become 9"):
        check_exits([Exit(1, 9)], job.family.recipe, replace(job.family.geometry, image_tokens=37))


def test_a_recipe_of_tiles_with_a_square_is_refused():
    import tomllib

    from edgesafe.checkpoint.recipe import recipes_folder

    table = tomllib.loads((recipes_folder() / "llava.toml").read_text(encoding="utf-8"))
    table["pictures"]["cut"] = "canvas"
    with pytest.raises(ConfigError, match="one square"):
        recipe_from_dict(table, where="by hand")


@pytest.fixture
def evaluated(tmp_path):
    """Write an evaluation of exits with so many right answers of 100."""

    def write(rates, **other) -> str:
        exits = [{"exit": exit, "accuracy": {"k": k, "n": 100, "rate": k / 100}} for exit, k in rates.items()]
        (tmp_path / "report.json").write_text(json.dumps({"split": "val", "exits": exits, **other}))
        return str(tmp_path)

    return write


RATES = {"1": 50, "2": 60, "2@1": 20, "2@4": 20, "2@9": 60, "3": 90}


def test_the_front_is_what_no_faster_exit_equals(tiny_llava, evaluated, tmp_path, capsys):
    slow = Path("devices/rpi5.toml").read_text().replace("gops_int8 = 187", "gops_int8 = 0.1")  # no figure for float
    (tmp_path / "slow.toml").write_text(slow)
    words = ["plan", str(tiny_llava), "--device", str(tmp_path / "slow.toml"), "--evaluation", evaluated(RATES)]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    times = {one["exit"]: one["ttft_ms"] for one in found["exits"]}
    assert times["2@1"] < times["2@4"] < times["2@9"] < times["1"] < times["2"] < times["3"]  # the decoder takes the most here
    # As good as 2@9 or worse, and slower: 2 and 1. As good as 2@1 and slower: 2@4.
    assert found["front"] == "2@1,2@9,3"
    assert main(words) == 0 and "--exits 2@1,2@9,3" in capsys.readouterr().out
    assert main([*words[:-2], "--json"]) == 0 and "front" not in json.loads(capsys.readouterr().out)


def test_a_front_leaves_out_what_adds_least_and_keeps_the_reference():
    def plan(**times):
        exits = tuple(SimpleNamespace(exit=Exit.parse(name[1:]), ttft_ms=ms) for name, ms in times.items())
        return SimpleNamespace(exits=exits, reference=Exit(4), device="d")

    rates = {Exit(1): 0.5, Exit(2): 0.8, Exit(3): 0.85, Exit(4): 0.84}
    times = {"_1": 1.0, "_2": 2.0, "_3": 3.0, "_4": 4.0}
    assert front(plan(**times), rates) == (Exit(1), Exit(2), Exit(3), Exit(4))
    assert front(plan(**times), rates, most=3) == (Exit(1), Exit(2), Exit(4))
    assert front(plan(**times), rates, most=2) == (Exit(1), Exit(4))
    with pytest.raises(InputError, match="no time is predicted"):
        front(plan(_1=None, _4=None), rates)


def test_a_front_of_another_split_or_of_no_evaluation_is_refused(evaluated, tmp_path):
    with pytest.raises(InputError, match="no evaluation here"):
        read_accuracy(tmp_path)
    for split in ("cert", "test", "train"):
        with pytest.raises(InputError, match=f"of the split '{split}'"):
            read_accuracy(Path(evaluated(RATES, split=split)))
    with pytest.raises(InputError, match="no accuracy"):
        read_accuracy(Path(evaluated({})))
    for wrong in (
        [{"exit": "x"}],
        [{"exit": "2", "accuracy": {"rate": float("nan"), "n": 9}}],
        [{"exit": "2", "accuracy": {"rate": 1.5, "n": 9}}],
    ):
        with pytest.raises(InputError, match="no evaluation here"):
            read_accuracy(Path(evaluated(RATES, exits=wrong)))
