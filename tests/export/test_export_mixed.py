"""mixed-gptq: keys, values and each layer's last matrix in 8 bits, all others in 4, also where one product makes several."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper

from edgesafe.format import graph_io
from edgesafe_export import quantize as quantizer
from edgesafe_export.block_weights import Format, round_nearest
from edgesafe_export.quantize import BLOCKS, TABLE, Blocks, cached_outputs, matrices, quantize
from edgesafe_export.shared_cache import prune
from mutants import wrong
from tiny_families import NAMES

KEPT = Blocks(Format(8, 32), Format(8, 32), cached=TABLE)


def _constant(model: onnx.ModelProto, name: str) -> np.ndarray:
    return next(numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == name)


def _found_are_keys_and_values(family, model: onnx.ModelProto) -> bool:
    """Whether what was found of every layer are transformers' own k_proj and v_proj, and nothing else."""
    found = [_constant(model, name)[:, -count:].T for name, count in cached_outputs(model).items()]
    layers = [layer.self_attn for layer in family.decoder().model.layers]
    want = [torch.cat([one.k_proj.weight, one.v_proj.weight]).detach().numpy() for one in layers]
    return len(found) == len(want) > 0 and all(np.array_equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_values_are_found_in_every_family(cases, name):
    case = cases(name)
    assert _found_are_keys_and_values(case.family, case.parts[graph_io.DECODER_PATH][0])


EDITS = [
    ("widths[matrix] * sum(own[1:])", "widths[matrix] * sum(own[2:])"),
    ("// sum(own)", "// sum(heads)"),
    ("name or node.input[0]", "name"),
]


@pytest.mark.parametrize(("edit", "name"), list(zip(EDITS, ("llava", "apart", "llava"), strict=True)))
def test_a_wrong_share_of_a_product_is_seen(cases, edit, name):
    mutant, case = wrong(cached_outputs, edit), cases("llava")
    model = case.parts[graph_io.DECODER_PATH][0]
    model = _apart(model) if name == "apart" else model
    assert mutant(model) != cached_outputs(model)


def _apart(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same decoder with three products in front of each attention, as where nothing packs them."""
    apart = onnx.ModelProto()
    apart.CopyFrom(model)
    products, counts = matrices(model), cached_outputs(model)
    nodes = []
    for node in apart.graph.node:
        if node.op_type == "MatMul" and node.input[1] in counts:
            matrix, count = _constant(model, node.input[1]), counts[node.input[1]]
            at = matrix.shape[1] - count
            for kind, part in zip("qkv", np.split(matrix, [at, at + count // 2], axis=1), strict=True):
                name = f"{node.input[1]}.{kind}"
                apart.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(part), name))
                nodes.append(helper.make_node("MatMul", [node.input[0], name], [f"{node.output[0]}.{kind}"], name=name))
            continue
        if node.op_type == "GroupQueryAttention":
            node.input[:3] = [f"{node.input[0]}.{kind}" for kind in "qkv"]
        nodes.append(node)
    del apart.graph.node[:]
    apart.graph.node.extend(nodes)
    for tensor in [t for t in apart.graph.initializer if t.name in counts]:
        apart.graph.initializer.remove(tensor)
    assert len(matrices(apart)) == len(products) + 2 * len(counts)
    return apart


def test_products_of_their_own_are_keys_and_values_as_a_whole(parts):
    model = _apart(parts[graph_io.DECODER_PATH][0])
    found = cached_outputs(model)
    assert {name[-2:] for name in found} == {".k", ".v"} and len(found) == 4
    assert all(_constant(model, name).shape[1] == count for name, count in found.items())


def _formats(model: onnx.ModelProto) -> list[tuple[int, int, int]]:
    """Outputs, bits and block size of every product, in order."""
    said = [{a.name: a.i for a in node.attribute} for node in model.graph.node if node.op_type == "MatMulNBits"]
    return [(one["N"], one["bits"], one["block_size"]) for one in said]


def test_the_scheme_s_formats_are_where_they_belong(job, parts):
    model, config = parts[graph_io.DECODER_PATH][0], job.family.text_config
    sums = {name: torch.eye(len(_constant(model, name))) for name in matrices(model)}
    made = _formats(quantize(model, "mixed-gptq", hessians=sums))
    width, inner, size = config.hidden_size, config.intermediate_size, job.family.geometry.head_dim
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    layer = [(queries, 4, 32), (2 * keys, 8, 64), (width, 4, 32), (2 * inner, 4, 32), (width, 8, 128)]
    assert made == [*layer, *layer, (config.vocab_size, 8, 64)]
    plain = _formats(quantize(model, "int4-gptq", hessians=sums))
    assert plain == [*[(n, 4, 32) for n in (queries + 2 * keys, width, 2 * inner, width)] * 2, (config.vocab_size, 8, 64)]


def _attention_input(model: onnx.ModelProto, state: np.ndarray) -> np.ndarray:
    """What the first layer's attention reads of a state [1,S,D]: queries, keys and values."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    name = next(node.input[0] for node in model.graph.node if node.op_type == "GroupQueryAttention")
    del tapped.graph.output[:]
    tapped.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    prune(tapped.graph)
    session = ort.InferenceSession(tapped.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {graph_io.INPUTS_EMBEDS: state})[0])


def _off(job, parts) -> float:
    """How far off queries, keys and values are, of a scheme of 8 bits that keeps them apart."""
    model = parts[graph_io.DECODER_PATH][0]
    state = np.random.default_rng(4).standard_normal((1, 9, job.family.text_config.hidden_size)).astype(np.float32)
    want, got = (_attention_input(one, state) for one in (model, quantize(model, "kept")))
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_both_products_give_what_one_gave_in_its_order(job, parts, monkeypatch):
    monkeypatch.setitem(BLOCKS, "kept", KEPT)
    assert _off(job, parts) < 0.02
    turned = wrong(quantizer._product_nodes, ("[own.output[0] for own in nodes]", "[own.output[0] for own in nodes[::-1]]"))
    monkeypatch.setattr(quantizer, "_product_nodes", turned)
    assert _off(job, parts) > 0.3


def test_eight_bits_are_rounded_to_nearest_and_four_are_compensated():
    rng = np.random.default_rng(5)
    matrix, inputs = (
        rng.standard_normal((6, 64)).astype(np.float32),
        rng.standard_normal((200, 64)) @ rng.standard_normal((64, 64)),
    )
    sums = {"w": torch.tensor(inputs.T @ inputs, dtype=torch.float32)}
    for form, same in ((TABLE, True), (Format(4, 32), False)):
        assert np.array_equal(quantizer._rounded(matrix, form, "w", sums).codes, round_nearest(matrix, form).codes) == same
    with pytest.raises(KeyError):
        quantizer._rounded(matrix, Format(4, 32), "w", {})
