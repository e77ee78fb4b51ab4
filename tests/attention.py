"""A decoder of one attention whose cache may be one buffer, made by hand, and the same arithmetic in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgesafe.format.graph_io import TensorSpec
from edgesafe.format.specs import GraphSpec, TextSpec
from edgesafe.runtime import Reader, decode

VOCAB, HEADS, SIZE, CONTEXT = 11, 2, 16, 200
WIDTH = HEADS * SIZE
TEXT = TextSpec("e", "d", 1, 1, SIZE, WIDTH, VOCAB, CONTEXT, (0,))
RNG = np.random.default_rng(3)
TABLE = RNG.standard_normal((VOCAB, WIDTH)).astype(np.float32)
QKV = (RNG.standard_normal((WIDTH, WIDTH + 2 * SIZE)) / 3).astype(np.float32)
OUT = RNG.standard_normal((WIDTH, VOCAB)).astype(np.float32)
ANGLES = np.arange(CONTEXT)[:, None] * 10000.0 ** (-np.arange(SIZE // 2) / (SIZE // 2))
IDS = RNG.integers(0, VOCAB, 90)
# float32 sums in another order; a wrong mask, angle or length changes logits by more than 1e-2.
TOLERANCE = 1e-4


def save(path, nodes, inputs, outputs, weights) -> GraphSpec:
    infos = [[helper.make_tensor_value_info(t.name, _DTYPES[t.dtype], t.shape) for t in ts] for ts in (inputs, outputs)]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "by_hand", *infos, tensors)
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), str(path))
    return GraphSpec(tuple(inputs), tuple(outputs), None, 0)


_DTYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


def make_graphs(folder: Path) -> tuple[tuple[str, GraphSpec], tuple[str, GraphSpec]]:
    """embed_tokens and the decoder: their files and what a manifest says of them."""
    ids, embeds = TensorSpec("input_ids", "int64", (1, "S")), TensorSpec("inputs_embeds", "float32", (1, "S", WIDTH))
    lookup = helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"])
    embed = save(folder / "embed.onnx", [lookup], [ids], [embeds], {"table": TABLE})
    mask = TensorSpec("attention_mask", "int64", (1, "T"))
    cache = [TensorSpec(n, "float32", (1, 1, "cache", SIZE)) for n in ("past_key_values.0.key", "past_key_values.0.value")]
    present = [TensorSpec(n, "float32", (1, 1, "cache", SIZE)) for n in ("present.0.key", "present.0.value")]
    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["sum"], keepdims=0),
        helper.make_node("Sub", ["sum", "one"], ["last"]),
        helper.make_node("Cast", ["last"], ["seqlens"], to=TensorProto.INT32),
        helper.make_node("Squeeze", ["sum"], ["all"]),
        helper.make_node("Cast", ["all"], ["total"], to=TensorProto.INT32),
        helper.make_node("MatMul", ["inputs_embeds", "qkv"], ["packed"]),
        helper.make_node(
            "GroupQueryAttention",
            ["packed", "", "", cache[0].name, cache[1].name, "seqlens", "total", "cos", "sin"],
            ["attended", present[0].name, present[1].name],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=1,
            do_rotary=1,
        ),
        helper.make_node("Gather", ["attended", "minus"], ["end"], axis=1),
        helper.make_node("MatMul", ["end", "out"], ["logits"]),
    ]
    weights = {"qkv": QKV, "out": OUT, "one": np.array([1]), "minus": np.array([-1])}
    weights |= {"cos": np.cos(ANGLES).astype(np.float32), "sin": np.sin(ANGLES).astype(np.float32)}
    logits = TensorSpec("logits", "float32", (1, 1, VOCAB))
    decoder = save(folder / "decoder.onnx", nodes, [embeds, mask, *cache], [logits, *present], weights)
    assert decode.shares_cache(decoder)
    return (str(folder / "embed.onnx"), embed), (str(folder / "decoder.onnx"), decoder)


def rotated(x: np.ndarray) -> np.ndarray:
    """[S, size]: each position's two halves turned by its angles."""
    cos, sin = np.cos(ANGLES[: len(x)]), np.sin(ANGLES[: len(x)])
    a, b = x[:, : SIZE // 2], x[:, SIZE // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)


def by_numpy(ids: np.ndarray) -> np.ndarray:
    """Logits [V] after the last of all ids, uncached."""
    packed = TABLE[ids].astype(np.float64) @ QKV
    key, value = rotated(packed[:, WIDTH : WIDTH + SIZE]), packed[:, WIDTH + SIZE :]
    heads = []
    for h in range(HEADS):
        scores = rotated(packed[:, h * SIZE : (h + 1) * SIZE])[-1] @ key.T / np.sqrt(SIZE)
        weights = np.exp(scores - scores.max())
        heads.append(weights / weights.sum() @ value)
    return np.concatenate(heads) @ OUT


def close(got: np.ndarray, ids: np.ndarray) -> bool:
    return bool(np.abs(got[0, -1] - by_numpy(ids)).max() < TOLERANCE)


def check_reads(reader: Reader) -> None:
    """A prompt, two tokens, three at once, a rewind into the prompt and on from there, each against numpy."""
    assert close(reader.read(TABLE[IDS[:5]][None]), IDS[:5])
    for n in (6, 7):
        assert close(reader.read_token(int(IDS[n - 1])), IDS[:n])
    assert close(reader.read(TABLE[IDS[7:10]][None]), IDS[:10])
    assert reader.length == 10
    reader.rewind(3)
    other = np.concatenate([IDS[:3], IDS[20:24]])
    assert close(reader.read(TABLE[other[3:]][None]), other)
    assert reader.length == 7
