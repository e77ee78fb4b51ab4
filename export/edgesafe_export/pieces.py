"""An export as a row of pieces, each small enough to be loaded, compared and quantized on its own.

A piece is a whole graph of the bundle (a run of vision blocks, an exit's map, the head, the embedding) or a part of the decoder
(a layer, the end). Equal shapes are traced once: a later run of as many blocks is the first one's graph filled with its own
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import onnx
import torch
from torch import nn

from edgesafe.format import graph_io
from edgesafe.format.exits import Exit, depths_of, segments
from edgesafe.format.specs import GraphSpec
from edgesafe_export import graphs
from edgesafe_export.decoder_layers import join, split_layers
from edgesafe_export.graphs import Exported
from edgesafe_export.placeholders import Blueprint, read_marks
from edgesafe_export.skeleton import Sketch, layer_name

SEGMENT, MAP, HEAD, WHOLE, TOKENS = "segment", "map", "head", "whole", "tokens"
EMBED, LAYER, END = "embed", "layer", "end"


@dataclass(frozen=True)
class Piece:
    """One piece.

    Attributes:
        name: its file in the work folder.
        graph: the bundle's graph that it is, or is a part of.
        kind: what it computes, one of the words above.
        at: blocks before and after it (of a map: both its exit's; of the head: both those of the deepest exit), or
            (layer, layer + 1); of what leaves tokens out the tokens before and after it.
        blueprint: its graph, without weights.
        module: the same in torch, over marked weights; of a decoder layer the first layer.
        names: the weight behind each of the module's parameters.
    """

    name: str
    graph: str
    kind: str
    at: tuple[int, int]
    blueprint: Blueprint
    module: nn.Module
    names: Mapping[str, str]

    @property
    def weights(self) -> list[str]:
        """Every weight that it needs."""
        return sorted({*self.blueprint.names, *self.names.values()})


def vision_pieces(sketch: Sketch, ladder: tuple[Exit, ...], layout: str) -> Iterator[Piece]:
    """The chain's segments, maps and head, or one whole graph per depth; and what leaves visual tokens out."""
    family = sketch.family
    if layout != "chain":
        for depth in depths_of(ladder):
            path = graph_io.standalone_path(depth)
            yield _piece(sketch, path, WHOLE, (0, depth), family.whole(depth), graphs.standalone(family, depth))
        yield from _fewer(sketch, ladder)
        return
    traced: dict[tuple[bool, int], Piece] = {}
    for start, end in segments(ladder):
        shape, module = (start == 0, end - start), family.segment(start, end)
        path = graph_io.segment_path(start, end)
        if shape not in traced:
            traced[shape] = _piece(sketch, path, SEGMENT, (start, end), module, graphs.segment(family, start, end))
        yield _alike(traced[shape], sketch, path, (start, end), module)
    yield from _maps(sketch, ladder)
    yield _piece(sketch, graph_io.HEAD_PATH, HEAD, (ladder[-1].depth, ladder[-1].depth), family.head(), graphs.head(family))
    yield from _fewer(sketch, ladder)


def _fewer(sketch: Sketch, ladder: tuple[Exit, ...]) -> Iterator[Piece]:
    """One graph for each number of visual tokens below all of them."""
    family = sketch.family
    for count in sorted({exit.visual_tokens for exit in ladder if exit.visual_tokens is not None}):
        path, at = graph_io.tokens_path(count), (family.geometry.image_tokens, count)
        yield _piece(sketch, path, TOKENS, at, family.fewer_tokens(count), graphs.fewer_tokens(family, count))


def _maps(sketch: Sketch, ladder: tuple[Exit, ...]) -> Iterator[Piece]:
    """What the chain's exits run between their blocks and the head; a norm alone, and a map of another rank, is traced anew."""
    traced: dict[tuple[tuple[str, torch.Size], ...], Piece] = {}
    for depth in depths_of(ladder):
        module, path = sketch.family.exit_map(depth), graph_io.map_path(depth)
        if module is None:
            continue
        shape = tuple((name, weight.shape) for name, weight in module.named_parameters())
        if shape not in traced:
            traced[shape] = _piece(sketch, path, MAP, (depth, depth), module, graphs.exit_map(sketch.family, depth))
        yield _alike(traced[shape], sketch, path, (depth, depth), module)


def text_pieces(sketch: Sketch) -> Iterator[Piece]:
    """The embedding, the decoder's layers and its end."""
    family, prefix = sketch.family, sketch.family.recipe.decoder
    embed = family.embed_tokens()
    yield _piece(sketch, graph_io.EMBED_PATH, EMBED, (0, 0), embed, graphs.embed_tokens(family))
    causal, traced = family.decoder(), family.text_config.num_hidden_layers
    blueprint = read_marks(*graphs.decoder(family), sketch.starts)
    parts = split_layers(blueprint, prefix, traced, sketch.layers, family.text_config.hidden_size)
    first = causal.model.layers[0]
    for i, part in enumerate(parts[:-1]):
        names = {rel: layer_name(prefix, name, i) for rel, name in names_of(first, sketch).items()}
        yield Piece(f"text/layer_{i:03d}.onnx", graph_io.DECODER_PATH, LAYER, (i, i + 1), part, causal, names)
    names = {f"{a}.{rel}": name for a, m in ends(causal).items() for rel, name in names_of(m, sketch).items()}
    at = (sketch.layers, sketch.layers)
    yield Piece("text/end.onnx", graph_io.DECODER_PATH, END, at, parts[-1], causal, names)


def ends(causal: nn.Module) -> dict[str, nn.Module]:
    """What follows a causal model's layers, by its path."""
    return {"model.norm": causal.get_submodule("model.norm"), "lm_head": causal.get_submodule("lm_head")}


def names_of(module: nn.Module, sketch: Sketch) -> dict[str, str]:
    """The weight behind each parameter of a module, which its marks tell."""
    return {rel: sketch.starts[int(weight[(0,) * weight.dim()])] for rel, weight in module.named_parameters()}


def _piece(sketch: Sketch, path: str, kind: str, at: tuple[int, int], module: nn.Module, exported: Exported) -> Piece:
    return Piece(path, path, kind, at, read_marks(*exported, sketch.starts), module, names_of(module, sketch))


def _alike(piece: Piece, sketch: Sketch, path: str, at: tuple[int, int], module: nn.Module) -> Piece:
    """A piece of another place in the tower, of the same shape."""
    names = names_of(module, sketch)
    other = {old: names[rel] for rel, old in piece.names.items()}
    return replace(
        piece, name=path, graph=path, at=at, module=module, names=names, blueprint=piece.blueprint.renamed(other.__getitem__)
    )


def decoder_spec(sketch: Sketch, traced: GraphSpec) -> GraphSpec:
    """The whole decoder's inputs, outputs and operations, from those of the traced layers."""
    family, count = sketch.family, sketch.family.text_config.num_hidden_layers
    more = range(count, sketch.layers)
    shape = next(t.shape for t in traced.inputs if t.name == graph_io.past_key(0))
    kinds: tuple[tuple[Callable[[int], str], ...], ...] = (
        (graph_io.past_key, graph_io.past_value),
        (graph_io.present_key, graph_io.present_value),
    )
    pasts, presents = (tuple(graph_io.TensorSpec(name(i), "float32", shape) for i in more for name in kind) for kind in kinds)
    layer = graphs.layer_operations(family.decoder().model.layers[0])
    operations = None if traced.flops is None else traced.flops + len(more) * layer
    return replace(traced, inputs=traced.inputs + pasts, outputs=traced.outputs + presents, flops=operations)


def join_decoder(parts: Iterable[onnx.ModelProto], spec: GraphSpec) -> onnx.ModelProto:
    """The decoder of its parts, its ends in the order of its spec."""
    return join(parts, [t.name for t in spec.inputs], [t.name for t in spec.outputs])
