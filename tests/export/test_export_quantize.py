"""What the quantizers make of a graph: every large weight in the scheme's own type, the graph that was given left alone."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper

from edgesafe.device import TEXT_SCHEMES, VISION_SCHEMES
from edgesafe.errors import ConfigError, ExportError
from edgesafe.format import graph_io
from edgesafe_export.export import _by_exit
from edgesafe_export.quantize import AUTO, EMBED_SCHEME, TABLE, check_schemes, matrices, quantize

SECOND = graph_io.segment_path(1, 2)


def _ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def _large_floats(model: onnx.ModelProto) -> list[str]:
    weights = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2]
    return [t.name for t in weights if min(t.dims) > 1]


def test_attention_is_fused_one_operator_a_block_and_a_layer(parts):
    assert _ops(parts[SECOND][0])["Attention"] == 1
    assert _ops(parts[graph_io.DECODER_PATH][0])["GroupQueryAttention"] == 2


def test_int8_dynamic_leaves_no_float_matrix_in_a_block(parts):
    # Query, key and value weights included: with the fusion's own Concat in front they stayed float32.
    model = quantize(parts[SECOND][0], "int8-dynamic")
    assert _large_floats(parts[SECOND][0]) and not _large_floats(model)
    assert _ops(model)["QAttention"] == 1 and _ops(model)["Attention"] == 0


@pytest.mark.parametrize(
    ("scheme", "bits", "block_size"),
    [("int4-block32", 4, 32), ("int4-block64", 4, 64), ("int4-block128", 4, 128), ("int8-block32", 8, 32)],
)
def test_blocks_cover_every_matrix_of_the_decoder(parts, scheme, bits, block_size):
    model = quantize(parts[graph_io.DECODER_PATH][0], scheme)
    nodes = [n for n in model.graph.node if n.op_type == "MatMulNBits"]
    # Two layers of qkv, output, gate-up and down, and the head; packed or not, no MatMul is left.
    assert len(nodes) == 2 * 4 + 1 and _ops(model)["MatMul"] == 0
    *layers, head = [{a.name: a.i for a in node.attribute} for node in nodes]
    assert {one["bits"] for one in layers} == {bits} and head["bits"] == TABLE.bits
    assert {a.i for n in nodes for a in n.attribute if a.name == "accuracy_level"} == {4}
    assert {one["block_size"] for one in layers} == {block_size} and head["block_size"] == TABLE.size


@pytest.mark.parametrize("path", [SECOND, graph_io.DECODER_PATH, graph_io.EMBED_PATH])
@pytest.mark.parametrize("scheme", ["int8-dynamic", "int4-block32"])
def test_the_given_graph_stays_as_it_was(parts, path, scheme):
    before = parts[path][0].SerializeToString()
    quantize(parts[path][0], EMBED_SCHEME if path == graph_io.EMBED_PATH else scheme)
    assert parts[path][0].SerializeToString() == before


def test_packing_attention_changes_no_number(job, parts):
    state = torch.randn(1, job.family.geometry.tokens, job.family.geometry.vision_width)
    session = ort.InferenceSession(parts[SECOND][0].SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {graph_io.HIDDEN_STATES: state.numpy()})
    with torch.no_grad():
        want = job.family.segment(1, 2)(state).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_an_embedding_row_is_off_by_half_a_step_at_most(parts):
    model, _ = parts[graph_io.EMBED_PATH]
    table = numpy_helper.to_array(model.graph.initializer[0])
    session = ort.InferenceSession(quantize(model, EMBED_SCHEME).SerializeToString(), providers=["CPUExecutionProvider"])
    (rows,) = session.run(None, {graph_io.INPUT_IDS: np.arange(len(table), dtype=np.int64)[None]})
    # A block's largest weight is 127 steps; a step is rounded to float16, which holds eleven bits.
    whole = np.pad(table, ((0, 0), (0, -table.shape[1] % TABLE.size))).reshape(len(table), -1, TABLE.size)
    step = np.repeat(np.abs(whole).max(axis=2) / 127, TABLE.size, axis=1)[:, : table.shape[1]]
    assert (np.abs(rows[0] - table) <= 0.5 * step * (1 + 2**-3)).all()


def test_a_row_of_zeros_stays_zero(parts):
    model = onnx.ModelProto()
    model.CopyFrom(parts[graph_io.EMBED_PATH][0])
    table = numpy_helper.to_array(model.graph.initializer[0]).copy()
    table[5] = 0
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(table, model.graph.initializer[0].name))
    session = ort.InferenceSession(quantize(model, EMBED_SCHEME).SerializeToString(), providers=["CPUExecutionProvider"])
    (rows,) = session.run(None, {graph_io.INPUT_IDS: np.array([[5]], np.int64)})
    assert not rows.any()


def test_an_embedding_that_is_no_plain_table_is_refused(parts):
    with pytest.raises(ExportError, match="isn't a plain table"):
        quantize(parts[SECOND][0], EMBED_SCHEME)


def test_unknown_schemes_are_refused():
    with pytest.raises(ConfigError, match="int3"):
        check_schemes("int3", "fp32")
    with pytest.raises(ConfigError, match="int8-dynamic"):
        check_schemes("fp32", "int8-dynamic")


@pytest.mark.parametrize(("path", "schemes"), [(SECOND, VISION_SCHEMES), (graph_io.DECODER_PATH, TEXT_SCHEMES)])
def test_every_scheme_that_a_profile_may_name_is_made(parts, path, schemes):
    # By the bytes of what comes out: no two schemes are the same thing, and none is left undone.
    model = parts[path][0]
    plain = _uncorrelated(model)
    made = {scheme: quantize(model, scheme, None, plain) for scheme in schemes if scheme != "auto"}
    contents = {hashlib.sha256(one.SerializeToString()).digest() for one in made.values()}
    assert len(contents) == len(made) and max(made, key=lambda scheme: made[scheme].ByteSize()) == "fp32"


def test_auto_goes_from_small_to_large(parts):
    model = parts[graph_io.DECODER_PATH][0]
    sizes = [quantize(model, scheme, None, _uncorrelated(model)).ByteSize() for scheme in AUTO]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes) and set(AUTO) <= set(TEXT_SCHEMES)


def _uncorrelated(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """Hessians of inputs that have nothing to do with each other."""
    found = matrices(model)
    return {tensor.name: torch.eye(tensor.dims[0]) for tensor in model.graph.initializer if tensor.name in found}


def test_an_exits_error_is_that_of_its_own_pieces(job):
    # One figure a piece, written down by hand; the text pieces' is the largest and belongs to no exit.
    segments = [graph_io.segment_path(a, a + 1) for a in range(3)]
    measured = {name: {"float": 1e-7, "quantized": x} for name, x in zip(segments, (0.1, 0.3, 0.2), strict=True)}
    measured |= {
        graph_io.HEAD_PATH: {"float": 2e-7, "quantized": 0.15},
        "text/layers_000.onnx": {"float": 3e-7, "quantized": 0.9},
    }
    assert _by_exit(job, measured) == {
        "float_relative": {"1": 2e-7, "2": 2e-7, "3": 2e-7},
        "quantized_relative": {"1": 0.15, "2": 0.3, "3": 0.3},
        "text_float_relative": 3e-7,
        "text_quantized_relative": 0.9,
    }
