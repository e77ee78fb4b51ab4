"""A bundle to measure with: the one made by hand, with blocks that take as long as an encoder's, and a decoder a tenth of it.

What it computes is noise and nothing in it is certified. Each vision block is the feed-forward part of a transformer block,
over as many tokens as CLIP has at 336 px; the decoder has one such part. It needs onnx, but no torch and no exporter.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import helper

from edgesafe.format import graph_io
from edgesafe.format.bundle import CERTIFICATE, MANIFEST, file_specs, write_manifest
from edgesafe.format.exits import Exit
from edgesafe.format.specs import ExitSpec, GraphSpec
from handmade import _F, _I, FEATURES, HIDDEN, SIDE, VOCAB, _info, _save, make_bundle

BLOCKS = 12
TOKENS, WIDTH, INNER = 577, 384, 3072
TEXT_INNER = 32_768


def make_bench_bundle(root: Path, *, tokens: int = TOKENS, width: int = WIDTH, text_inner: int = TEXT_INNER) -> Path:
    """Write the bundle if it isn't there; all of it or nothing."""
    if root.exists():
        return root
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    manifest = make_bundle(partial, certified=None).manifest
    for path in (partial / "vision").iterdir():
        path.unlink()
    rng = np.random.default_rng(0)
    graphs = {graph_io.segment_path(i, i + 1): _segment(partial, rng, i, [1, tokens, width]) for i in range(BLOCKS)}
    graphs |= {graph_io.HEAD_PATH: _head(partial, rng, [1, tokens, width])}
    graphs |= {graph_io.DECODER_PATH: _decoder(partial, rng, text_inner)}
    graphs |= {graph_io.EMBED_PATH: manifest.graphs[graph_io.EMBED_PATH]}
    segments = tuple(graph_io.segment_path(i, i + 1) for i in range(BLOCKS))
    exits = tuple(ExitSpec(Exit(d), (*segments[:d], graph_io.HEAD_PATH)) for d in range(1, BLOCKS + 1))
    (partial / MANIFEST).unlink()
    (partial / CERTIFICATE).unlink(missing_ok=True)
    changed = {"n_blocks": BLOCKS, "reference": Exit(BLOCKS), "exits": exits, "graphs": graphs}
    text = replace(manifest.text, context_length=512)
    write_manifest(partial, replace(manifest, name="bench", text=text, files=file_specs(partial), **changed))
    os.replace(partial, root)
    return root


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


def _segment(root: Path, rng, i: int, state: list[int]) -> GraphSpec:
    path = root / graph_io.segment_path(i, i + 1)
    nodes, weights = _feed_forward(rng, "x" if i == 0 else graph_io.HIDDEN_STATES, graph_io.HIDDEN_STATES_OUT, state[2], INNER)
    out = [_info(graph_io.HIDDEN_STATES_OUT, _F, state)]
    if i:
        return _save(path, nodes, [_info(graph_io.HIDDEN_STATES, _F, state)], out, weights, None)
    first = [
        helper.make_node("ReduceMean", [graph_io.PIXEL_VALUES], ["mean"], keepdims=0),
        helper.make_node("Add", ["places", "mean"], ["x"]),
    ]
    places = {"places": rng.standard_normal(state, np.float32)}
    return _save(path, [*first, *nodes], [_info(graph_io.PIXEL_VALUES, _F, [1, 3, SIDE, SIDE])], out, weights | places, None)


def _head(root: Path, rng, state: list[int]) -> GraphSpec:
    nodes = [
        helper.make_node("Gather", [graph_io.HIDDEN_STATES, "kept"], ["few"], axis=1),
        helper.make_node("MatMul", ["few", "projector"], ["projected"]),
        helper.make_node("Reshape", ["projected", "flat"], [graph_io.IMAGE_FEATURES]),
    ]
    projector = rng.standard_normal((state[2], HIDDEN), np.float32)
    weights = {"kept": np.arange(1, 1 + FEATURES), "projector": projector, "flat": np.array([FEATURES, HIDDEN], np.int64)}
    out = [_info(graph_io.IMAGE_FEATURES, _F, [FEATURES, HIDDEN])]
    return _save(root / graph_io.HEAD_PATH, nodes, [_info(graph_io.HIDDEN_STATES, _F, state)], out, weights, None)


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
    return _save(root / graph_io.DECODER_PATH, nodes, inputs, outputs, weights, None)
