"""Torch modules to ONNX graphs, by transformers' exporter, one call per part; names as in `edgesafe.format.graph_io`.

The decomposition is ours, because `OnnxExporter.export_for_generation` leaves out LLaVA's tower and projector.
`ort_fusions="cpu"` works on our wrapper modules as on transformers' own: each block ends up with one `Attention`, each decoder
layer with one `GroupQueryAttention`.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edgesafe.errors import UnsupportedModelError
from edgesafe.format import graph_io
from edgesafe.format.graph_io import TensorSpec
from edgesafe.format.specs import GraphSpec
from edgesafe_export.family import Family
from edgesafe_export.placeholders import thin_constants
from edgesafe_export.shared_cache import share_cache

Exported = tuple[onnx.ModelProto, GraphSpec]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' chatter: what goes wrong raises, and parity judges what comes out."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _export(module: nn.Module, inputs: dict[str, Any], *, dynamic: bool) -> Any:
    """`OnnxExporter().export`: an onnx_ir.Model fused for onnxruntime's CPU provider."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    exporter: Any = OnnxExporter  # typed for transformers' own models, it takes any module
    with quiet(), torch.no_grad():
        return exporter().export(module, inputs, config=OnnxConfig(dynamic=dynamic, ort_fusions="cpu")).program


def _finish(program: Any, inputs: list[TensorSpec], outputs: list[TensorSpec], operations: int | None) -> Exported:
    """Rename the graph's ends to the contract's and describe them; inputs that the fused graph dropped stay out."""
    import onnx_ir

    thin_constants(program)
    named = {spec.name: spec for spec in inputs}
    if len(program.graph.inputs) == len(inputs):
        for value, spec in zip(program.graph.inputs, inputs, strict=True):
            value.name = spec.name
    for value, spec in zip(program.graph.outputs, outputs, strict=True):
        value.name = spec.name
    present = tuple(named[v.name] for v in program.graph.inputs)
    proto = forget_origin(pack_attention(onnx_ir.to_proto(program)))
    return proto, GraphSpec(present, tuple(outputs), operations, weight_bytes=0)


def forget_origin(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without the exporter's notes on where each node comes from.

    They hold stack traces with this machine's paths: they would ship to every device, and the same model exported from
    another folder would have another digest.
    """
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del part.metadata_props[:]
    return model


def pack_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """Each fused Attention's query, key and value weights joined into the one constant that the operator wants.

    The fusion leaves a Concat of three constants in front of it and names the three sizes. onnxruntime's quantizer takes
    neither, so these weights, more than half a block's bytes after int8, would stay float32 without a word.
    """
    graph = model.graph
    constants = {t.name: t for t in graph.initializer}
    for node in list(graph.node):
        if node.op_type == "Concat" and all(name in constants for name in node.input):
            parts = [onnx.numpy_helper.to_array(constants[name]) for name in node.input]
            joined = np.concatenate(parts, axis=node.attribute[0].i)
            constants[node.output[0]] = onnx.numpy_helper.from_array(joined, node.output[0])
            graph.initializer.append(constants[node.output[0]])
            graph.node.remove(node)
        elif node.op_type == "Attention":
            for attribute in list(node.attribute):
                if attribute.name == "qkv_hidden_sizes" and len(set(attribute.ints)) == 1:
                    node.attribute.remove(attribute)
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    for tensor in list(graph.initializer):
        if tensor.name not in used:
            graph.initializer.remove(tensor)
    return model


def segment(family: Family, start: int, end: int) -> Exported:
    """Blocks start..end of the vision tower."""
    t, w = family.geometry.tokens, family.geometry.vision_width
    if start == 0:
        x, spec = (
            torch.zeros(1, 3, family.geometry.image_size, family.geometry.image_size),
            TensorSpec(graph_io.PIXEL_VALUES, "float32", (1, 3, family.geometry.image_size, family.geometry.image_size)),
        )
    else:
        x, spec = torch.zeros(1, t, w), TensorSpec(graph_io.HIDDEN_STATES, "float32", (1, t, w))
    module = family.segment(start, end)
    out = TensorSpec(graph_io.HIDDEN_STATES_OUT, "float32", (1, t, w))
    return _finish(_export(module, {"x": x}, dynamic=False), [spec], [out], operations(module, *x.shape))


def exit_map(family: Family, depth: int) -> Exported:
    """What runs between an exit's blocks and the head, over all T tokens; the exit has such a thing."""
    t, w = family.geometry.tokens, family.geometry.vision_width
    spec, out = (TensorSpec(name, "float32", (1, t, w)) for name in (graph_io.HIDDEN_STATES, graph_io.HIDDEN_STATES_OUT))
    module = family.exit_map(depth)
    assert module is not None
    return _finish(_export(module, {"x": torch.zeros(1, t, w)}, dynamic=False), [spec], [out], operations(module, 1, t, w))


def head(family: Family) -> Exported:
    """What follows an exit, behind its map: dropped tokens, a norm, the projector, the newline."""
    t, w = family.geometry.tokens, family.geometry.vision_width
    spec = TensorSpec(graph_io.HIDDEN_STATES, "float32", (1, t, w))
    out = TensorSpec(graph_io.IMAGE_FEATURES, "float32", (family.geometry.rows, family.text_config.hidden_size))
    module = family.head()
    return _finish(_export(module, {"x": torch.zeros(1, t, w)}, dynamic=False), [spec], [out], operations(module, 1, t, w))


def fewer_tokens(family: Family, visual_tokens: int) -> Exported:
    """What averages image features, behind a head or a standalone exit."""
    n, width = family.geometry.image_tokens, family.text_config.hidden_size
    spec = TensorSpec(graph_io.IMAGE_FEATURES, "float32", (n, width))
    out = TensorSpec(graph_io.IMAGE_FEATURES_OUT, "float32", (visual_tokens, width))
    module = family.fewer_tokens(visual_tokens)
    return _finish(_export(module, {"x": torch.zeros(n, width)}, dynamic=False), [spec], [out], 0)


def standalone(family: Family, depth: int) -> Exported:
    """A whole exit in one graph."""
    size = family.geometry.image_size
    module = family.whole(depth)
    spec = TensorSpec(graph_io.PIXEL_VALUES, "float32", (1, 3, size, size))
    out = TensorSpec(graph_io.IMAGE_FEATURES, "float32", (family.geometry.rows, family.text_config.hidden_size))
    return _finish(
        _export(module, {"x": torch.zeros(1, 3, size, size)}, dynamic=False),
        [spec],
        [out],
        operations(module, 1, 3, size, size),
    )


def embed_tokens(family: Family) -> Exported:
    """Token ids to embeddings."""
    spec = TensorSpec(graph_io.INPUT_IDS, "int64", (1, "sequence"))
    out = TensorSpec(graph_io.INPUTS_EMBEDS, "float32", (1, "sequence", family.text_config.hidden_size))
    return _finish(
        _export(family.embed_tokens(), {"input": torch.ones(1, 7, dtype=torch.long)}, dynamic=True), [spec], [out], 0
    )


def decoder(family: Family) -> Exported:
    """Prefill and decode in one graph: the cache goes in and comes out, the logits are the last position's."""
    from transformers import DynamicCache

    config, causal = family.text_config, family.decoder()
    width, layers = config.hidden_size, config.num_hidden_layers
    heads, size = config.num_key_value_heads, family.geometry.head_dim
    cache = DynamicCache()
    for i in range(layers):
        cache.update(torch.zeros(1, heads, 5, size), torch.zeros(1, heads, 5, size), i)
    inputs = {
        "inputs_embeds": torch.randn(1, 3, width),
        "attention_mask": torch.ones(1, 8, dtype=torch.long),
        "position_ids": torch.arange(5, 8)[None],
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    # One name for both lengths: past and present may be one buffer (`edgesafe.runtime.decode.shares_cache`).
    past = (1, heads, "cache", size)
    specs = [
        TensorSpec(graph_io.INPUTS_EMBEDS, "float32", (1, "sequence", width)),
        TensorSpec(graph_io.ATTENTION_MASK, "int64", (1, "past + sequence")),
        TensorSpec(graph_io.POSITION_IDS, "int64", (1, "sequence")),
    ]
    outs = [TensorSpec(graph_io.LOGITS, "float32", (1, 1, config.vocab_size))]
    for i in range(layers):
        specs += [TensorSpec(graph_io.past_key(i), "float32", past), TensorSpec(graph_io.past_value(i), "float32", past)]
        outs += [TensorSpec(graph_io.present_key(i), "float32", past), TensorSpec(graph_io.present_value(i), "float32", past)]
    proto, spec = _finish(_export(causal, inputs, dynamic=True), specs, outs, layer_operations(causal))
    share_cache(proto, rotary_tables(causal, config.max_position_embeddings))
    wanted = {value.name for value in proto.graph.input}
    return proto, replace(spec, inputs=tuple(tensor for tensor in spec.inputs if tensor.name in wanted))


@torch.no_grad()
def rotary_tables(causal: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The cosines and sines of every position as transformers computes them, float32 [length, rotary size / 2] each.

    Raises:
        UnsupportedModelError: angles that change with the length of the prompt fit no table.
    """
    rotary = causal.model.rotary_emb
    kind = str(getattr(rotary, "rope_type", "default"))
    if "dynamic" in kind or kind == "longrope":
        raise UnsupportedModelError(
            f"rotary embedding of type {kind!r}: its angles change with the prompt's length",
            where="config.json: rope_parameters",
            expected="a type whose angles are fixed (default, linear, llama3, yarn)",
        )
    tables = rotary(torch.zeros(1), torch.arange(length)[None])
    cos, sin = (np.ascontiguousarray(t[0, :, : t.shape[-1] // 2].float().numpy()) for t in tables)
    return cos, sin


def operations(module: nn.Module, *shape: int) -> int:
    """Multiply-adds times two of all products of one run, attention's among them; nothing is computed."""
    counter = FlopCounterMode(display=False)
    # The counter knows no formula of the CPU's fused attention.
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
        module(torch.zeros(shape))
    return int(counter.get_total_flops())


def layer_operations(module: nn.Module) -> int:
    """Multiply-adds times two of all linear layers for one token; attention's products grow with the text and are left out."""
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
