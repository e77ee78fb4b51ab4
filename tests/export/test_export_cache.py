"""The decoder's lengths come from the attention mask; what is built otherwise is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

from edgesafe.device import load_device, profile_of
from edgesafe.errors import ExportError, UnsupportedModelError
from edgesafe.format import graph_io
from edgesafe.format.bundle import Bundle
from edgesafe.format.specs import GraphSpec
from edgesafe.runtime import decode
from edgesafe_export import graphs
from edgesafe_export import shared_cache as cache
from edgesafe_export.export import export_bundle
from mutants import wrong


@pytest.fixture
def decoder(parts) -> tuple[onnx.ModelProto, object]:
    model = onnx.ModelProto()
    model.CopyFrom(parts[graph_io.DECODER_PATH][0])
    return model, parts[graph_io.DECODER_PATH][1]


def attention_of(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]


def test_the_decoder_says_that_it_shares_its_cache_and_wants_no_positions(decoder):
    model, spec = decoder
    assert decode.shares_cache(spec)
    assert [t.name for t in spec.inputs] == [value.name for value in model.graph.input]
    assert graph_io.POSITION_IDS not in {t.name for t in spec.inputs}
    # Nothing is left of the mask that the fusion added: it was built anew for every token.
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"Where", "GatherND", "LessOrEqual", "Range", "Cos", "Sin"}
    assert len({tuple(node.input[5:]) for node in attention_of(model)}) == 1


def test_the_rotary_tables_are_transformers_own(job):
    causal = job.family.decoder()
    cos, sin = graphs.rotary_tables(causal, 9)
    want = causal.model.rotary_emb(torch.zeros(1), torch.arange(9)[None])
    size = causal.config.hidden_size // causal.config.num_attention_heads
    assert cos.shape == sin.shape == (9, size // 2)
    for table, whole in ((cos, want[0]), (sin, want[1])):
        np.testing.assert_array_equal(np.concatenate([table, table], axis=1), whole[0].numpy())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_no_table_holds_are_refused(kind):
    causal = SimpleNamespace(model=SimpleNamespace(rotary_emb=SimpleNamespace(rope_type=kind)))
    with pytest.raises(UnsupportedModelError, match=kind):
        graphs.rotary_tables(causal, 9)


def test_a_decoder_that_was_not_fused_is_refused(decoder):
    model, _ = decoder
    tables = (np.zeros((9, 4), np.float32),) * 2
    for node in attention_of(model):
        for attribute in node.attribute:
            if attribute.name == "do_rotary":
                attribute.i = 0
    with pytest.raises(ExportError, match="rotary"):
        cache.share_cache(model, tables)
    for node in attention_of(model):
        node.op_type = "Other"
    with pytest.raises(ExportError, match="no attention"):
        cache.share_cache(model, tables)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("share_cache", ("[_SEQLENS, _TOTAL, _COS, _SIN]", "[_SEQLENS, _TOTAL, _SIN, _COS]")),
        ("prune", ("needed |= set(node.input)", "needed |= set(node.input[:1])")),
    ],
    ids=["cosines for sines", "needed nodes removed"],
)
def test_a_wrong_rewiring_is_seen_by_what_the_decoder_says(job, decoder, tmp_path, monkeypatch, name, edit):
    """The rewiring is done again on the finished decoder: the right one changes nothing, a wrong one changes the logits."""
    model, spec = decoder
    tables = graphs.rotary_tables(job.family.decoder(), job.family.text_config.max_position_embeddings)

    def logits(model: onnx.ModelProto) -> np.ndarray:
        import onnxruntime as ort

        text = job.family.text_config
        shape = (1, text.num_key_value_heads, 0, text.hidden_size // text.num_attention_heads)
        feeds = {t.name: np.zeros(shape, np.float32) for t in spec.inputs if t.name.startswith("past")}
        embeds = np.random.default_rng(0).standard_normal((1, 5, text.hidden_size)).astype(np.float32)
        feeds |= {"inputs_embeds": embeds, "attention_mask": np.ones((1, 5), np.int64)}
        return ort.InferenceSession(model.SerializeToString()).run(["logits"], feeds)[0]

    want = logits(model)
    again = onnx.ModelProto()
    again.CopyFrom(model)
    for tensor in [t for t in again.graph.initializer if t.name in ("cos_cache", "sin_cache", "cache_axis", "cache_one")]:
        again.graph.initializer.remove(tensor)
    for node in [n for n in again.graph.node if any(o.startswith(("cache_", "seqlens_k", "total_seq")) for o in n.output)]:
        again.graph.node.remove(node)
    broken = onnx.ModelProto()
    broken.CopyFrom(again)
    np.testing.assert_array_equal(logits(cache.share_cache(again, tables)), want)
    monkeypatch.setattr(cache, name, wrong(getattr(cache, name), edit))
    with pytest.raises(Exception):  # noqa: B017  onnxruntime's own, or the comparison's
        np.testing.assert_allclose(logits(cache.share_cache(broken, tables)), want, rtol=1e-3)


def test_attention_held_whole_says_the_same_and_a_wrong_one_is_seen(decoder):
    tiled, spec = decoder
    model = onnx.ModelProto()
    model.CopyFrom(tiled)
    whole = cache.attend_whole(model, _head_dim(spec))
    for node in attention_of(whole):
        assert node.input[11] == "head_sink" and {a.name: a.f for a in node.attribute}["scale"] == 1.0
    want = _reads(tiled, spec)
    np.testing.assert_allclose(_reads(whole, spec), want, rtol=1e-4, atol=1e-5)
    for edit in (
        ("** 0.5)", "** 1.0)"),
        ("-1e30", "3.0"),
        ('helper.make_attribute("scale", 1.0)', 'helper.make_attribute("scale", 0.5)'),
    ):
        broken = onnx.ModelProto()
        broken.CopyFrom(tiled)
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(
                _reads(wrong(cache.attend_whole, edit)(broken, _head_dim(spec)), spec), want, rtol=1e-4, atol=1e-5
            )


def _long() -> onnx.ModelProto:
    """Tables of a context of 5,000 positions, as a decoder holds them, that are looked up."""
    angles = np.arange(5000, dtype=np.float32)[:, None] * np.float32(1e4) ** -(np.arange(16, dtype=np.float32) / 16)
    tables = [
        numpy_helper.from_array(1.2 * turn(angles), name) for turn, name in ((np.cos, "cos_cache"), (np.sin, "sin_cache"))
    ]
    nodes = [onnx.helper.make_node("Gather", [f"{name}_cache", "at"], [name]) for name in ("cos", "sin")]
    outs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("cos", "sin")]
    at = onnx.helper.make_tensor_value_info("at", onnx.TensorProto.INT64, ["n"])
    graph = onnx.helper.make_graph(nodes, "g", [at], outs, tables)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


def _turned(model: onnx.ModelProto) -> np.ndarray:
    import onnxruntime as ort

    return np.stack(ort.InferenceSession(model.SerializeToString()).run(None, {"at": np.arange(5000)}))


def test_folded_tables_are_the_same_angles_in_a_tenth_of_the_bytes_and_wrong_ones_are_seen(monkeypatch):
    plain, folded = _long(), cache.fold_tables(_long())
    assert folded.ByteSize() < plain.ByteSize() / 10
    np.testing.assert_allclose(_turned(folded), _turned(plain), atol=6e-4)  # 5,000 x 2^-23
    monkeypatch.setattr(cache, "_ANGLE_ERROR", float("inf"))  # what else keeps tables of another kind as they are
    for edit in (("/ cos[0]", ""), ('"Sub", _COS_PAIRS', '"Add", _COS_PAIRS'), ("cos[::_FINE]", "cos[1::_FINE]")):
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(_turned(wrong(cache.fold_tables, edit)(_long())), _turned(plain), atol=1e-3)


def test_tables_that_do_not_fold_stay_as_they_are():
    odd = _long()
    table = numpy_helper.to_array(odd.graph.initializer[0]).copy()
    table[3000] += 0.01
    odd.graph.initializer[0].CopyFrom(numpy_helper.from_array(table, "cos_cache"))
    before = odd.SerializeToString(deterministic=True)
    assert cache.fold_tables(odd).SerializeToString(deterministic=True) == before


def test_where_a_part_of_a_head_is_turned_attention_stays_as_it_was(decoder):
    model, spec = decoder
    for tensor in model.graph.initializer:
        if tensor.name in ("cos_cache", "sin_cache"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:, :-1], tensor.name))
    before = model.SerializeToString(deterministic=True)
    assert cache.attend_whole(model, _head_dim(spec)).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("attention", ["whole", "tiled"])
def test_the_device_says_how_the_written_decoder_attends(tiny_llava, tmp_path, attention):
    device = replace(load_device("rpi5"), attention=attention)
    export_bundle(tiny_llava, tmp_path / "out", device, exits="1", vision_scheme="fp32", text_scheme="fp32")
    nodes = attention_of(onnx.load(tmp_path / "out" / graph_io.DECODER_PATH))
    assert nodes and {"head_sink" in node.input for node in nodes} == {attention == "whole"}
    kept = profile_of(Bundle.open(tmp_path / "out"))
    assert kept is not None and kept.attention == attention


def _head_dim(spec: GraphSpec) -> int:
    return next(t.shape[3] for t in spec.inputs if t.name == graph_io.past_key(0))


def _reads(model: onnx.ModelProto, spec: GraphSpec) -> np.ndarray:
    """Logits [2, V] after five tokens and after one more."""
    session = ort.InferenceSession(model.SerializeToString())
    rng, rows = np.random.default_rng(0), []
    feeds = {t.name: np.zeros((1, t.shape[1], 0, t.shape[3]), np.float32) for t in spec.inputs if t.name.startswith("past")}
    width = next(t.shape[2] for t in spec.inputs if t.name == graph_io.INPUTS_EMBEDS)
    for new, total in ((5, 5), (1, 6)):
        embeds = rng.standard_normal((1, new, width)).astype(np.float32)
        feeds |= {graph_io.INPUTS_EMBEDS: embeds, graph_io.ATTENTION_MASK: np.ones((1, total), np.int64)}
        out = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
        rows.append(out[graph_io.LOGITS][0, -1])
        feeds |= {name: out[name.replace("past_key_values", "present")] for name in feeds if name.startswith("past")}
    return np.array(rows)
