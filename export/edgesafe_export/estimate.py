"""Bytes and memory of an export and of an answer, counted from shapes: nothing is loaded, nothing is traced."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from edgesafe.format import graph_io
from edgesafe.format.exits import Exit, depths_of, segments
from edgesafe.format.graph_io import TensorSpec, blocks_of
from edgesafe.format.specs import GraphSpec
from edgesafe.format.suite import MAX_NEW_TOKENS
from edgesafe.runtime.decode import PART_TOKENS
from edgesafe_export import graphs
from edgesafe_export.family import Family
from edgesafe_export.quantize import BLOCKS, EMBED_SCHEME, TABLE
from edgesafe_export.shared_cache import stored_positions
from edgesafe_export.skeleton import Sketch
from edgesafe_export.stream import scheme_of
from edgesafe_export.tolerances import CALIBRATION_TOKENS, LARGE_ROWS, ROWS_PER_PICTURE

GIB = 2**30


def exit_graphs(family: Family, ladder: tuple[Exit, ...], layout: str) -> dict[Exit, tuple[str, ...]]:
    """The vision graphs of each exit, in order.

    A map's stands between the exit's blocks and the head, what leaves visual tokens out behind the head.
    """
    chain = {end: graph_io.segment_path(start, end) for start, end in segments(ladder)}
    found = {}
    for exit in ladder:
        if layout == "standalone":
            graphs = [graph_io.standalone_path(exit.depth)]
        else:
            graphs = [path for end, path in chain.items() if end <= exit.depth]
            graphs += [graph_io.map_path(exit.depth)] if family.exit_map(exit.depth) else []
            graphs += [graph_io.HEAD_PATH]
        graphs += [] if exit.visual_tokens is None else [graph_io.tokens_path(exit.visual_tokens)]
        found[exit] = tuple(graphs)
    return found


def graph_specs(sketch: Sketch, ladder: tuple[Exit, ...], layout: str, vision: str, text: str) -> dict[str, GraphSpec]:
    """Operations and weights' bytes of every graph, by its path; nothing is traced."""
    family = sketch.family
    state = TensorSpec(graph_io.HIDDEN_STATES_OUT, "float32", (1, family.geometry.tokens, family.geometry.vision_width))
    specs = {
        path: GraphSpec(
            (), (state,) if blocks_of(path) else (), graphs.operations(module, *shape), module_bytes(module, vision)
        )
        for path, (module, shape) in _vision_modules(family, ladder, layout).items()
    }
    embed_scheme = scheme_of(graph_io.EMBED_PATH, vision, text)
    specs[graph_io.EMBED_PATH] = GraphSpec((), (), 0, module_bytes(family.embed_tokens(), embed_scheme))
    causal, width = family.decoder(), family.text_config.hidden_size
    layer = _spec(causal.model.layers[0], text, width)
    last = _spec(nn.ModuleList([causal.model.norm, causal.lm_head]), embed_scheme)
    length = family.text_config.max_position_embeddings
    angles = 4 * family.geometry.head_dim * (length if text == "fp32" else stored_positions(length))
    weights = sketch.layers * layer.weight_bytes + last.weight_bytes + angles
    flops = sketch.layers * (layer.flops or 0) + (last.flops or 0)
    specs[graph_io.DECODER_PATH] = GraphSpec((), (), flops, weights)
    return specs


def _vision_modules(family: Family, ladder: tuple[Exit, ...], layout: str) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Every vision graph's module and the shape of its input, by its path."""
    depths, size = depths_of(ladder), family.geometry.image_size
    picture, state = (1, 3, size, size), (1, family.geometry.tokens, family.geometry.vision_width)
    counts = {exit.visual_tokens for exit in ladder if exit.visual_tokens is not None}
    features = family.geometry.image_tokens, family.text_config.hidden_size
    fewer = {graph_io.tokens_path(count): (family.fewer_tokens(count), features) for count in sorted(counts)}
    if layout == "standalone":
        return {**{graph_io.standalone_path(depth): (family.whole(depth), picture) for depth in depths}, **fewer}
    blocks = {
        graph_io.segment_path(start, end): (family.segment(start, end), state if start else picture)
        for start, end in segments(ladder)
    }
    maps = {graph_io.map_path(depth): (own, state) for depth in depths if (own := family.exit_map(depth)) is not None}
    return {**blocks, **maps, graph_io.HEAD_PATH: (family.head(), state), **fewer}


def text_bytes(sketch: Sketch, specs: Mapping[str, GraphSpec], text: str) -> int:
    """Weights of both text graphs; a quantized table that is also the head counts once."""
    once = specs[graph_io.EMBED_PATH].weight_bytes if sketch.family.tied and text != "fp32" else 0
    return sum(specs[path].weight_bytes for path in TEXTS) - once


TEXTS = (graph_io.EMBED_PATH, graph_io.DECODER_PATH)


def _spec(module: nn.Module, scheme: str, width: int = 0) -> GraphSpec:
    return GraphSpec((), (), graphs.layer_operations(module), module_bytes(module, scheme, width))


def module_bytes(module: nn.Module, scheme: str, width: int = 0) -> int:
    """A module's weights in a scheme: matrices as `edgesafe_export.quantize` stores them, all else in float32.

    Args:
        module: whose weights.
        scheme: one of a linear layer's, or the embedding's.
        width: of a decoder layer, the state's.

    >>> module_bytes(nn.Linear(64, 10, bias=False), "int4-block32"), module_bytes(nn.Linear(64, 10), "int8-dynamic")
    (370, 730)
    """
    total = 0
    for path, part in module.named_modules():
        for name, weight in part.named_parameters(recurse=False):
            if weight.dim() == 2 and scheme == EMBED_SCHEME:
                total += TABLE.bytes(weight.shape[1], weight.shape[0])
            elif isinstance(part, nn.Linear) and name == "weight":
                cached = path.endswith(_CACHED)
                total += matrix_bytes(part.in_features, part.out_features, scheme, width, cached=cached)
            else:
                total += 4 * weight.numel()
    return total


# What makes keys and values, by its name in transformers.
_CACHED = ("k_proj", "v_proj")


def matrix_bytes(rows: int, columns: int, scheme: str, width: int = 0, *, cached: bool = False) -> int:
    """A matrix in a scheme, with its scales and zero points.

    Args:
        rows: its inputs, which block schemes cut into blocks.
        columns: its outputs.
        scheme: one of a linear layer's.
        width: of a decoder layer's matrix, the state's.
        cached: whether it makes keys or values.
    """
    if scheme == "fp32":
        return 4 * rows * columns
    if scheme == "int8-dynamic":
        return columns * (rows + 4 + 1)  # a scale and a zero point a column
    blocks = BLOCKS[scheme]
    if cached and blocks.cached:
        return blocks.cached.bytes(rows, columns)
    return (blocks.down if columns == width < rows else blocks.most).bytes(rows, columns)


def calibration_bytes(sketch: Sketch, text: str) -> tuple[int, int]:
    """What compensating errors takes: memory for a layer's Hessians and for factoring the largest, and disk for the states."""
    if text not in BLOCKS or not BLOCKS[text].calibrated:
        return 0, 0
    inputs = [part.in_features for part in sketch.family.decoder().model.layers[0].modules() if isinstance(part, nn.Linear)]
    memory = 4 * (sum(n * n for n in inputs) + _FACTORS * max(inputs) ** 2)
    return memory, 2 * 4 * CALIBRATION_TOKENS * sketch.family.text_config.hidden_size


_FACTORS = 4


def calibration_seconds(sketch: Sketch, text: str) -> float:
    """Time that compensating errors takes on one core: the tokens are read twice, the Hessians summed up, the weights rounded.

    Source: `compensate` took 13, 31 and 54 s on matrices of 4096 x 4096, 4096 x 11008 and 11008 x 4096, and the products before
    it ran at 90 GFLOP/s, on one core of an x86-64 server with AVX2 (2026-11-27).
    """
    if text not in BLOCKS or not BLOCKS[text].calibrated:
        return 0.0
    layer = [part for part in sketch.family.decoder().model.layers[0].modules() if isinstance(part, nn.Linear)]
    read = sum(2 * CALIBRATION_TOKENS * part.in_features * (2 * part.out_features + part.in_features) for part in layer)
    rounded = sum(part.in_features * (_A_WEIGHT * part.out_features + _A_FACTOR * part.in_features**2) for part in layer)
    return sketch.layers * (read / _A_CORE + rounded)


# Operations a second; seconds a weight, and to factor a Hessian by the cube of its size.
_A_CORE, _A_WEIGHT, _A_FACTOR = 90e9, 0.63e-6, 2.0e-11


def export_bytes(sketch: Sketch, whole: bool, running: float, text: str) -> float:
    """Most memory of an exporting process.

    Seen at most: what is imported; one tile in the tower; of the largest piece its weights in float32 `_COPIES` times (read, in
    the graph, in the quantizer's copy) and its largest matrix `_MATRIX_COPIES` times more, while it is turned and cut into
    blocks; of a model that is compared whole, transformers' model and the float graphs' own. At the end the finished bundle
    answers, which takes a large model's export the most.

    Args:
        sketch: the checkpoint without its weights.
        whole: whether it is compared whole.
        running: memory of a process that answers, by `run_bytes`.
        text: the text's scheme.
    """
    family = sketch.family
    causal = family.decoder()
    parts = [causal.model.layers[0], causal.lm_head, family.embed_tokens(), family.head(), family.segment(0, 1)]
    piece = max(4 * (_COPIES * _count(part) + _MATRIX_COPIES * _largest(part)) for part in parts)
    piece += calibration_bytes(sketch, text)[0]
    made = looking_bytes(sketch, 1) + max(piece, _WHOLE_COPIES * 4 * sketch.count if whole else 0)
    return _IMPORTED + max(made, running - _STARTED)


_IMPORTED, _COPIES, _MATRIX_COPIES, _WHOLE_COPIES = 0.55 * GIB, 2.2, 2.4, 3.0


def state_bytes(sketch: Sketch, tiles: int, tokens: int) -> int:
    """Room on the disk for the states of all requests between two pieces of a model that is compared in pieces."""
    geometry, pictures = sketch.family.geometry, math.ceil(LARGE_ROWS / ROWS_PER_PICTURE)
    seen = 2 * pictures * tiles * geometry.tokens * geometry.vision_width
    return int(4 * (seen + LARGE_ROWS * (tokens + MAX_NEW_TOKENS) * sketch.family.text_config.hidden_size))


def looking_bytes(sketch: Sketch, tiles: int) -> float:
    """A picture in the tower: the tiles' pixels, their states before and behind a graph, and what a block works with."""
    family, vision = sketch.family, sketch.family.model.config.vision_config
    states = family.geometry.tokens * family.geometry.vision_width
    scores = vision.num_attention_heads * family.geometry.tokens**2
    work = scores + family.geometry.tokens * 2 * family.geometry.vision_inner + 4 * states
    return float(4 * (tiles * (3 * family.geometry.image_size**2 + 2 * states) + work))


def run_bytes(sketch: Sketch, specs: Mapping[str, GraphSpec], text: str, tiles: int, tokens: int) -> float:
    """Memory of a process that answers: what is imported, the weights, the picture, the cache of a prompt and an answer.

    onnxruntime packs weights for its kernels when it opens a graph and then lets the read ones go: of weights in blocks the
    packed ones are larger by a scale and a sum per block, and the scales stay; of the tower's int8 weights both seem to stay.
    """
    config = sketch.family.text_config
    cache = 2 * 4 * sketch.layers * config.num_key_value_heads * sketch.family.geometry.head_dim * (tokens + 64)
    states = 4 * min(tokens, PART_TOKENS) * (4 * config.intermediate_size + 6 * config.hidden_size)
    causal = sketch.family.decoder()
    matrices = sketch.layers * _count(causal.model.layers[0]) + _count(causal.lm_head)
    packed = 10 * matrices / BLOCKS[text].most.size if text in BLOCKS else 0
    tower = sum(spec.weight_bytes for path, spec in specs.items() if path not in TEXTS)
    weights = text_bytes(sketch, specs, text) + packed + 2 * tower
    # The picture is let go before the prompt is read.
    return float(_STARTED + weights + cache + max(states, looking_bytes(sketch, tiles)))


_STARTED = 0.1 * GIB


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _largest(module: nn.Module) -> int:
    return max((weight.numel() for weight in module.parameters()), default=0)
