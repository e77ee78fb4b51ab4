"""One decoder layer, traced once, for as many layers as there are.

A decoder of two layers is traced. Each node belongs to the highest layer whose weights or cache it depends on, so the graph
falls into what comes before any layer (lengths), the first layer, the second, and the end (norm and head). The third and later
layers are the second one again with other names. Each part is a graph of its own, which can be run, compared and quantized;
joined they are the decoder.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import onnx
from onnx import TensorProto, helper

from edgesafe.errors import ExportError
from edgesafe.format import graph_io
from edgesafe_export.placeholders import Blueprint
from edgesafe_export.shared_cache import prune

_SHARED = -1
_CACHES = (graph_io.past_key, graph_io.past_value, graph_io.present_key, graph_io.present_value)
_CACHE = re.compile(r"^(past_key_values|present)\.(\d+)\.(key|value)$")


def split_layers(decoder: Blueprint, prefix: str, traced: int, layers: int, width: int) -> list[Blueprint]:
    """The decoder's parts: one per layer, then the end.

    Args:
        decoder: the traced decoder of `traced` layers.
        prefix: path of the decoder in transformers' model; its layers' weights are `{prefix}.layers.{i}.`.
        traced: layers of the trace, one or two.
        layers: layers that are wanted.
        width: the decoder's width, for the shapes between the parts.

    Raises:
        ExportError: the layers do not follow each other as those of a plain stack.
    """
    level = _levels(decoder, prefix, traced)
    edges = [_crossing(decoder.proto, level, at) for at in range(traced + 1)]
    if edges[0] != [graph_io.INPUTS_EMBEDS] or any(len(e) != len(edges[1]) for e in edges[1:]):
        raise _unlike("the layers pass on states of different shapes or types")
    parts = [_part(decoder, level, at, edges, width) for at in range(traced)]
    end = _part(decoder, level, traced, edges, width)
    again = [_again(parts[-1], edges, traced - 1, i, prefix) for i in range(traced, layers)]
    if layers > traced:
        end = _renamed(end, {old: _name(old, layers - 1) for old in edges[traced]})
    row = [*parts, *again, end]
    _check_row(row)
    return row


def _check_row(row: Sequence[Blueprint]) -> None:
    """Each layer reads what the one before it hands on, and keeps a cache of its own number."""
    handed = [graph_io.INPUTS_EMBEDS]
    for i, part in enumerate(row):
        ends = {value.name for value in (*part.proto.graph.input, *part.proto.graph.output)}
        read = [v.name for v in part.proto.graph.input if v.name != graph_io.ATTENTION_MASK and not _CACHE.match(v.name)]
        wanted = {kind(i) for kind in _CACHES} if i + 1 < len(row) else set()
        if read != handed or {name for name in ends if _CACHE.match(name)} != wanted:
            raise _unlike(f"layer {i} does not follow the one before it")
        handed = [v.name for v in part.proto.graph.output if not _CACHE.match(v.name)]


def _levels(decoder: Blueprint, prefix: str, traced: int) -> dict[str, int]:
    """The layer of every value: of a weight its own, of a node's outputs the highest of its inputs."""
    level: dict[str, int] = {}
    pattern = re.compile(rf"^{re.escape(prefix)}\.layers\.(\d+)\.")
    for name, source in decoder.sources.items():
        found = {int(m[1]) if (m := pattern.match(rows.name)) else traced for rows in source.rows}
        if len(found) != 1:
            raise _unlike(f"the constant {name} joins weights of two layers")
        level[name] = found.pop()
    for value in decoder.proto.graph.input:
        cached = _CACHE.match(value.name)
        level[value.name] = int(cached[2]) if cached else _SHARED
    for node in decoder.proto.graph.node:
        at = max((level.get(name, _SHARED) for name in node.input if name), default=_SHARED)
        level |= dict.fromkeys(node.output, at)
    return level


def _crossing(proto: onnx.ModelProto, level: dict[str, int], at: int) -> list[str]:
    """What a layer reads of earlier ones, in the order of its nodes; of what comes before any layer the embeddings alone."""
    made = {name for node in proto.graph.node for name in node.output} | {graph_io.INPUTS_EMBEDS}
    read = [name for node in proto.graph.node if level[node.output[0]] == at for name in node.input if name in made]
    before = [name for name in read if level[name] < at and (level[name] > _SHARED or name == graph_io.INPUTS_EMBEDS)]
    if any(level[name] != at - 1 for name in before):
        raise _unlike(f"layer {at} reads past the layer before it")
    return list(dict.fromkeys(before))


def _part(decoder: Blueprint, level: dict[str, int], at: int, edges: Sequence[list[str]], width: int) -> Blueprint:
    proto = onnx.ModelProto()
    proto.CopyFrom(decoder.proto)
    graph = proto.graph
    nodes = [node for node in graph.node if level[node.output[0]] in (_SHARED, at)]
    for node in nodes:
        node.name = node.output[0]
    outputs = [value for value in graph.output if level[value.name] == at]
    del graph.node[:]
    graph.node.extend(nodes)
    state = (1, "sequence", width)
    after = edges[at + 1] if at + 1 < len(edges) else []
    kept = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in outputs]
    del graph.output[:]
    graph.output.extend([*(helper.make_tensor_value_info(name, TensorProto.FLOAT, state) for name in after), *kept])
    present = {value.name for value in graph.input}
    graph.input.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, state) for n in edges[at] if n not in present)
    prune(graph)
    edge = {value.name for value in (*graph.input, *graph.output)}
    for value in [value for value in graph.value_info if value.name in edge]:
        graph.value_info.remove(value)
    sources = {tensor.name: decoder.sources[tensor.name] for tensor in graph.initializer if tensor.name in decoder.sources}
    return Blueprint(proto, decoder.spec, sources)


def _again(part: Blueprint, edges: Sequence[list[str]], traced_at: int, layer: int, prefix: str) -> Blueprint:
    """A later layer: the traced one with every name of its own changed."""
    from edgesafe_export.skeleton import layer_name

    own = ({name for node in part.proto.graph.node for name in node.output} | part.sources.keys()) - _shared_names(part)
    names = {name: _name(name, layer) for name in own if name}
    for kind in _CACHES:
        names[kind(traced_at)] = kind(layer)
    for read, handed in zip(edges[traced_at], edges[traced_at + 1], strict=True):
        names[read] = handed if layer - 1 == traced_at else _name(handed, layer - 1)
    return _renamed(part, names).renamed(lambda name: layer_name(prefix, name, layer))


def _shared_names(part: Blueprint) -> set[str]:
    """What depends on no layer: made of the mask and of plain constants alone."""
    own = {value.name for value in part.proto.graph.input if value.name != graph_io.ATTENTION_MASK} | part.sources.keys()
    shared: set[str] = set()
    for node in part.proto.graph.node:
        if own & set(node.input):
            own |= set(node.output)
        else:
            shared |= set(node.output)
    return shared


def _name(name: str, layer: int) -> str:
    return f"layer.{layer}.{name}"


def _renamed(part: Blueprint, names: dict[str, str]) -> Blueprint:
    proto = onnx.ModelProto()
    proto.CopyFrom(part.proto)
    graph = proto.graph
    for values in (graph.input, graph.output, graph.initializer, graph.value_info):
        for value in values:
            value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        node.name = node.output[0]
    return replace(part, proto=proto, sources={names.get(key, key): source for key, source in part.sources.items()})


def join(parts: Iterable[onnx.ModelProto], inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """One graph of parts whose values fit by name; what several of them hold alike is taken once.

    Args:
        parts: in order; each may come with its weights, which are not copied twice.
        inputs: names of the joined graph's inputs, in order.
        outputs: names of its outputs, in order.
    """
    whole: onnx.ModelProto | None = None
    ends: dict[str, onnx.ValueInfoProto] = {}
    made: dict[str, bytes] = {}
    for part in parts:
        graph = part.graph
        ends |= {value.name: value for value in (*graph.input, *graph.output)}
        if whole is None:
            whole = onnx.ModelProto(ir_version=part.ir_version, producer_name=part.producer_name)
            whole.graph.name = "decoder"
        domains = {opset.domain for opset in whole.opset_import}
        whole.opset_import.extend(opset for opset in part.opset_import if opset.domain not in domains)
        whole.graph.node.extend(node for node in graph.node if _new(node.output[0], node, made))
        whole.graph.initializer.extend(tensor for tensor in graph.initializer if _new(tensor.name, tensor, made))
        shapes = {value.name for value in whole.graph.value_info}
        whole.graph.value_info.extend(value for value in graph.value_info if value.name not in shapes)
    if whole is None:
        raise _unlike("there are no parts")
    whole.graph.input.extend(ends[name] for name in inputs)
    whole.graph.output.extend(ends[name] for name in outputs)
    return whole


def _new(name: str, item: onnx.NodeProto | onnx.TensorProto, made: dict[str, bytes]) -> bool:
    """Whether a joined graph lacks a node or constant; another one of the same name is refused."""
    digest = hashlib.sha256(item.SerializeToString(deterministic=True)).digest()
    if name in made and made[name] != digest:
        raise _unlike(f"two parts have different things called {name}")
    new = name not in made
    made[name] = digest
    return new


def _unlike(what: str) -> ExportError:
    return ExportError(
        what,
        where=graph_io.DECODER_PATH,
        expected="decoder layers that follow each other and are alike but for their weights",
        todo="report this checkpoint's config: its decoder is built in a way that this exporter does not know",
    )
