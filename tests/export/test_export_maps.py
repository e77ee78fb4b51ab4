"""Exit maps in every family: in graphs of their own, or inside a standalone exit, and as transformers would have them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto
from PIL import Image
from torch import nn

from edgesafe.checkpoint import exit_model
from edgesafe.checkpoint.exit_maps import maps_of
from edgesafe.checkpoint.recipe import RECIPES_VARIABLE
from edgesafe.device import load_device
from edgesafe.errors import ParityError
from edgesafe.format import graph_io
from edgesafe.format.exits import Exit
from edgesafe.runtime.session import Session
from edgesafe_export import export as export_module
from edgesafe_export import graphs, stream
from edgesafe_export import parity_model as parity
from edgesafe_export.estimate import exit_graphs, graph_specs
from edgesafe_export.export import probes, trace, write
from edgesafe_export.family import load_family
from edgesafe_export.modules import ExitMap, Head
from edgesafe_export.quantize import quantize, weight_bytes
from edgesafe_export.skeleton import open_sketch
from edgesafe_export.tolerances import FLOAT_RELATIVE, QUANTIZED_FEATURES
from tiny_families import NAMES, TILE, WIDTH, Case, edit, make_tiny
from tiny_maps import FULL, mapped_copy, random_maps, write_maps

HOST, FP32 = load_device("host"), {"vision": "fp32", "text": "fp32"}
LADDER = (Exit(1), Exit(2), Exit(3))  # 3 is the reference of every tiny checkpoint
RANKS = {1: FULL, 2: 4}
NORMED = ("idefics3", "smolvlm")
SEGMENTS = [graph_io.segment_path(a, a + 1) for a in range(3)]
MAP_1, MAP_2, MAP_3 = map(graph_io.map_path, (1, 2, 3))


# One of each kind: mistral and idefics3 differ from two of these in what no map touches.
DIFFERENT = ("llava", "llava_next", "llava_onevision", "smolvlm")


@pytest.fixture(scope="module")
def mapped(cases, tmp_path_factory):
    """A family's case with maps at depths 1 and 2; the text graphs are those of the case without."""
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            plain = cases(name)
            folder = mapped_copy(plain.job.model_dir, tmp_path_factory.mktemp("mapped") / name.replace(" ", "-"), RANKS)
            job = replace(plain.job, family=load_family(folder), model_dir=folder)
            text = {path: part for path, part in plain.parts.items() if path.startswith("text/")}
            made[name] = Case(job, {**trace(job, text=False), **text})
        return made[name]

    return case


@pytest.fixture(params=DIFFERENT)
def case(request, mapped) -> Case:
    return mapped(request.param)


def picture(width: int = 70, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def open_bundle(case: Case, folder: Path, **changed: Any) -> Session:
    write(case.job, folder, {**case.parts, **changed}, FP32, {})
    return parity.open_session(folder)


def _oracle(family, exit: Exit) -> np.ndarray:
    return family.oracle(parity.processed(family, picture(), "What?"), exit).numpy()


def test_a_mapped_export_is_transformers_at_every_depth(case, tmp_path):
    found = parity.check_float(case.family, open_bundle(case, tmp_path / "b"), probes(case.job)[:4])
    for kind in ("float_relative", "logits_relative"):
        assert list(found[kind]) == ["1", "2", "3"] and 0 < max(found[kind].values()) < FLOAT_RELATIVE / 5


def test_each_exit_runs_its_own_map_in_front_of_the_head(case, tmp_path):
    bundle = open_bundle(case, tmp_path / "b").manifest
    last = (MAP_3,) if case.family.name in NORMED else ()  # the norm, which no head runs any more
    assert [e.graphs for e in bundle.exits] == [
        (SEGMENTS[0], MAP_1, graph_io.HEAD_PATH),
        (*SEGMENTS[:2], MAP_2, graph_io.HEAD_PATH),
        (*SEGMENTS, *last, graph_io.HEAD_PATH),
    ]
    assert (case.family.head().norm is None) and set(bundle.graphs) == set(case.parts)


def test_the_map_is_the_exit_s_own_and_the_reference_has_none(case, cases):
    plain = cases(case.job.name if case.job.name in NAMES else "llava").family
    for exit in LADDER:
        error = parity.relative(_oracle(case.family, exit), _oracle(plain, exit))
        assert error == 0 if exit == Exit(3) else error > 100 * FLOAT_RELATIVE


def test_the_oracle_is_the_map_written_out(mapped):
    family = mapped("llava").family
    stored, pixels = maps_of(family.model), torch.randn(1, 3, 72, 72)
    with torch.no_grad():
        states = family.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        full, down, up = stored[1], stored[2][0], stored[2][1]
        wanted = {
            1: states[1][:, 1:] @ full.weight.T + full.bias,
            2: states[2][:, 1:] @ down.weight.T @ up.weight.T + up.bias,
            3: states[3][:, 1:],
        }
        for depth, state in wanted.items():
            want = family.model.model.multi_modal_projector(state)[0]
            got = family.oracle({"pixel_values": pixels}, Exit(depth))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DIFFERENT)
def test_the_oracle_is_what_aligning_reads(mapped, name):
    # Two ways to the same features: a hook inside transformers' path, and the states that align hands to the projector.
    family = mapped(name).family
    model = exit_model.load(mapped(name).job.model_dir)
    image = picture(TILE, TILE)
    states = exit_model.exit_states(model, exit_model.pixel_values(model, [image]))
    for exit in LADDER:
        want = exit_model.project(model, exit_model.exit_state(model, states, exit))[0].numpy()
        got = family.oracle(parity.processed(family, image, "What?"), exit).numpy()
        count = family.geometry.image_tokens  # those of the whole picture: the first of a canvas, the last of a grid
        got = got[-count:] if name in NORMED else got[:count]
        assert parity.relative(got, want[:count]) < FLOAT_RELATIVE


def test_a_checkpoint_without_maps_has_the_graphs_that_it_had(cases):
    for name in DIFFERENT:
        case = cases(name)
        vision = [path for path in case.parts if path.startswith("vision/")]
        assert vision == [*SEGMENTS, graph_io.HEAD_PATH]
        assert (case.family.head().norm is not None) == (name in NORMED)
        chains = exit_graphs(case.family, LADDER, "chain")
        assert list(chains.values()) == [(*SEGMENTS[: e.depth], graph_io.HEAD_PATH) for e in LADDER]


@pytest.mark.parametrize("name", ["smolvlm", "llava_next"])
def test_standalone_exits_hold_their_maps(mapped, tmp_path, name):
    case = mapped(name)
    job = replace(case.job, layout="standalone", ladder=LADDER[1:])
    text = {path: part for path, part in case.parts.items() if path.startswith("text/")}
    write(job, tmp_path / "alone", {**trace(job, text=False), **text}, FP32, {})
    session = parity.open_session(tmp_path / "alone")
    assert [e.graphs for e in session.manifest.exits] == [("vision/exit_02.onnx",), ("vision/exit_03.onnx",)]
    assert max(parity.check_features(case.family, session, probes(job)[:2]).values()) < FLOAT_RELATIVE / 5


@pytest.fixture
def before_norm(monkeypatch, tmp_path):
    """A SmolVLM whose recipe lets a map stand in front of the norm."""
    recipe = 'extends = "smolvlm"\nmodel_type = "mapped_smolvlm"\n[vision]\nmap_after_norm = false\n'
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mapped.toml").write_text(recipe)
    monkeypatch.setenv(RECIPES_VARIABLE, str(tmp_path / "recipes"))
    folder = make_tiny("smolvlm", tmp_path / "m")
    edit(folder, "config.json", model_type="mapped_smolvlm")
    return write_maps(folder, random_maps(WIDTH, RANKS))


def test_a_map_may_stand_in_front_of_the_norm(before_norm, cases, tmp_path):
    plain = cases("smolvlm")
    job = replace(plain.job, family=load_family(before_norm), model_dir=before_norm)
    text = {path: part for path, part in plain.parts.items() if path.startswith("text/")}
    case = Case(job, {**trace(job, text=False), **text})
    assert set(case.parts) == {*plain.parts, MAP_1, MAP_2} and job.family.head().norm is not None
    session = open_bundle(case, tmp_path / "b")
    assert max(parity.check_features(job.family, session, probes(job)[:2]).values()) < FLOAT_RELATIVE / 5
    tower = job.family.model.get_submodule(job.family.recipe.tower)
    behind = graphs.exit_map(_Mapped(job.family, ExitMap([tower.post_layernorm, maps_of(job.family.model)[1]])), 1)
    with pytest.raises(ParityError, match="image features"):
        parity.check_features(job.family, open_bundle(case, tmp_path / "wrong", **{MAP_1: behind}), probes(job)[:2])


class _Mapped:
    """A family with another map at every exit."""

    def __init__(self, family: Any, exit_map: nn.Module) -> None:
        self._family, self._map = family, exit_map

    def exit_map(self, depth: int) -> nn.Module:
        return self._map.eval()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


WRONG = {
    "the neighbour's": lambda norm, own, next_: [*norm, next_],
    "transposed": lambda norm, own, next_: [*norm, _linear(own.weight.T.contiguous(), own.bias)],
    "the bias dropped": lambda norm, own, next_: [*norm, _linear(own.weight, None)],
    "forgotten": lambda norm, own, next_: [*norm, _linear(torch.eye(WIDTH), None)],
    "twice": lambda norm, own, next_: [*norm, own, own],
    "in front of the norm": lambda norm, own, next_: [own, *norm],
    "the norm forgotten": lambda norm, own, next_: [own],
}


@pytest.mark.parametrize(
    ("name", "change"),
    [(n, c) for n in ("llava", "smolvlm") for c in WRONG if n in NORMED or "norm" not in c],
)
def test_a_wrong_map_is_refused(mapped, tmp_path, name, change):
    case = mapped(name)
    recipe, own = case.family.recipe, maps_of(case.family.model)
    tower = case.family.model.get_submodule(recipe.tower)
    norm = [tower.get_submodule(recipe.norm_after_blocks)] if name in NORMED else []
    wrong = ExitMap(WRONG[change](norm, own[1], own[2]))
    session = open_bundle(case, tmp_path / "b", **{MAP_1: graphs.exit_map(_Mapped(case.family, wrong), 1)})
    with pytest.raises(ParityError, match="exit 1 differs from transformers"):
        parity.check_features(case.family, session, probes(case.job)[:1])


def test_a_norm_left_in_the_head_is_refused(mapped, tmp_path):
    case = mapped("smolvlm")
    family, tower = case.family, case.family.model.get_submodule(case.family.recipe.tower)
    twice = Head(family.head().projector, 0, tower.post_layernorm).eval()

    class Wrong(_Mapped):
        def head(self) -> Head:
            return twice

    session = open_bundle(case, tmp_path / "b", **{graph_io.HEAD_PATH: graphs.head(Wrong(family, twice))})
    with pytest.raises(ParityError, match="image features"):
        parity.check_features(family, session, probes(case.job)[:1])


def test_a_manifest_that_leaves_the_maps_out_is_refused(mapped, tmp_path, monkeypatch):
    case = mapped("llava")
    without = {exit: (*SEGMENTS[: exit.depth], graph_io.HEAD_PATH) for exit in LADDER}
    monkeypatch.setattr(export_module, "exit_graphs", lambda *_: without)
    with pytest.raises(ParityError, match="exit 1 differs from transformers"):
        parity.check_features(case.family, open_bundle(case, tmp_path / "b"), probes(case.job)[:1])


def _make(sketch, pieces, folder, vision="fp32"):
    return stream.make_pieces(sketch, pieces, {"vision": vision, "text": "fp32"}, folder, parity.probes([], 1, 72)[0])[1]


def _pieces(folder: Path, *depths: int):
    sketch = open_sketch(folder)
    return sketch, stream.trace_pieces(sketch, tuple(map(Exit, depths)), "chain", text=False)


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_map_is_a_piece_that_equals_torch(mapped, tmp_path, name):
    sketch, pieces = _pieces(mapped(name).job.model_dir, 1, 2, 3)
    maps = [MAP_1, MAP_2, *([MAP_3] if name in NORMED else [])]
    assert [p.name for p in pieces] == [*SEGMENTS, *maps, graph_io.HEAD_PATH]
    measured = _make(sketch, pieces, tmp_path, "int8-dynamic")
    assert max(m["float"] for m in measured.values()) < 1e-5
    quantized = {path: measured[path]["quantized"] for path in maps}
    assert all(0.001 < quantized[path] < 0.1 for path in (MAP_1, MAP_2))
    assert quantized.get(MAP_3, 0.0) < 1e-5  # the norm alone has nothing to quantize


def test_the_head_is_compared_on_what_the_deepest_exit_s_map_gives(tiny_llava, tmp_path):
    folder = mapped_copy(tiny_llava, tmp_path / "m", {1: FULL, 4: FULL})
    sketch, pieces = _pieces(folder, 1, 3, 4)
    _make(sketch, pieces, tmp_path / "w")
    kept = {path.stem: np.load(path) for path in (tmp_path / "w" / "states").glob("*.npy")}
    assert set(kept) == {"vision_001", "vision_003", "vision_004", "mapped_001", "mapped_004", "features"}
    own = maps_of(load_family(folder).model)[4]
    with torch.no_grad():
        want = own(torch.from_numpy(kept["vision_004"])).numpy()
        features = load_family(folder).head()(torch.from_numpy(kept["mapped_004"])).numpy()
    np.testing.assert_allclose(kept["mapped_004"], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kept["features"], features, rtol=1e-4, atol=1e-5)


def test_equal_shapes_are_traced_once_and_a_neighbour_s_weights_are_refused(tiny_llava, tmp_path):
    folder = mapped_copy(tiny_llava, tmp_path / "m", {1: FULL, 2: FULL, 4: 4})
    sketch, pieces = _pieces(folder, 1, 2, 3, 4)
    first, second, low = (piece for piece in pieces if piece.kind == "map")
    assert first.blueprint.proto is second.blueprint.proto is not low.blueprint.proto
    assert [sorted(p.weights) for p in (first, second)] == [[f"exit_maps.{d}.bias", f"exit_maps.{d}.weight"] for d in (1, 2)]
    swapped = replace(first, blueprint=first.blueprint.renamed(lambda name: name.replace("maps.1.", "maps.2.")))
    with pytest.raises(ParityError, match=r"map_01.onnx differs from torch.*the map of exit 1\b"):
        _make(sketch, [swapped if p is first else p for p in pieces], tmp_path / "w")


def test_a_map_near_the_identity_is_judged_by_what_it_gives(tiny_llava, tmp_path):
    # Against what it adds, which is next to nothing, eight bits would look like ruin.
    near = random_maps(WIDTH, {1: FULL})
    near[1].weight.data.mul_(1e-3).add_(torch.eye(WIDTH))
    near[1].bias.data.mul_(1e-3)
    folder = write_maps(Path(shutil.copytree(tiny_llava, tmp_path / "m")), near)
    measured = _make(*_pieces(folder, 1, 3), tmp_path / "w", "int8-dynamic")
    assert measured[MAP_1]["float"] < 1e-5 and 0.001 < measured[MAP_1]["quantized"] < 0.1


def test_eight_bits_keep_the_mapped_features(case, tmp_path):
    small = {p: (quantize(m, "int8-dynamic"), s) for p, (m, s) in case.parts.items() if p.startswith("vision/")}
    for path in (MAP_1, MAP_2):
        left = [t for t in small[path][0].graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2]
        assert not [t.name for t in left if min(t.dims) > 1]
    plain, bits = open_bundle(case, tmp_path / "a"), open_bundle(case, tmp_path / "b", **small)
    want, got = plain.vision_states(picture(), LADDER), bits.vision_states(picture(), LADDER)
    for exit in LADDER:
        error = np.sqrt(np.mean((got[exit] - want[exit]) ** 2) / np.mean(want[exit] ** 2))
        assert error < QUANTIZED_FEATURES


@pytest.mark.parametrize("vision", ["fp32", "int8-dynamic"])
@pytest.mark.parametrize("name", ["llava", "smolvlm"])
def test_bytes_and_operations_of_maps_are_planned(mapped, name, vision):
    case = mapped(name)
    planned = graph_specs(open_sketch(case.job.model_dir), LADDER, "chain", vision, "fp32")
    assert planned.keys() == case.parts.keys()
    for path in (path for path in planned if "map_" in path):
        proto, spec = case.parts[path]
        assert planned[path].flops == spec.flops
        # Beside the numbers each tensor has a name and a shape, up to 40 bytes.
        written = weight_bytes(quantize(proto, vision))
        assert planned[path].weight_bytes == pytest.approx(written, abs=40 * len(quantize(proto, vision).graph.initializer))
    tokens = case.family.geometry.tokens
    assert planned[MAP_1].flops == 2 * tokens * WIDTH**2 and planned[MAP_2].flops == 2 * tokens * 2 * 4 * WIDTH
