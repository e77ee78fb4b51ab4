"""Bundles to measure with: the one made by hand, with an encoder and a decoder that take as long as real ones.

What they compute is noise and nothing in them is certified. Each vision block is the feed-forward part of a transformer block;
the decoder has one such part. It needs onnx, but no torch and no exporter. There are two shapes:

    DEPTHS    as many tokens as CLIP has at 336 px, and a decoder that takes a tenth of the encoder's time: depth alone counts.
    RUNGS     a picture of 60 x 60 tokens, as Qwen2-VL makes of 1,680 px, and a decoder that reads them all: a third of the
              time is the encoder's and the rest the prefill's. SmolVLM-256M's encoder takes seven eighths, and LLaVA-1.5-7B's
              hardly anything. Its exits have all tokens, a quarter, a ninth or a 36th of them, and none costs more than one
              that is right clearly more often.

`accuracy` stands in for how often an exit of RUNGS is right, of which noise says nothing.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from onnx import helper

from edgesafe.format import graph_io
from edgesafe.format.bundle import CERTIFICATE, MANIFEST, file_specs, write_manifest
from edgesafe.format.exits import Exit, parse_exits, pool_windows
from edgesafe.format.specs import ExitSpec, GraphSpec
from handmade import _F, _I, FEATURES, HIDDEN, SIDE, VOCAB, _info, _save, make_bundle

BLOCKS = 12


@dataclass(frozen=True)
class Shape:
    """The encoder's tokens and widths, the decoder's inner width, the tokens of a picture that it reads, and the exits."""

    tokens: int
    width: int
    inner: int
    text_inner: int
    features: int = FEATURES
    exits: str = f"1-{BLOCKS}"
    context: int = 512


DEPTHS = Shape(577, 384, 3072, 32_768)
RUNGS = Shape(3600, 128, 512, 6144, 3600, "4-12,1-4@100,3-5@400,4-5@900", 5120)
STAND_IN = (
    "stand-in, the reference model's: by depth (its certificate), times what 9, 4 or 1 of its 36 visual tokens leave of it "
    "after 400 updates (edgesafe/align/LOG.md)"
)
# How often the reference model is right on the suite of its certificate, by depth with all of its 36 visual tokens ...
OF_DEPTHS = (0.27, 0.51, 0.77, 0.89, 0.9175, 0.9175, 0.9175, 0.92, 0.9175, 0.9175, 0.9175, 0.915)
# ... and what averages of them leave of that at the reference exit, on validation rows.
OF_TOKENS = {1 / 4: 0.877 / 0.899, 1 / 9: 0.841 / 0.899, 1 / 36: 0.667 / 0.899}


def accuracy(exit: Exit, image_tokens: int = RUNGS.features) -> float:
    """How often an exit is right: a stand-in, the reference model's share at that depth times what fewer tokens leave of it.

    >>> accuracy(Exit(12)), round(accuracy(Exit(12, 900)), 3), round(accuracy(Exit(4, 100)), 3)
    (0.915, 0.893, 0.66)
    """
    left = 1.0 if exit.visual_tokens is None else OF_TOKENS[exit.visual_tokens / image_tokens]
    return OF_DEPTHS[exit.depth - 1] * left


def make_bench_bundle(root: Path, shape: Shape = DEPTHS) -> Path:
    """Write the bundle if it isn't there; all of it or nothing."""
    if root.exists():
        return root
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    manifest = make_bundle(partial, certified=None).manifest
    for path in (partial / "vision").iterdir():
        path.unlink()
    rng, exits = np.random.default_rng(0), parse_exits(shape.exits, BLOCKS)
    graphs = {graph_io.segment_path(i, i + 1): _segment(partial, rng, i, shape) for i in range(BLOCKS)}
    graphs |= {graph_io.HEAD_PATH: _head(partial, rng, shape)}
    graphs |= {graph_io.tokens_path(n): _fewer(partial, shape.features, n) for n in {exit.visual_tokens for exit in exits} if n}
    graphs |= {graph_io.DECODER_PATH: _decoder(partial, rng, shape.text_inner)}
    graphs |= {graph_io.EMBED_PATH: replace(manifest.graphs[graph_io.EMBED_PATH], flops=0)}
    (partial / MANIFEST).unlink()
    (partial / CERTIFICATE).unlink(missing_ok=True)
    changed = {"n_blocks": BLOCKS, "reference": Exit(BLOCKS), "exits": tuple(map(_way, exits)), "graphs": graphs}
    changed |= {"image_tokens": shape.features, "text": replace(manifest.text, context_length=shape.context)}
    write_manifest(partial, replace(manifest, name="bench", files=file_specs(partial), **changed))
    os.replace(partial, root)
    return root


def _way(exit: Exit) -> ExitSpec:
    """An exit's graphs: its blocks, the head, and what leaves tokens out."""
    blocks = (graph_io.segment_path(i, i + 1) for i in range(exit.depth))
    fewer = (graph_io.tokens_path(exit.visual_tokens),) if exit.visual_tokens else ()
    return ExitSpec(exit, (*blocks, graph_io.HEAD_PATH, *fewer))


def _feed_forward(rng, x: str, out: str, width: int, inner: int) -> tuple[list, dict[str, np.ndarray]]:
    """The nodes and weights of out = x + relu(x W1) W2, with W2 so small that the state neither grows nor vanishes."""
    nodes = [
        helper.make_node("MatMul", [x, "w1"], ["inner"]),
        helper.make_node("Relu", ["inner"], ["rectified"]),
        helper.make_node("MatMul", ["rectified", "w2"], ["change"]),
        helper.make_node("Add", [x, "change"], [out]),
    ]
    w1 = rng.standard_normal((width, inner), np.float32) / np.float32(width**0.5)
    w2 = rng.standard_normal((inner, width), np.float32) / np.float32(10 * inner**0.5)
    return nodes, {"w1": w1, "w2": w2}


def _segment(root: Path, rng, i: int, shape: Shape) -> GraphSpec:
    path, state, before = root / graph_io.segment_path(i, i + 1), [1, shape.tokens, shape.width], graph_io.HIDDEN_STATES
    flops = 4 * shape.tokens * shape.width * shape.inner
    nodes, weights = _feed_forward(rng, before if i else "x", graph_io.HIDDEN_STATES_OUT, shape.width, shape.inner)
    out = [_info(graph_io.HIDDEN_STATES_OUT, _F, state)]
    if i:
        return _save(path, nodes, [_info(before, _F, state)], out, weights, flops)
    first = [
        helper.make_node("ReduceMean", [graph_io.PIXEL_VALUES], ["mean"], keepdims=0),
        helper.make_node("Add", ["places", "mean"], ["x"]),
    ]
    places = {"places": rng.standard_normal(state, np.float32)}
    return _save(path, [*first, *nodes], [_info(graph_io.PIXEL_VALUES, _F, [1, 3, SIDE, SIDE])], out, weights | places, flops)


def _head(root: Path, rng, shape: Shape) -> GraphSpec:
    """The last tokens of the state, as many as the decoder reads of a picture, in its width."""
    nodes = [
        helper.make_node("Gather", [graph_io.HIDDEN_STATES, "kept"], ["few"], axis=1),
        helper.make_node("MatMul", ["few", "projector"], ["projected"]),
        helper.make_node("Reshape", ["projected", "flat"], [graph_io.IMAGE_FEATURES]),
    ]
    kept, projector = np.arange(shape.tokens)[-shape.features :], rng.standard_normal((shape.width, HIDDEN), np.float32)
    weights = {"kept": kept, "projector": projector, "flat": np.array([shape.features, HIDDEN], np.int64)}
    state, out = [1, shape.tokens, shape.width], [_info(graph_io.IMAGE_FEATURES, _F, [shape.features, HIDDEN])]
    flops = 2 * shape.features * shape.width * HIDDEN
    return _save(root / graph_io.HEAD_PATH, nodes, [_info(graph_io.HIDDEN_STATES, _F, state)], out, weights, flops)


def _fewer(root: Path, features: int, count: int) -> GraphSpec:
    """What averages tokens behind the head, over rows and then over columns, as the exporter's graph does."""
    side, fewer = math.isqrt(features), math.isqrt(count)
    means = np.zeros((fewer, side), np.float32)
    for i, (first, end) in enumerate(pool_windows(features, count)):
        means[i, first:end] = 1 / (end - first)
    nodes = [
        helper.make_node("Reshape", [graph_io.IMAGE_FEATURES, "by rows"], ["rows"]),
        helper.make_node("MatMul", ["means", "rows"], ["fewer rows"]),
        helper.make_node("Reshape", ["fewer rows", "by columns"], ["columns"]),
        helper.make_node("MatMul", ["means", "columns"], ["fewer columns"]),
        helper.make_node("Reshape", ["fewer columns", "flat"], [graph_io.IMAGE_FEATURES_OUT]),
    ]
    shapes = {"by rows": (side, side * HIDDEN), "by columns": (fewer, side, HIDDEN), "flat": (count, HIDDEN)}
    weights = {"means": means} | {name: np.array(shape, np.int64) for name, shape in shapes.items()}
    before, after = (
        _info(graph_io.IMAGE_FEATURES, _F, [features, HIDDEN]),
        _info(graph_io.IMAGE_FEATURES_OUT, _F, [count, HIDDEN]),
    )
    flops = 2 * fewer * side * (side + fewer) * HIDDEN
    return _save(root / graph_io.tokens_path(count), nodes, [before], [after], weights, flops)


def _decoder(root: Path, rng, inner: int) -> GraphSpec:
    nodes, weights = _feed_forward(rng, graph_io.INPUTS_EMBEDS, "state", HIDDEN, inner)
    nodes += [
        helper.make_node("MatMul", ["state", "vocabulary"], [graph_io.LOGITS]),
        helper.make_node("Unsqueeze", [graph_io.INPUTS_EMBEDS, "axis"], ["new"]),
        helper.make_node("Concat", [graph_io.past_key(0), "new"], [graph_io.present_key(0)], axis=2),
        helper.make_node("Concat", [graph_io.past_value(0), "new"], [graph_io.present_value(0)], axis=2),
    ]
    weights |= {"vocabulary": rng.standard_normal((HIDDEN, VOCAB), np.float32), "axis": np.array([1], np.int64)}
    past, grown = [1, 1, "P", HIDDEN], [1, 1, "P+S", HIDDEN]
    inputs = [_info(graph_io.INPUTS_EMBEDS, _F, [1, "S", HIDDEN]), _info(graph_io.POSITION_IDS, _I, [1, "S"])]
    inputs += [_info(graph_io.past_key(0), _F, past), _info(graph_io.past_value(0), _F, past)]
    outputs = [_info(graph_io.LOGITS, _F, [1, "S", VOCAB])]
    outputs += [_info(graph_io.present_key(0), _F, grown), _info(graph_io.present_value(0), _F, grown)]
    return _save(root / graph_io.DECODER_PATH, nodes, inputs, outputs, weights, 4 * HIDDEN * inner + 2 * HIDDEN * VOCAB)
