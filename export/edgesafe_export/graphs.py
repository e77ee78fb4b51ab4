"""Torch modules to ONNX graphs, by transformers' exporter, one call a part; names as in `edgesafe.graph_io`."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import onnx
import torch
from torch import nn

from edgesafe import graph_io
from edgesafe.bundle import GraphSpec
from edgesafe.graph_io import TensorSpec
from edgesafe_export.family import Llava, Whole

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
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    with quiet(), torch.no_grad():
        return OnnxExporter().export(module, inputs, config=OnnxConfig(dynamic=dynamic, ort_fusions="cpu")).program


def _finish(program: Any, inputs: list[TensorSpec], outputs: list[TensorSpec], flops: int | None) -> Exported:
    """Rename the graph's ends to the contract's and describe them; inputs that the fused graph dropped stay out."""
    import onnx_ir

    named = {spec.name: spec for spec in inputs}
    if len(program.graph.inputs) == len(inputs):
        for value, spec in zip(program.graph.inputs, inputs, strict=True):
            value.name = spec.name
    for value, spec in zip(program.graph.outputs, outputs, strict=True):
        value.name = spec.name
    present = tuple(named[v.name] for v in program.graph.inputs)
    proto = onnx_ir.to_proto(program)
    return proto, GraphSpec(present, tuple(outputs), flops, weight_bytes=0)


def segment(family: Llava, start: int, end: int) -> Exported:
    """Blocks start..end of the vision tower."""
    t, w = family.tokens, family.vision_width
    if start == 0:
        x, spec = (
            torch.zeros(1, 3, family.image_size, family.image_size),
            TensorSpec(graph_io.PIXEL_VALUES, "float32", (1, 3, family.image_size, family.image_size)),
        )
    else:
        x, spec = torch.zeros(1, t, w), TensorSpec(graph_io.HIDDEN_STATES, "float32", (1, t, w))
    module = family.segment(start, end)
    out = TensorSpec(graph_io.HIDDEN_STATES_OUT, "float32", (1, t, w))
    return _finish(_export(module, {"x": x}, dynamic=False), [spec], [out], _flops(module, t))


def head(family: Llava) -> Exported:
    """CLS dropped, then the projector."""
    t, w = family.tokens, family.vision_width
    spec = TensorSpec(graph_io.HIDDEN_STATES, "float32", (1, t, w))
    out = TensorSpec(graph_io.IMAGE_FEATURES, "float32", (family.image_tokens, family.text_config.hidden_size))
    module = family.head()
    return _finish(_export(module, {"x": torch.zeros(1, t, w)}, dynamic=False), [spec], [out], _flops(module, t))


def standalone(family: Llava, depth: int) -> Exported:
    """A whole exit in one graph."""
    size = family.image_size
    module = Whole(family.segment(0, depth), family.head()).eval()
    spec = TensorSpec(graph_io.PIXEL_VALUES, "float32", (1, 3, size, size))
    out = TensorSpec(graph_io.IMAGE_FEATURES, "float32", (family.image_tokens, family.text_config.hidden_size))
    return _finish(
        _export(module, {"x": torch.zeros(1, 3, size, size)}, dynamic=False), [spec], [out], _flops(module, family.tokens)
    )


def embed_tokens(family: Llava) -> Exported:
    """Token ids to embeddings."""
    spec = TensorSpec(graph_io.INPUT_IDS, "int64", (1, "sequence"))
    out = TensorSpec(graph_io.INPUTS_EMBEDS, "float32", (1, "sequence", family.text_config.hidden_size))
    return _finish(
        _export(family.embed_tokens(), {"input": torch.ones(1, 7, dtype=torch.long)}, dynamic=True), [spec], [out], 0
    )


def decoder(family: Llava) -> Exported:
    """Prefill and decode in one graph: the cache goes in and comes out, the logits are the last position's."""
    from transformers import DynamicCache

    config, causal = family.text_config, family.decoder()
    width, layers = config.hidden_size, config.num_hidden_layers
    heads = config.num_key_value_heads
    size = getattr(config, "head_dim", None) or width // config.num_attention_heads
    cache = DynamicCache()
    with torch.no_grad():
        causal(inputs_embeds=torch.randn(1, 5, width), past_key_values=cache, use_cache=True)
    inputs = {
        "inputs_embeds": torch.randn(1, 3, width),
        "attention_mask": torch.ones(1, 8, dtype=torch.long),
        "position_ids": torch.arange(5, 8)[None],
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    past = (1, heads, "past", size)
    new = (1, heads, "past + sequence", size)
    specs = [
        TensorSpec(graph_io.INPUTS_EMBEDS, "float32", (1, "sequence", width)),
        TensorSpec(graph_io.ATTENTION_MASK, "int64", (1, "past + sequence")),
        TensorSpec(graph_io.POSITION_IDS, "int64", (1, "sequence")),
    ]
    outs = [TensorSpec(graph_io.LOGITS, "float32", (1, 1, config.vocab_size))]
    for i in range(layers):
        specs += [TensorSpec(graph_io.past_key(i), "float32", past), TensorSpec(graph_io.past_value(i), "float32", past)]
        outs += [TensorSpec(graph_io.present_key(i), "float32", new), TensorSpec(graph_io.present_value(i), "float32", new)]
    return _finish(_export(causal, inputs, dynamic=True), specs, outs, _flops(causal, 1))


def _flops(module: nn.Module, tokens: int) -> int:
    """Multiply-adds times two of all linear layers over `tokens` positions, plus the patch convolution's."""
    total = 0
    for m in module.modules():
        if isinstance(m, nn.Linear):
            total += 2 * m.weight.numel() * tokens
        elif isinstance(m, nn.Conv2d):
            total += 2 * m.weight.numel() * (tokens - 1)
    return total
