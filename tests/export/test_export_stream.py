"""Pieces: filled from the shards by name, compared, quantized and kept, whatever the size of the model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

from edgesafe.device import load_device
from edgesafe.errors import ExportError, ParityError
from edgesafe.format import graph_io
from edgesafe.format.bundle import Bundle
from edgesafe.format.exits import Exit
from edgesafe.runtime import Session
from edgesafe_export import decoder_layers as stack
from edgesafe_export import export as export_module
from edgesafe_export import export_bundle, graphs, stream
from edgesafe_export import parity_model as parity
from edgesafe_export import parity_pieces as compare
from edgesafe_export import placeholders as marks
from edgesafe_export.family import load_family
from edgesafe_export.skeleton import open_sketch
from mutants import wrong
from tiny_families import NAMES, make_tiny

HOST = load_device("host")
QUANTIZED = {"vision_scheme": "int8-dynamic", "text_scheme": "int8-block32"}
LAYERS = 5  # of the fixture `deep`
LADDER = (Exit(1), Exit(3))


@pytest.fixture(scope="module")
def sketch(deep):
    return open_sketch(deep)


@pytest.fixture(scope="module")
def pieces(sketch):
    """Exits 1 and 3: runs of one and of two blocks."""
    return stream.trace_pieces(sketch, LADDER, "chain")


def _logits(proto: onnx.ModelProto, width: int) -> np.ndarray:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {v.name: np.zeros((1, 2, 0, 32), np.float32) for v in session.get_inputs() if v.name.startswith("past")}
    embeds = np.random.default_rng(0).standard_normal((1, 7, width)).astype(np.float32)
    feeds |= {graph_io.INPUTS_EMBEDS: embeds, graph_io.ATTENTION_MASK: np.ones((1, 7), np.int64)}
    return session.run([graph_io.LOGITS], feeds)[0]


def _job(folder: Path) -> export_module.Job:
    sketch = open_sketch(folder)
    return export_module.Job(sketch.family, folder, "deep", "0" * 64, HOST, "chain", LADDER, None, {}, 0, sketch.layers)


def test_a_decoder_of_two_traced_layers_is_the_one_that_is_traced_whole(deep):
    # graphs.decoder over the whole checkpoint is the oracle: five layers traced by transformers' exporter.
    family = load_family(deep)
    whole, spec = graphs.decoder(family)
    stacked, stacked_spec = export_module.trace(_job(deep))[graph_io.DECODER_PATH]
    assert Counter(n.op_type for n in stacked.graph.node) == Counter(n.op_type for n in whole.graph.node)
    assert [v.name for v in stacked.graph.input] == [v.name for v in whole.graph.input]
    assert stacked_spec == spec
    width = family.text_config.hidden_size
    np.testing.assert_allclose(_logits(stacked, width), _logits(whole, width), rtol=1e-5, atol=1e-6)


def test_shards_and_one_file_give_the_same_bytes(deep, sharded):
    one, many = export_module.trace(_job(deep)), export_module.trace(_job(sharded))
    assert one.keys() == many.keys()
    for path in one:
        assert one[path][0].SerializeToString() == many[path][0].SerializeToString(), path


def test_every_weight_is_used_once_and_equal_blocks_are_traced_once(sketch, pieces):
    named = Counter(name for piece in pieces for name in piece.weights)
    unread = {"post_layernorm.weight", "post_layernorm.bias"}
    assert set(named.values()) == {1}
    rest = {n for n in sketch.stored if n not in named}
    # The block after the deepest exit, and the norm of the pooled token, are read by nobody.
    assert all("encoder.layers.3." in n or n.rpartition("vision_tower.")[2] in unread for n in rest)
    ladder = stream.trace_pieces(sketch, tuple(map(Exit, (1, 2, 3))), "chain", text=False)
    assert ladder[1].blueprint.proto is ladder[2].blueprint.proto
    assert ladder[1].weights != ladder[2].weights


def test_a_marked_weight_takes_no_room(sketch):
    for name, weight in sketch.family.model.named_parameters():
        assert weight.untyped_storage().nbytes() <= 4 * len(weight), name


def test_marks_tell_rows_joins_and_turns():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(3, 4, bias=False)})
    starts = marks.mark(model)
    a, b = model["a"].weight.detach().numpy(), model["b"].weight.detach().numpy()
    joined = np.concatenate([a.T, b.T], axis=1)
    proto = onnx.ModelProto()
    proto.graph.initializer.append(numpy_helper.from_array(joined, "joined"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([3.0], np.float32), "scale"))
    blueprint = marks.read_marks(proto, None, starts)
    assert blueprint.names == ["a.weight", "b.weight"] and set(blueprint.sources) == {"joined"}
    real = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b.weight": np.ones((4, 3), np.float32)}
    want = np.concatenate([real["a.weight"].T, real["b.weight"].T], axis=1)
    np.testing.assert_array_equal(marks.fill(blueprint, real)["joined"], want)


def test_constants_that_were_computed_from_weights_are_refused():
    starts = marks.mark(torch.nn.Linear(3, 2))
    for array in (np.array([2.0**22 + 0.5], np.float32), np.full((2, 2), 2.0**22, np.float32) + np.eye(2, dtype=np.float32)):
        proto = onnx.ModelProto()
        proto.graph.initializer.append(numpy_helper.from_array(array, "odd"))
        with pytest.raises(ExportError, match="computed from weights|along two axes"):
            marks.read_marks(proto, None, starts)


def _make(sketch, pieces, folder, schemes=("fp32", "fp32")):
    names = {"vision": schemes[0], "text": schemes[1]}
    return stream.make_pieces(sketch, pieces, names, folder, parity.probes([], 1, 72)[0])[1]


def test_every_piece_equals_torch_and_says_by_how_much(sketch, pieces, tmp_path):
    measured = _make(sketch, pieces, tmp_path, ("int8-dynamic", "int4-block32"))
    assert list(measured) == [piece.name for piece in pieces] and len(measured) == 4 + LAYERS + 1
    assert max(m["float"] for m in measured.values()) < 1e-5
    assert 0.001 < min(m["quantized"] for m in measured.values()) < max(m["quantized"] for m in measured.values()) < 0.4


@pytest.mark.parametrize("name", [*NAMES, "tied"])
def test_every_family_in_pieces(cases, tmp_path, name):
    tied = name == "tied"  # one weight behind the embedding and the head
    sketch = open_sketch(make_tiny("llava_onevision", tmp_path / "m", tied=True) if tied else cases(name).job.model_dir)
    measured = _make(sketch, export_module.trace_pieces(sketch, tuple(map(Exit, (1, 2, 3))), "chain"), tmp_path / "work")
    assert len(measured) == 8 and max(row["float"] for row in measured.values()) < 1e-5


def _of(pieces, kind, nth=0):
    return [piece for piece in pieces if piece.kind == kind][nth]


@pytest.mark.parametrize(("kind", "other"), [("layer", "layers.3."), ("segment", "encoder.layers.3.")])
def test_a_piece_filled_from_another_block_is_refused(sketch, pieces, tmp_path, kind, other):
    _make(sketch, pieces, tmp_path)
    piece = _of(pieces, kind, 1)
    swapped = replace(piece, blueprint=piece.blueprint.renamed(lambda name: _elsewhere(name, other)))
    (tmp_path / "fp32" / Path(piece.name).with_suffix(".json")).unlink()
    with pytest.raises(ParityError, match="differs from torch"):
        _make(sketch, [swapped if p is piece else p for p in pieces], tmp_path)


def _elsewhere(name: str, other: str) -> str:
    head, dot, tail = name.partition("layers.")
    return head + other.rpartition("encoder.")[2] + tail.partition(".")[2] if dot else name


WRONG = [
    ("names[kind(traced_at)] = kind(layer)", "names[kind(traced_at)] = kind(layer + 1)"),
    ("handed if layer - 1 == traced_at else _name(handed, layer - 1)", "handed"),
]


@pytest.mark.parametrize("edit", WRONG, ids=["another layer's cache", "layers skipped"])
def test_wrongly_stacked_layers_are_refused(sketch, monkeypatch, edit):
    monkeypatch.setattr(stack, "_again", wrong(stack._again, edit))
    with pytest.raises(ExportError, match="does not follow"):
        stream.trace_pieces(sketch, (Exit(3),), "chain")


def test_parts_that_call_different_things_alike_are_not_joined(sketch, pieces):
    first, second = (_of(pieces, "layer", i).blueprint.proto for i in (0, 1))
    changed = onnx.ModelProto()
    changed.CopyFrom(second)
    changed.graph.node[-1].output[0] = first.graph.node[-1].output[0]
    with pytest.raises(ExportError, match="different things called"):
        stack.join([first, changed], [], [])


@pytest.fixture
def as_if_large(monkeypatch):
    """Every model counts as too large to be compared whole, every graph as too large for its weights."""
    monkeypatch.setattr(export_module, "WHOLE_WEIGHTS", 0)
    monkeypatch.setattr(export_module, "INLINE_BYTES", 0)


def test_a_large_model_is_compared_by_its_pieces_and_says_so(sharded, deep, tmp_path, as_if_large):
    large = export_bundle(sharded, tmp_path / "large", HOST, exits="1,3", **QUANTIZED)
    parity_ = large.manifest.parity
    assert parity_["check"] == "pieces"
    assert set(parity_["float_relative"]) == {"1", "3"} and max(parity_["float_relative"].values()) < 1e-5
    assert 0 < parity_["quantized_relative"]["1"] <= parity_["quantized_relative"]["3"] != parity_["text_quantized_relative"]
    assert 0 < parity_["text_float_relative"] < 1e-5 < parity_["text_quantized_relative"]
    assert (large.root / "text/weights.bin").stat().st_size > 100_000
    assert large.graph_path(graph_io.DECODER_PATH).stat().st_size < 100_000
    spec = large.manifest.graphs[graph_io.DECODER_PATH]
    assert spec.weight_bytes > 100_000 and len(spec.inputs) == 2 + 2 * LAYERS


def test_a_graph_with_its_weights_outside_answers_like_one_with_them_inside(deep, tmp_path, monkeypatch):
    schemes = {"vision_scheme": "fp32", "text_scheme": "fp32"}
    inside = export_bundle(deep, tmp_path / "inside", HOST, exits="3", **schemes)
    assert inside.manifest.parity["check"] == "whole model"
    monkeypatch.setattr(export_module, "INLINE_BYTES", 0)
    outside = export_bundle(deep, tmp_path / "outside", HOST, exits="3", **schemes)
    image, prompt = parity.probes([], 1, 72)[0]
    said = []
    for bundle in (inside, outside):
        with Session.open(bundle.root, allow_uncertified=True) as session:
            said.append(session.ask(image, prompt, max_new_tokens=12).text)
    assert said[0] == said[1]


def test_standalone_exits_are_pieces_too(deep, tmp_path):
    bundle = export_bundle(
        deep, tmp_path / "out", HOST, layout="standalone", exits="1,3", vision_scheme="fp32", text_scheme="fp32"
    )
    assert [e.graphs for e in bundle.manifest.exits] == [("vision/exit_01.onnx",), ("vision/exit_03.onnx",)]
    assert bundle.manifest.parity["check"] == "whole model"


def _files(bundle: Bundle) -> dict[str, str]:
    return {path: spec.sha256 for path, spec in bundle.manifest.files.items()}


KILLED = """
import os, signal, sys
from pathlib import Path
from edgesafe.device import load_device
from edgesafe_export import export, export_bundle, stream
from edgesafe.format.exits import Exit
export.WHOLE_WEIGHTS = export.INLINE_BYTES = 0
made, real = [], stream._make
def make(piece, *rest):
    if len(made) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(piece.name)
    return real(piece, *rest)
stream._make = make
export_bundle(sys.argv[1], Path(sys.argv[2]), load_device("host"), exits="1,3", vision_scheme="int8-dynamic",
              text_scheme="int8-block32")
"""


def test_a_killed_export_goes_on_where_it_was_and_gives_the_same_bytes(sharded, tmp_path, monkeypatch, as_if_large):
    whole = export_bundle(sharded, tmp_path / "whole", HOST, exits="1,3", **QUANTIZED)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    words = [sys.executable, "-c", KILLED, str(sharded), str(tmp_path / "cut")]
    assert subprocess.run(words, env=env, capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "cut").exists()
    made = []
    real = stream._make
    monkeypatch.setattr(stream, "_make", lambda piece, *rest: made.append(piece.name) or real(piece, *rest))
    resumed = export_bundle(sharded, tmp_path / "cut", HOST, exits="1,3", **QUANTIZED)
    assert len(made) == 4 + LAYERS + 1 - 5
    assert _files(resumed) == _files(whole) and resumed.digest == whole.digest
    assert not (tmp_path / "cut.partial").exists()


def test_other_options_do_not_take_over_the_pieces_of_a_stopped_export(sharded, tmp_path, monkeypatch, as_if_large):
    real, made = stream._make, []

    def stop(piece, *rest):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(piece.name)
        return real(piece, *rest)

    monkeypatch.setattr(stream, "_make", stop)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(sharded, tmp_path / "out", HOST, exits="1,3", **QUANTIZED)
    assert len(list((tmp_path / "out.partial" / "pieces").rglob("*.json"))) == 3
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        export_bundle(sharded, tmp_path / "out", HOST, exits="2,3", **QUANTIZED)
    assert "vision/head.onnx" in made  # of that name, but compared on another ladder's state


def test_dropped_scales_are_refused_by_the_piece(sketch, pieces, tmp_path, monkeypatch):
    right = stream.quantize

    def without(model, scheme, *more):
        model = right(model, scheme, *more)
        for tensor in model.graph.initializer:
            if "scale" in tensor.name:
                tensor.CopyFrom(numpy_helper.from_array(np.ones_like(numpy_helper.to_array(tensor)), tensor.name))
        return model

    monkeypatch.setattr(stream, "quantize", without)
    for schemes in (("int8-dynamic", "fp32"), ("fp32", "int4-block32")):
        with pytest.raises(ParityError, match="quantized, differs"):
            _make(sketch, pieces, tmp_path / schemes[0], schemes)


def test_the_error_is_of_what_a_piece_adds():
    # The state is far larger than what a block adds to it: against the state a missing block would look like 1 %.
    state = np.full((1, 2, 4), 100.0, np.float32)
    piece = type("P", (), {"name": "p", "kind": "layer", "at": (0, 1)})()
    wanted = state + np.float32(1.0)
    assert compare.quantized_error(piece, state, wanted, wanted + np.float32(0.25)) == pytest.approx(0.25, abs=1e-3)
    with pytest.raises(ParityError, match="1.00"):
        compare.quantized_error(piece, state, wanted, state)
    with pytest.raises(ParityError):
        compare.float_error(piece, state, wanted, wanted + np.float32(0.01))
