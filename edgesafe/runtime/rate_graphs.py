"""Small graphs of what bundles are made of, with random weights, to time a machine by: written without the onnx package."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgesafe.format import graph_io
from edgesafe.format.graph_io import TensorSpec
from edgesafe.format.specs import GraphSpec
from edgesafe.runtime.engine import Array

_MICROSOFT = "com.microsoft"
_IR_VERSION, _OPSET = 8, 17
# ONNX's numbers for types of numbers.
_FLOAT = 1
_TYPES = {"float32": _FLOAT, "uint8": 2, "int8": 3, "int64": 7, "float16": 10}
_BLOCK = 32  # of weights in four bits, as bundles have it

Field = tuple[int, int | float | bytes | str]


@dataclass
class Net:
    """A graph in the making: nodes one after the other, and constants by name."""

    nodes: list[bytes] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def node(self, op: str, *inputs: str, domain: str = "", outputs: Sequence[str] = (), **words: int | float) -> str:
        """Add a node; its first output's name."""
        names = list(outputs) or [f"n{len(self.nodes)}"]
        told: list[Field] = [*((1, name) for name in inputs), *((2, name) for name in names)]
        told += [(4, op), (7, domain)] + [(5, _attribute(word, value)) for word, value in words.items()]
        self.nodes.append(_message(told))
        return names[0]

    def constant(self, array: Array) -> str:
        """Add a constant; its name."""
        name = f"w{len(self.weights)}"
        self.weights[name] = np.asarray(array)
        return name

    def noise(self, *shape: int) -> str:
        """A float32 constant of small random numbers."""
        return self.constant(self.rng.standard_normal(shape, np.float32) / np.float32(shape[0] ** 0.5))

    def quantized(self, x: str) -> tuple[str, str, str]:
        """A state in eight bits, with its scale and zero point, as taken at run time."""
        names = [f"{x}.{part}" for part in ("q", "scale", "zero")]
        self.node("DynamicQuantizeLinear", x, outputs=names)
        return names[0], names[1], names[2]

    def int8(self, rows: int, columns: int) -> tuple[str, str, str]:
        """A matrix in eight bits with a scale and a zero point for each column, by their names."""
        codes = self.rng.integers(-127, 128, (rows, columns), np.int8)
        scales = np.full(columns, 1 / (64 * rows**0.5), np.float32)
        return self.constant(codes), self.constant(scales), self.constant(np.zeros(columns, np.int8))

    def dense8(self, x: str, rows: int, columns: int) -> str:
        """A product by int8 weights, as a tower's linear layers are."""
        (codes, scales, zeros), (q, scale, zero) = self.int8(rows, columns), self.quantized(x)
        product = self.node("Cast", self.node("MatMulInteger", q, codes, zero, zeros), to=_FLOAT)
        return self.node("Mul", product, self.node("Mul", scale, scales))

    def dense4(self, x: str, rows: int, columns: int) -> str:
        """A product by weights in blocks of four bits, as a decoder's linear layers are."""
        blocks = rows // _BLOCK
        codes = self.constant(self.rng.integers(0, 256, (columns, blocks, _BLOCK // 2), np.uint8))
        stored = self.constant(np.full(columns * blocks, 1 / (4 * rows**0.5), np.float16))
        scales = self.node("Cast", stored, to=_FLOAT)  # once, when the graph is opened
        zeros = self.constant(np.full(columns * -(-blocks // 2), 0x88, np.uint8))
        given = x, codes, scales, zeros
        return self.node(
            "MatMulNBits", *given, domain=_MICROSOFT, K=rows, N=columns, bits=4, block_size=_BLOCK, accuracy_level=4
        )

    def sigmoid_unit(self, x: str) -> str:
        """A state times its sigmoid."""
        return self.node("Mul", x, self.node("Sigmoid", x))

    def save(self, path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> GraphSpec:
        """Write the graph, whose outputs are nodes' by name; what a manifest would say of it."""
        graph: list[Field] = [(1, node) for node in self.nodes]
        graph += [(2, "rates"), *((5, _tensor(name, array)) for name, array in self.weights.items())]
        graph += [(11, _value(spec)) for spec in inputs] + [(12, _value(spec)) for spec in outputs]
        opsets = [(8, _message([(1, domain), (2, version)])) for domain, version in (("", _OPSET), (_MICROSOFT, 1))]
        path.write_bytes(_message([(1, _IR_VERSION), (7, _message(graph)), *opsets]))
        return GraphSpec(tuple(inputs), tuple(outputs), None, sum(array.nbytes for array in self.weights.values()))


def feed_forward(path: Path, tokens: int, width: int, scheme: str) -> GraphSpec:
    """The half of a tower's block that has linear layers alone, in ``int8`` or ``fp32``, four times as wide inside."""
    net, inner = Net(), 4 * width
    x = net.node("LayerNormalization", graph_io.HIDDEN_STATES, net.noise(width), net.noise(width), axis=-1)
    if scheme == "int8":
        y = net.dense8(net.sigmoid_unit(net.dense8(x, width, inner)), inner, width)
    else:
        y = net.node("MatMul", net.sigmoid_unit(net.node("MatMul", x, net.noise(width, inner))), net.noise(inner, width))
    net.node("Add", y, graph_io.HIDDEN_STATES, outputs=[graph_io.HIDDEN_STATES_OUT])
    return _state_graph(net, path, tokens, width)


def attention(path: Path, tokens: int, width: int, heads: int) -> GraphSpec:
    """A tower's attention in int8, its query, key and value weights included."""
    net = Net()
    (codes, scales, zeros), bias = net.int8(width, 3 * width), net.noise(3 * width)
    q, scale, zero = net.quantized(graph_io.HIDDEN_STATES)
    given = (q, codes, bias, scale, scales, "", zero, zeros)
    net.node("QAttention", *given, domain=_MICROSOFT, outputs=[graph_io.HIDDEN_STATES_OUT], num_heads=heads)
    return _state_graph(net, path, tokens, width)


def decoder(path: Path, layers: int, width: int, inner: int) -> GraphSpec:
    """Layers with the products of a decoder's, in four bits, and without its attention.

    It takes the names of one that shares its cache, so that an engine opens it as one.
    """
    net, state = Net(), graph_io.INPUTS_EMBEDS
    for _ in range(layers):
        for rows, columns in ((width, width), (width, inner)):
            x = net.node("SimplifiedLayerNormalization", state, net.noise(width), axis=-1)
            if columns == width:
                joined = net.node("Mul", net.dense4(x, rows, columns), net.dense4(x, rows, columns))
                y = net.dense4(net.node("Mul", joined, net.dense4(x, rows, columns)), columns, width)
            else:
                gate = net.sigmoid_unit(net.dense4(x, rows, columns))
                y = net.dense4(net.node("Mul", gate, net.dense4(x, rows, columns)), columns, width)
            state = net.node("Add", state, y)
    ends = net.constant(np.array([-1])), net.constant(np.array([2**31])), net.constant(np.array([1]))
    net.node("Slice", state, *ends, outputs=[graph_io.LOGITS])
    net.node("Identity", graph_io.past_key(0), outputs=[graph_io.present_key(0)])
    one = (1, 1, 1, 1)
    ins = TensorSpec(graph_io.INPUTS_EMBEDS, "float32", (1, "S", width)), TensorSpec(graph_io.ATTENTION_MASK, "int64", (1, "P"))
    outs = TensorSpec(graph_io.LOGITS, "float32", (1, 1, width)), TensorSpec(graph_io.present_key(0), "float32", one)
    return net.save(path, (*ins, TensorSpec(graph_io.past_key(0), "float32", one)), outs)


def _state_graph(net: Net, path: Path, tokens: int, width: int) -> GraphSpec:
    shape = (1, tokens, width)
    ends = (TensorSpec(name, "float32", shape) for name in (graph_io.HIDDEN_STATES, graph_io.HIDDEN_STATES_OUT))
    return net.save(path, [next(ends)], [next(ends)])


def _message(fields: Sequence[Field]) -> bytes:
    """Fields by number in protobuf's wire format: whole numbers, float32, or bytes and texts with their length in front.

    Source: https://protobuf.dev/programming-guides/encoding.
    """
    out = []
    for number, value in fields:
        if isinstance(value, int):
            out.append(_varint(number << 3) + _varint(value))
        elif isinstance(value, float):
            out.append(_varint(number << 3 | 5) + struct.pack("<f", value))
        else:
            told = value.encode() if isinstance(value, str) else value
            out.append(_varint(number << 3 | 2) + _varint(len(told)) + told)
    return b"".join(out)


def _varint(value: int) -> bytes:
    r"""Seven bits a byte, the lowest first; numbers below 0 as 64 bits.

    >>> _varint(300), len(_varint(-1))
    (b'\xac\x02', 10)
    """
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _attribute(name: str, value: int | float) -> bytes:
    kind = 1 if isinstance(value, float) else 2
    return _message([(1, name), (kind + 1, value), (20, kind)])


def _tensor(name: str, array: Array) -> bytes:
    return _message([*((1, n) for n in array.shape), (2, _TYPES[str(array.dtype)]), (8, name), (9, array.tobytes())])


def _value(spec: TensorSpec) -> bytes:
    dims = [(1, _message([(1 if isinstance(n, int) else 2, n)])) for n in spec.shape]
    tensor = _message([(1, _TYPES[spec.dtype]), (2, _message(dims))])
    return _message([(1, spec.name), (2, _message([(1, tensor)]))])


def feeds(spec: GraphSpec, tokens: int) -> dict[str, Array]:
    """Random inputs of a graph, ``tokens`` long where it leaves that open."""
    rng = np.random.default_rng(0)
    shapes = {tensor: tuple(n if isinstance(n, int) else tokens for n in tensor.shape) for tensor in spec.inputs}
    return {
        t.name: np.ones(shape, np.int64) if t.dtype == "int64" else rng.standard_normal(shape, np.float32)
        for t, shape in shapes.items()
    }
