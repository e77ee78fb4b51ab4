"""One piece against the same blocks in torch, on the states of a real picture and prompt.

Both graphs are compared: the float one and the quantized one.
The state that is passed to the next piece is torch's, so that an error stays with the piece that made it.

T vision tokens with CLS, W tower width, S tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from edgesafe.errors import ParityError
from edgesafe.format import graph_io
from edgesafe.runtime.ort import open_in_memory
from edgesafe_export.pieces import EMBED, END, HEAD, LAYER, MAP, SEGMENT, TOKENS, Piece, ends
from edgesafe_export.tolerances import FLOAT_RELATIVE, PIECE_CACHED, PIECE_QUANTIZED

Arrays = dict[str, np.ndarray]
_INLINE_BYTES = 1024


def want(piece: Piece, weights: Mapping[str, np.ndarray], state: np.ndarray, **order: torch.Tensor) -> np.ndarray:
    """What torch makes of a state.

    Args:
        piece: the piece.
        weights: at least those that it names.
        state: pixel values [1,3,H,W], a vision state [1,T,W], ids [1,S] or a text state [1,S,D].
        order: of a decoder layer, `position_ids` and `attention_mask` as its stack takes them; by default a plain sequence.

    Returns:
        The next state; of an exit's map what the head reads [1,T,W], of the head image features [N,D], of the decoder's end
        logits [1,1,V].
    """
    tensor = torch.from_numpy(state)
    with torch.no_grad():
        if piece.kind == LAYER:
            layer = piece.module.get_submodule("model.layers.0")
            with _loaded(layer, piece.names, weights), _one_layer(piece.module) as stack:
                return np.array(stack(inputs_embeds=tensor, use_cache=False, **order).last_hidden_state.numpy())
        if piece.kind == END:
            with _loaded(piece.module, piece.names, weights):
                norm, head = ends(piece.module).values()
                return np.array(head(norm(tensor[:, -1:])).numpy())
        with _loaded(piece.module, piece.names, weights):
            return np.array(piece.module(tensor).numpy())


@contextmanager
def _loaded(module: nn.Module, names: Mapping[str, str], weights: Mapping[str, np.ndarray]) -> Iterator[None]:
    """A module over real weights, and over its marks again afterwards."""
    own = {rel: weight for rel, weight in module.named_parameters(remove_duplicate=False) if rel in names}
    marks = {rel: weight.data for rel, weight in own.items()}
    try:
        for rel, weight in own.items():
            weight.data = torch.from_numpy(weights[names[rel]])
        yield
    finally:
        for rel, weight in own.items():
            weight.data = marks[rel]


@contextmanager
def _one_layer(causal: Any) -> Iterator[Any]:
    """The stack of transformers with its first layer alone and no norm behind it: its masks and its rotary angles."""
    stack = causal.model
    layers, norm, count = stack.layers, stack.norm, stack.config.num_hidden_layers
    stack.layers, stack.norm, stack.config.num_hidden_layers = nn.ModuleList([layers[0]]), nn.Identity(), 1
    try:
        yield stack
    finally:
        stack.layers, stack.norm, stack.config.num_hidden_layers = layers, norm, count


def open_graph(proto: onnx.ModelProto, constants: Mapping[str, np.ndarray]) -> Any:
    """A piece in onnxruntime. `constants` stand in for the graph's own of these names and are not copied."""
    large = {name: array for name, array in constants.items() if array.nbytes >= _INLINE_BYTES}
    light = onnx.ModelProto()
    light.CopyFrom(proto)
    for tensor in light.graph.initializer:
        if tensor.name in large:
            _point_outside(tensor, large[tensor.name])
        elif tensor.name in constants:
            tensor.CopyFrom(onnx.numpy_helper.from_array(constants[tensor.name], tensor.name))
    return open_in_memory(light.SerializeToString(), large)


def _point_outside(tensor: onnx.TensorProto, array: np.ndarray) -> None:
    tensor.ClearField("raw_data")
    tensor.dims[:] = array.shape
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value="given")


def got(piece: Piece, session: Any, state: np.ndarray) -> np.ndarray:
    """What a graph makes of the same state; a decoder layer reads the last tokens on top of a cache."""
    if piece.kind not in (LAYER, END):
        (value,) = session.get_inputs()
        return np.asarray(session.run(None, {value.name: state})[0])
    wanted = {value.name: value for value in session.get_inputs()}
    cache = _empty_cache(piece, wanted)
    if piece.kind == END:
        return _step(session, wanted, cache, state)[0]
    first, cache = _step(session, wanted, cache, state[:, :-PIECE_CACHED])
    last, _ = _step(session, wanted, cache, state[:, -PIECE_CACHED:], past=first.shape[1])
    return np.concatenate([first, last], axis=1)


def run_layer(piece: Piece, session: Any, state: np.ndarray) -> Arrays:
    """Every output of a decoder layer's graph that reads a state [1,S,D] from the start."""
    wanted = {value.name: value for value in session.get_inputs()}
    return _outputs(session, wanted, _empty_cache(piece, wanted), state)


def next_state(outputs: Arrays) -> np.ndarray:
    """The state among a decoder part's outputs, which may come as two halves that are added."""
    return np.asarray(sum(value for name, value in outputs.items() if not name.startswith("present.")))


def _empty_cache(piece: Piece, wanted: Iterable[str]) -> Arrays:
    shapes = {tensor.name: tensor.shape for tensor in piece.blueprint.spec.inputs}
    shape = [n if isinstance(n, int) else 0 for n in shapes[graph_io.past_key(0)]]
    return {name: np.zeros(shape, np.float32) for name in wanted if name.startswith("past_key_values.")}


def _step(
    session: Any, wanted: Mapping[str, Any], cache: Arrays, state: np.ndarray, past: int = 0
) -> tuple[np.ndarray, Arrays]:
    """One run of a decoder's part: its state and its cache."""
    out = _outputs(session, wanted, cache, state, past)
    present = {n.replace("present", "past_key_values"): v for n, v in out.items() if n.startswith("present.")}
    return next_state(out), present


def _outputs(session: Any, wanted: Mapping[str, Any], cache: Arrays, state: np.ndarray, past: int = 0) -> Arrays:
    """What a decoder's part makes of a state, which may go in as two halves."""
    halves = [n for n in wanted if n not in cache and n != graph_io.ATTENTION_MASK]
    feeds = {name: np.ascontiguousarray(state / len(halves)) for name in halves} | cache
    if graph_io.ATTENTION_MASK in wanted:
        feeds[graph_io.ATTENTION_MASK] = np.ones((1, past + state.shape[1]), np.int64)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def float_error(piece: Piece, state: np.ndarray, wanted: np.ndarray, found: np.ndarray) -> float:
    """Largest difference over the largest of what the piece adds; of a map, which adds nothing, of what it gives.

    Raises:
        ParityError: beyond `FLOAT_RELATIVE`.
    """
    error = _relative(piece, state, wanted, found, lambda x: float(np.abs(x).max()))
    if not error <= FLOAT_RELATIVE:
        raise _differs(piece, f"differs from torch by {error:.2e}", f"at most {FLOAT_RELATIVE:.0e} relative")
    return error


def quantized_error(piece: Piece, state: np.ndarray, wanted: np.ndarray, found: np.ndarray) -> float:
    """Root mean square of the difference over that of what the piece adds; of a map of what it gives.

    Raises:
        ParityError: beyond `PIECE_QUANTIZED`.
    """
    error = _relative(piece, state, wanted, found, lambda x: float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))))
    if not error <= PIECE_QUANTIZED:
        raise _differs(piece, f"quantized, differs from torch by {error:.2f}", f"at most {PIECE_QUANTIZED} of what it adds")
    return error


def _relative(piece: Piece, state: np.ndarray, wanted: np.ndarray, found: np.ndarray, size: Any) -> float:
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    adds = piece.kind != MAP and state.shape == wanted.shape and state.dtype == wanted.dtype
    added = wanted - state if adds else wanted
    return float(size(found - wanted) / max(size(added), 1e-12))


def _differs(piece: Piece, what: str, expected: str) -> ParityError:
    names = {
        SEGMENT: "vision blocks",
        MAP: "the map of exit",
        HEAD: "the head",
        TOKENS: "visual tokens",
        EMBED: "the embedding",
        LAYER: "decoder layer",
        END: "the decoder's end",
    }
    places = str(piece.at[1]) if piece.kind == MAP else f"{piece.at[0]} to {piece.at[1]}"
    where = names.get(piece.kind, "the exit") + (f" {places}" if piece.at[1] else "")
    return ParityError(
        f"{piece.name} {what}",
        where=where,
        expected=expected,
        todo="use a milder scheme (--text-scheme int8-block32, --vision-scheme fp32), or report this checkpoint's config",
    )
