"""Sizes in a manifest: within bounds, and those of the graphs, before anything is allocated by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgesafe.errors import BundleError
from edgesafe.format import graph_io
from edgesafe.format.graph_io import TensorSpec

if TYPE_CHECKING:
    from edgesafe.format.manifest import Manifest

# Far above any model here, and low enough that what they are multiplied to fits a device's memory.
MAX_SIDE = 4096
MAX_CONTEXT = 2**20


def check_sizes(manifest: Manifest, where: str) -> None:
    """Refuse sizes that are not those of the graphs.

    Raises:
        BundleError: A graph lacks an input or output, or a size differs from the one in its shapes.
    """
    text, image = manifest.text, manifest.image
    for spec in manifest.exits:
        graphs = [manifest.graphs[path] for path in spec.graphs]
        for path, graph in zip(spec.graphs, graphs, strict=True):
            if len(graph.inputs) != 1 or len(graph.outputs) != 1:
                raise BundleError(f"the graph {path!r} needs one input and one output", where=where)
        _same(graphs[0].inputs[0], (1, 3, image.height, image.width), where)
        rows = manifest.image_tokens + (manifest.tiles is not None and manifest.tiles.newline)
        _same(graphs[-1].outputs[0], (rows, text.hidden_size), where)
    embed, decoder = manifest.graphs[text.embed_tokens], manifest.graphs[text.decoder]
    # Counted before a list of that length is made.
    if 2 * text.num_layers + 1 > len(decoder.inputs) or manifest.image_tokens >= text.context_length:
        raise BundleError("num_layers or image_tokens is larger than the graphs allow", where=where)
    if {tensor.name for tensor in embed.inputs} != {graph_io.INPUT_IDS}:
        raise BundleError(f"the graph {text.embed_tokens!r} needs input_ids alone", where=where)
    _has(embed.outputs, graph_io.INPUTS_EMBEDS, (1, "S", text.hidden_size), where)
    _has(decoder.inputs, graph_io.INPUTS_EMBEDS, (1, "S", text.hidden_size), where)
    _has(decoder.outputs, graph_io.LOGITS, (1, "S", text.vocab_size), where)
    cache = (1, text.num_kv_heads, "P", text.head_dim)
    for i in range(text.num_layers):
        for name in (graph_io.past_key(i), graph_io.past_value(i)):
            _has(decoder.inputs, name, cache, where)
        for name in (graph_io.present_key(i), graph_io.present_value(i)):
            _has(decoder.outputs, name, cache, where)


def _has(tensors: tuple[TensorSpec, ...], name: str, shape: tuple[int | str, ...], where: str) -> None:
    found = [tensor for tensor in tensors if tensor.name == name]
    if len(found) != 1:
        raise BundleError(f"the text graphs have {len(found)} tensors {name!r}", where=where, expected="one")
    _same(found[0], shape, where)


def _same(tensor: TensorSpec, shape: tuple[int | str, ...], where: str) -> None:
    """Refuse a shape that isn't this one; a text on either side stands for any size."""
    pairs = zip(tensor.shape, shape, strict=False)
    if len(tensor.shape) != len(shape) or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
        raise BundleError(f"{tensor.name} is {list(tensor.shape)} in its graph", where=where, expected=f"{list(shape)}")
