"""LLaVA with a DINOv2 tower: exits as transformers gives them, and each way to get such a tower wrong is noticed.

The tiny checkpoint has positions for 6 x 6 patches and sees pictures of 4 x 4, as published DINOv2 has them for 518 px and sees
224 px. Its layer scales and norms are far from one.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgesafe.device import load_device
from edgesafe.errors import InputError, ParityError
from edgesafe.format import graph_io
from edgesafe.format.exits import Exit, parse_exits
from edgesafe_export import graphs, skeleton
from edgesafe_export import parity_model as parity
from edgesafe_export.export import Job, probes, trace, write
from edgesafe_export.family import load_family
from edgesafe_export.quantize import quantize
from edgesafe_export.tolerances import FLOAT_RELATIVE, QUANTIZED_FEATURES
from tiny_families import BLOCKS, DINOV2, PATCH, POSITIONS, TILE, Case, edit, make_tiny, picture

FP32 = {"vision": "fp32", "text": "fp32"}
LADDER = parse_exits("all", BLOCKS)
SCALES = ("layer_scale1.lambda1", "layer_scale2.lambda1")


@pytest.fixture(scope="module")
def case(cases, tmp_path_factory) -> Case:
    """The tower's own graphs; those of the text side are another family's of the same sizes, which is traced anyway."""
    folder = make_tiny(DINOV2, tmp_path_factory.mktemp("tiny") / "dinov2")
    job = Job(load_family(folder), folder, DINOV2, "0" * 64, load_device("host"), "chain", LADDER, None, {}, 0)
    text = {path: part for path, part in cases("llava_next").parts.items() if path.startswith("text/")}
    return Case(job, {**trace(job, text=False), **text})


def _open(case: Case, folder: Any, **changed: Any) -> Any:
    write(case.job, folder, {**case.parts, **changed}, FP32, {})
    return parity.open_session(folder)


def test_float_graphs_are_transformers_at_every_depth(case, tmp_path):
    session = _open(case, tmp_path / "b")
    found = parity.check_features(case.family, session, probes(case.job)[:8])
    assert tuple(found) == LADDER and 0 < max(found.values()) < FLOAT_RELATIVE / 5
    inputs = parity.processed(case.family, picture(), "What is this?")
    assert np.array_equal(session.look(picture())[0], inputs["pixel_values"][0].numpy())


def test_the_oracle_is_the_state_after_so_many_blocks(case):
    """By transformers' own model whose later blocks hand on what they get; CLS goes behind the tower, not in front of it."""
    family, inputs = case.family, parity.processed(case.family, picture(), "What is this?")
    tower = family.model.model.vision_tower
    wanted = {}
    for depth in range(1, family.geometry.n_blocks + 1):
        later = list(tower.encoder.layer)[depth:]
        for block in later:
            block.forward = lambda states, *_, **__: states
        with torch.no_grad():
            state = tower.encoder(tower.embeddings(inputs["pixel_values"])).last_hidden_state
        for block in later:
            del block.forward
        assert state.shape[1] == 1 + (TILE // PATCH) ** 2
        with torch.no_grad():
            wanted[depth] = family.model.model.multi_modal_projector(state[:, 1:])[0]
    for depth, want in wanted.items():
        assert torch.equal(family.oracle(inputs, Exit(depth)), want)
        for other in {depth - 1, depth + 1} & set(wanted):
            assert parity.relative(wanted[other].numpy(), want.numpy()) > 100 * FLOAT_RELATIVE


def _without_scales(load: Any, names: list[str]) -> dict[str, np.ndarray]:
    return {name: np.ones_like(w) if name.endswith(SCALES) else w for name, w in load(names).items()}


def _of_the_next_block(load: Any, names: list[str]) -> dict[str, np.ndarray]:
    """Block 1's weights are block 2's."""
    other = {name: name.replace(".layer.1.", ".layer.2.") for name in names if "vision_tower" in name}
    found = load(sorted({*names, *other.values()}))
    return {name: found[other.get(name, name)] for name in names}


def _first_positions(_: nn.Module, positions: Any, table: np.ndarray) -> np.ndarray:
    """The table cut to length instead of interpolated."""
    return np.ascontiguousarray(table[:, : 1 + (positions.side // PATCH) ** 2])


@pytest.mark.parametrize("wrong", [_without_scales, _of_the_next_block, _first_positions])
def test_wrong_weights_in_the_right_graphs_are_noticed(case, tmp_path, monkeypatch, wrong):
    load = skeleton.Sketch.load
    if wrong is _first_positions:
        monkeypatch.setattr(skeleton, "interpolate", wrong)
    else:
        monkeypatch.setattr(skeleton.Sketch, "load", lambda self, names: wrong(lambda n: load(self, n), names))
    session = _open(case, tmp_path / "b", **trace(case.job, text=False))
    with pytest.raises(ParityError, match="image features"):
        parity.check_features(case.family, session, probes(case.job)[:2])


def test_a_tower_without_cls_is_noticed(case, tmp_path):
    """The patches alone, from the first block on: every graph fits the others, and the features are others."""
    family = case.family

    class Patches(nn.Module):
        def __init__(self, embeddings: nn.Module) -> None:
            super().__init__()
            self.embeddings = embeddings

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.embeddings(x)[:, 1:]

    wrong = copy.copy(family)
    wrong.geometry = replace(family.geometry, tokens=family.geometry.tokens - 1, dropped=0)
    start = copy.copy(family.segment(0, 1))
    start._modules = {**start._modules, "embeddings": Patches(start.embeddings)}
    wrong.segment = lambda a, b: start if a == 0 else family.segment(a, b)
    parts = {graph_io.segment_path(a, a + 1): graphs.segment(wrong, a, a + 1) for a in range(3)}
    session = _open(case, tmp_path / "b", **parts, **{graph_io.HEAD_PATH: graphs.head(wrong)})
    with pytest.raises(ParityError, match="image features"):
        parity.check_features(family, session, probes(case.job)[:2])


def test_quantized_graphs_stay_within_tolerance_and_keep_their_layer_scales(case, tmp_path):
    vision = {path: part for path, part in case.parts.items() if path.startswith("vision/")}
    quantized = {path: (quantize(m, "int8-dynamic"), spec) for path, (m, spec) in vision.items()}
    block = quantized[graph_io.segment_path(1, 2)][0].graph
    assert sum(t.name.endswith("lambda1") for t in block.initializer) == 2
    plain, small = _open(case, tmp_path / "a"), _open(case, tmp_path / "b", **quantized)
    want, got = (session.vision_states(picture(), LADDER) for session in (plain, small))
    for exit in LADDER:
        off = want[LADDER[exit.depth % len(LADDER)]]
        errors = [float(np.sqrt(np.mean((x - want[exit]) ** 2) / np.mean(want[exit] ** 2))) for x in (got[exit], off)]
        assert errors[0] < QUANTIZED_FEATURES < errors[1] / 2


def test_positions_of_the_pictures_own_size_are_taken_as_they_are(tmp_path):
    folder = make_tiny(DINOV2, tmp_path / "m", crop_size={"height": POSITIONS, "width": POSITIONS})
    sketch = skeleton.open_sketch(folder)
    assert sketch.positions is None and sketch.family.geometry.tokens == 37
    name = "model.vision_tower.embeddings.position_embeddings"
    assert np.array_equal(sketch.load([name])[name], load_family(folder).model.get_parameter(name).detach().numpy())


def test_positions_of_another_shape_than_the_config_s_are_refused(tmp_path):
    folder = make_tiny(DINOV2, tmp_path / "m")
    vision = load_family(folder).model.config.vision_config.to_dict()
    edit(folder, "config.json", vision_config={**vision, "image_size": 48})
    for read in (load_family, skeleton.open_sketch):
        with pytest.raises(InputError, match="position_embeddings"):
            read(folder)
