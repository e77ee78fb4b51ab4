"""The cache as one buffer: a decoder of one attention, made by hand, against the same arithmetic in numpy."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgesafe.format import graph_io
from edgesafe.format.graph_io import TensorSpec
from edgesafe.format.specs import GraphSpec, TextSpec
from edgesafe.runtime import decode
from edgesafe.runtime import ort as ort_module
from edgesafe.runtime.engine import Reader
from edgesafe.runtime.ort import OrtGraph, SharedReader, session_options
from mutants import wrong

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


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> tuple[OrtGraph, OrtGraph]:
    """embed_tokens and the decoder, opened."""
    folder = tmp_path_factory.mktemp("by_hand")
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
    return OrtGraph(str(folder / "embed.onnx"), embed, 1), OrtGraph(str(folder / "decoder.onnx"), decoder, 1)


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


def test_a_shared_cache_and_a_growing_one_are_what_numpy_says(graphs):
    shared = decode.open_reader(*graphs, TEXT, 10)
    assert isinstance(shared, SharedReader)
    check_reads(shared)
    check_reads(decode.GrowingReader(*graphs, TEXT))


def test_a_prompt_read_in_parts_is_the_same_prompt(graphs, monkeypatch):
    monkeypatch.setattr(ort_module, "PART_TOKENS", 2)
    reader = decode.open_reader(*graphs, TEXT, 10)
    ran = []
    monkeypatch.setattr(SharedReader, "_run", lambda self, e, n, run=SharedReader._run: ran.append(n) or run(self, e, n))
    check_reads(reader)
    assert ran == [2, 2, 1, 1, 1, 2, 1, 2, 2]
    monkeypatch.setattr(SharedReader, "read", wrong(SharedReader.read, ("for part in parts]", "for part in parts[:-1]]")))
    with pytest.raises(AssertionError):
        check_reads(decode.open_reader(*graphs, TEXT, 10))


def test_nothing_is_copied_until_the_room_ends_and_then_what_was_read_is_kept(graphs):
    reader = decode.open_reader(*graphs, TEXT, 10)
    reader.read(TABLE[IDS[:60]][None])
    (key, value) = reader._cache.values()
    assert reader.room == 64 and np.abs(key[:, :, :60]).min() > 0 and not key[:, :, 60:].any()
    for n in range(61, 65):
        assert close(reader.read_token(int(IDS[n - 1])), IDS[:n])
    assert [id(key), id(value)] == [id(a) for a in reader._cache.values()] and key[:, :, 60:].any()
    assert close(reader.read_token(int(IDS[64])), IDS[:65])
    assert reader.room == 128


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("_run", ("total = self.length + tokens", "total = self.length + tokens + 1")),
        ("_run", ("self.length = total", "self.length = tokens")),
        ("read_token", ("self._token[0, 0] = token", "pass")),
        ("rewind", ("self.length = length", "pass")),
    ],
    ids=["one token too many", "the past forgotten", "an old token read again", "no rewind"],
)
def test_wrong_readers_are_seen(graphs, monkeypatch, name, edit):
    monkeypatch.setattr(SharedReader, name, wrong(getattr(SharedReader, name), edit))
    with pytest.raises(AssertionError):
        check_reads(decode.open_reader(*graphs, TEXT, 64))


def test_a_buffer_that_forgets_when_it_grows_is_seen(graphs, monkeypatch):
    monkeypatch.setattr(SharedReader, "reserve", wrong(SharedReader.reserve, ("if self.length:", "if False:")))
    with pytest.raises(AssertionError):
        test_nothing_is_copied_until_the_room_ends_and_then_what_was_read_is_kept(graphs)


def test_a_decoder_of_the_older_kind_keeps_its_growing_cache(handmade):
    from edgesafe import Session

    session = Session.open(handmade)
    assert isinstance(session.reader(8), decode.GrowingReader)
    assert not decode.shares_cache(session.manifest.graphs[graph_io.DECODER_PATH])


def test_the_decoder_alone_waits_awake_and_not_for_long():
    key = "session.intra_op.{}".format
    for alone, spins in ((True, "1"), (False, "0")):
        options = session_options(2, alone=alone)
        assert options.get_session_config_entry(key("allow_spinning")) == spins
        assert int(options.get_session_config_entry(key("spin_duration_us"))) <= 100  # 500 was slower than 20 to 100
