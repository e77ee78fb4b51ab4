"""The decoder's cache as one buffer: lengths come from the attention mask, not from the past's shape.

transformers' exporter derives every length from the shape of `past_key_values`, so each step needs a past of exactly P tokens
and copies it into a present of P + S. `GroupQueryAttention` can instead write the new tokens into the buffer that it reads, if
past and present are the same memory and `seqlens_k` and `total_sequence_length` say how much of it is filled. Here they are
rewired so; the rotary angles become a table, and the mask that the fusion adds to a causal operator is dropped: batch is
always 1 and nothing is padded, so it masks nothing. The graph still takes a past of exactly P tokens and then returns P + S.

Source: onnxruntime `group_query_attention_helper.h` (what the inputs mean); the same inputs as in onnxruntime-genai's graphs.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgesafe.errors import ExportError
from edgesafe.format import graph_io

Rotary = tuple[np.ndarray, np.ndarray]
_SEQLENS, _TOTAL, _COS, _SIN = "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache"
_SINK, _SINK_AT = "head_sink", 11


def share_cache(model: onnx.ModelProto, rotary: Rotary) -> onnx.ModelProto:
    """The decoder with lengths that come from `attention_mask`; it is changed in place.

    Args:
        model: the fused float decoder, its ends named as in `edgesafe.format.graph_io`.
        rotary: cosines and sines of every position, float32 [context length, rotary size / 2].

    Raises:
        ExportError: a layer's attention was not fused, or is wired in a way that this does not know.
    """
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    attentions = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    if not attentions:
        raise _unknown("no attention was fused")
    for node in attentions:
        if {a.name: a.i for a in node.attribute}.get("do_rotary") != 1:
            raise _unknown("the rotary embedding was not fused into the attention")
        del node.input[5:]
        node.input.extend([_SEQLENS, _TOTAL, _COS, _SIN])
    for node in graph.node:
        if node.op_type == "Where" and (attention := _attention_behind(node.input[2], makers)) is not None:
            _skip(graph, node, attention)
    for at, node in enumerate(_lengths()):
        graph.node.insert(at, node)
    graph.initializer.extend(numpy_helper.from_array(table, name) for table, name in zip(rotary, (_COS, _SIN), strict=True))
    graph.initializer.extend([_constant("cache_axis", [1], np.int64), _constant("cache_one", [1], np.int64)])
    prune(graph)
    return model


def attend_whole(model: onnx.ModelProto, head_dim: int) -> onnx.ModelProto:
    """A decoder whose attention holds all scores of a run instead of going over the cache tile by tile; changed in place.

    onnxruntime's tiled kernel reads the cache for one token with the oldest vector instructions that the machine's kind has.
    Its other kernel takes matrix routines, with AVX on x86, and for one row it does so only where the product is not scaled.
    So the scale goes into the rotary tables, its root into what turns queries and into what turns keys, and a sink that weighs
    nothing chooses the kernel. Where the rotary embedding turns but a part of a head, nothing is changed.

    Source: onnxruntime `group_query_attention.cc` (`use_flash`), mlas `sgemm.cpp` (the routines for M = 1).
    """
    graph = model.graph
    attentions = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    if not attentions:
        return model
    tables = [tensor for tensor in graph.initializer if tensor.name in (_COS, _SIN)]
    if any(2 * table.dims[1] != head_dim for table in tables):
        return model
    said = {a.name: helper.get_attribute_value(a) for a in attentions[0].attribute}
    root = np.float32((said.get("scale") or head_dim**-0.5) ** 0.5)
    for table in tables:
        table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table) * root, table.name))
    for node in attentions:
        for attribute in [a for a in node.attribute if a.name == "scale"]:
            node.attribute.remove(attribute)
        node.attribute.append(helper.make_attribute("scale", 1.0))
        node.input.extend([""] * (_SINK_AT - len(node.input)) + [_SINK])
    graph.initializer.append(numpy_helper.from_array(np.full(said["num_heads"], -1e30, np.float32), _SINK))
    return model


def fold_tables(model: onnx.ModelProto) -> onnx.ModelProto:
    """A decoder, or a part of it, that stores the angles of few positions and computes the others when it is opened; in place.

    The angle of position a + b is that of a plus that of b: of 8,192 positions 64 and 128 are stored, in place of 2 MiB at 32
    angles each. onnxruntime computes constants once. Tables that are small, or not of this kind, stay as they are.
    """
    tables = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in (_COS, _SIN)}
    if len(tables) < 2 or stored_positions(tables[_COS].dims[0]) == tables[_COS].dims[0]:
        return model
    cos, sin = (numpy_helper.to_array(tables[name]) for name in (_COS, _SIN))
    parts = {
        "cos_fine": cos[:_FINE] / cos[0],
        "sin_fine": sin[:_FINE] / cos[0],
        "cos_coarse": cos[::_FINE],
        "sin_coarse": sin[::_FINE],
    }
    parts = {name: part[:, None] if name.endswith("coarse") else part[None] for name, part in parts.items()}
    worst = max(np.abs(a - b).max() for a, b in zip(_unfolded(parts, len(cos)), (cos, sin), strict=True))
    if worst > len(cos) * _ANGLE_ERROR * cos[0].max():
        return model
    for tensor in tables.values():
        model.graph.initializer.remove(tensor)
    parts |= {
        "rotary_whole": np.array([-1, cos.shape[1]]),
        "rotary_first": np.array([0]),
        "rotary_length": np.array([len(cos)]),
    }
    model.graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(part), name) for name, part in parts.items())
    nodes = [
        node
        for out, join, pairs in ((_COS, "Sub", _COS_PAIRS), (_SIN, "Add", _SIN_PAIRS))
        for node in (
            *(helper.make_node("Mul", list(pair), [f"{out}_{i}"]) for i, pair in enumerate(pairs)),
            helper.make_node(join, [f"{out}_0", f"{out}_1"], [f"{out}_blocks"]),
            helper.make_node("Reshape", [f"{out}_blocks", "rotary_whole"], [f"{out}_rows"]),
            helper.make_node("Slice", [f"{out}_rows", "rotary_first", "rotary_length", "rotary_first"], [out]),
        )
    ]
    for at, node in enumerate(nodes):
        model.graph.node.insert(at, node)
    return model


# The cosine of a sum is the difference of the first two products, its sine the sum of the others.
_COS_PAIRS = (("cos_coarse", "cos_fine"), ("sin_coarse", "sin_fine"))
_SIN_PAIRS = (("sin_coarse", "cos_fine"), ("cos_coarse", "sin_fine"))
_FINE = 128
# float32 holds an angle of so many radians no better than this share of it, and transformers computes angles in float32.
_ANGLE_ERROR = 2.0**-23


def stored_positions(length: int) -> int:
    """How many positions' angles a folded decoder stores.

    >>> stored_positions(512), stored_positions(8192)
    (512, 192)
    """
    return length if length <= _FINE**2 // 8 else _FINE + -(-length // _FINE)


def _unfolded(parts: dict[str, np.ndarray], length: int) -> Rotary:
    """The tables that a folded graph computes."""
    (a, b), (c, d) = ([parts[one] * parts[other] for one, other in pairs] for pairs in (_COS_PAIRS, _SIN_PAIRS))
    cos, sin = (table.reshape(-1, a.shape[-1])[:length] for table in (a - b, c + d))
    return cos, sin


def _lengths() -> list[onnx.NodeProto]:
    """seqlens_k i32 [1] = tokens in the cache after this run, less one; total_sequence_length i32 [] = the same in all."""
    return [
        helper.make_node("ReduceSum", [graph_io.ATTENTION_MASK, "cache_axis"], ["cache_sum"], keepdims=0),
        helper.make_node("Sub", ["cache_sum", "cache_one"], ["cache_last"]),
        helper.make_node("Cast", ["cache_last"], [_SEQLENS], to=TensorProto.INT32),
        helper.make_node("Shape", [graph_io.ATTENTION_MASK], ["cache_shape"], start=1, end=2),
        helper.make_node("Squeeze", ["cache_shape"], ["cache_total"]),
        helper.make_node("Cast", ["cache_total"], [_TOTAL], to=TensorProto.INT32),
    ]


def _attention_behind(name: str, makers: dict[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The attention whose output this is, reshaped."""
    node = makers.get(name)
    while node is not None and node.op_type in ("Reshape", "Transpose"):
        node = makers.get(node.input[0])
    return node if node is not None and node.op_type == "GroupQueryAttention" else None


def _skip(graph: onnx.GraphProto, zeroing: onnx.NodeProto, attention: onnx.NodeProto) -> None:
    """Read the attention's output [1,S,heads x size] where its rows without a readable token were zeroed: there is none."""
    after = [node for node in graph.node if zeroing.output[0] in node.input]
    if len(after) != 1 or after[0].op_type != "Reshape":
        raise _unknown("what follows the attention isn't a reshape back to [1, S, width]")
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == after[0].output[0]:
                node.input[i] = attention.output[0]


def prune(graph: onnx.GraphProto) -> None:
    """Remove the nodes, constants and inputs that no output needs; the cache's inputs are all needed."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    for values in (graph.initializer, graph.input, graph.value_info):
        made = needed | {name for node in kept for name in node.output}
        for value in [v for v in values if v.name not in made]:
            values.remove(value)


def _constant(name: str, values: list[int], dtype: type) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, dtype), name)


def _unknown(what: str) -> ExportError:
    return ExportError(
        what,
        where=graph_io.DECODER_PATH,
        expected="one GroupQueryAttention with rotary embedding per layer",
        todo="report this checkpoint's config: its decoder is built in a way that this exporter does not know",
    )
