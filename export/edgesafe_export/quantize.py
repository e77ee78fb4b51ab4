"""Weight schemes: what a scheme's name says, and a graph's matrices in it.

Vision: int8-dynamic by onnxruntime's own quantizer. Text: the decoder's layers in blocks (`BLOCKS`), the head and the
embedding table always as `TABLE`, so that a model whose head is its embedding has their bytes once.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from edgesafe.device import TEXT_SCHEMES, VISION_SCHEMES
from edgesafe.errors import ConfigError, ExportError
from edgesafe.format import graph_io
from edgesafe_export.block_weights import Blocked, Format, compensate, round_nearest
from edgesafe_export.graphs import quiet

# Eight bits and no zero point: a head in four bits is half of what four bits cost a model whose head is its embedding.
TABLE = Format(8, 64, symmetric=True)


@dataclass(frozen=True)
class Blocks:
    """A text scheme.

    Attributes:
        most: of the layers' matrices.
        down: of each layer's last one (`down_proj`), which joins what the others have computed: four bits cost the most there.
        cached: of what makes keys and values (`k_proj`, `v_proj`), few outputs that every later token reads; None: as `most`.
        calibrated: whether their errors are compensated (`block_weights.compensate`), or else each weight rounded on its own.
    """

    most: Format
    down: Format
    calibrated: bool = False
    cached: Format | None = None


def _uniform(bits: int, size: int, *, calibrated: bool = False) -> Blocks:
    return Blocks(Format(bits, size), Format(bits, size), calibrated)


BLOCKS = {
    **{f"int4-block{size}": _uniform(4, size) for size in (32, 64, 128)},
    "int8-block32": _uniform(8, 32),
    "int4-gptq": _uniform(4, 32, calibrated=True),
    "mixed-gptq": Blocks(Format(4, 32), Format(8, 128, symmetric=True), calibrated=True, cached=TABLE),
}
# What "auto" tries, from small to large.
AUTO = ("int4-gptq", "mixed-gptq", "int8-block32", "fp32")
EMBED_SCHEME = "int8-table"


def check_schemes(vision: str, text: str, *, accept_damage: bool = False) -> None:
    """Refuse unknown schemes.

    Raises:
        ConfigError: a scheme that is not one of `edgesafe.device`'s lists, or damage accepted of no scheme in particular.
    """
    for what, scheme, known in (("vision", vision, VISION_SCHEMES), ("text", text, TEXT_SCHEMES)):
        if scheme not in known:
            raise ConfigError(
                f"unknown {what} scheme {scheme!r}",
                where=f"--{what}-scheme",
                expected="one of " + ", ".join(known),
                todo="choose one of these",
            )
    if accept_damage and text == "auto":
        raise ConfigError(
            "auto takes a scheme that does no damage",
            where="--accept-damage",
            expected="a text scheme by its name",
            todo="name one (--text-scheme, or text_scheme of the device's profile), or leave --accept-damage out",
        )


def quantize(
    model: onnx.ModelProto, scheme: str, folder: Path | None = None, hessians: Mapping[str, Tensor] | None = None
) -> onnx.ModelProto:
    """A graph's MatMul weights in a scheme; activations stay float32 outside the integer products.

    int8-dynamic: weights int8 a column, activations uint8 with a scale taken at run time.
    int4-block32, int8-block32 and so on: a decoder's layers in blocks of 32, rounded to nearest. Larger blocks are faster and
        coarser.
    int4-gptq: the same in 4 bits and blocks of 32, each weight's error made up for by the others on calibration tokens.
    mixed-gptq: the same, with 8 bits for keys and values and where a layer joins what it has computed (`down_proj`).
    int8-table: an embedding.

    Args:
        model: the graph.
        scheme: one of the above, or fp32.
        folder: where files lie meanwhile, on a disk with room; default: the system's folder for such files.
        hessians: of a calibrated scheme, by the name of each matrix of a layer, as `block_weights.compensate` takes it.
    """
    if scheme == "fp32":
        return model
    if scheme == "int8-dynamic":
        return _int8_dynamic(model, folder)
    if scheme == EMBED_SCHEME:
        return _table(model)
    return _in_blocks(model, BLOCKS[scheme], hessians or {})


def _int8_dynamic(model: onnx.ModelProto, within: Path | None) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(dir=within) as folder:
        source, target = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
        onnx.save(model, source)
        with quiet():
            quantize_dynamic(
                source,
                target,
                op_types_to_quantize=["MatMul", "Gemm", "Attention"],
                per_channel=True,
                weight_type=QuantType.QInt8,
            )
        return onnx.load(target)


def matrices(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The products with a constant matrix, by the matrix's name."""
    constants = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    return {n.input[1]: n for n in model.graph.node if n.op_type == "MatMul" and constants.get(n.input[1]) == 2}


def _in_blocks(model: onnx.ModelProto, scheme: Blocks, hessians: Mapping[str, Tensor]) -> onnx.ModelProto:
    """A decoder or a part of one; the last matrix of a graph that gives logits is the head."""
    products = matrices(model)
    head = list(products)[-1] if any(value.name == graph_io.LOGITS for value in model.graph.output) else ""
    quantized = _shell(model, {tensor.name for tensor in model.graph.initializer} - products.keys())
    made: dict[str, list[onnx.NodeProto]] = {}
    read = Counter(node.input[0] for node in products.values())
    cached = cached_outputs(model) if scheme.cached else {}
    sums = hessians if scheme.calibrated else None
    for tensor in model.graph.initializer:
        if (name := tensor.name) in products:
            matrix = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
            # Keys and values may be as narrow, but what they read queries read too.
            down = matrix.shape[1] > matrix.shape[0] and read[products[name].input[0]] == 1
            form = TABLE if name == head else scheme.down if down else scheme.most
            at = len(matrix) - cached.get(name, 0)
            parts = [(matrix[:at], form, name), (matrix[at:], scheme.cached or form, f"{name}.cached")]
            made[name] = [
                _product(quantized.graph, part, _rounded(rows, own, name, sums), rows.shape)
                for rows, own, part in parts
                if len(rows)
            ]
    for node in model.graph.node:
        plain = node.op_type != "MatMul" or node.input[1] not in made
        quantized.graph.node.extend([node] if plain else _product_nodes(node, made[node.input[1]]))
    return quantized


def cached_outputs(model: onnx.ModelProto) -> dict[str, int]:
    """How many of a product's outputs, its last ones, are keys and values, by its matrix's name; without products of neither.

    Where one product makes several kinds, they stand in the order of the attention's inputs: queries, keys, values.
    """
    products, makers = matrices(model), {name: node for node in model.graph.node for name in node.output}
    widths = {tensor.name: tensor.dims[-1] for tensor in model.graph.initializer if tensor.name in products}
    found = {}
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            said = {attribute.name: attribute.i for attribute in node.attribute}
            heads = (said["num_heads"], said["kv_num_heads"], said["kv_num_heads"])
            # Without keys and values among its inputs it reads them behind the queries.
            made_by = [_matrix_behind(name or node.input[0], makers, products) for name in node.input[:3]]
            for matrix in {name for name in made_by[1:] if name}:
                own = [count if name == matrix else 0 for name, count in zip(made_by, heads, strict=True)]
                found[matrix] = widths[matrix] * sum(own[1:]) // sum(own)
    return found


def _matrix_behind(value: str, makers: Mapping[str, onnx.NodeProto], products: Collection[str]) -> str:
    """The matrix of the product that a value is made of, past biases, norms and cuts; nothing where there is none."""
    while (node := makers.get(value)) is not None:
        if node.op_type == "MatMul" and node.input[1] in products:
            return str(node.input[1])
        value = next((name for name in node.input if name in makers), "")
    return ""


def _rounded(matrix: np.ndarray, form: Format, name: str, hessians: Mapping[str, Tensor] | None) -> Blocked:
    """A matrix [N, K] in a format; eight bits need no compensation."""
    if hessians is None or form.bits >= TABLE.bits:
        return round_nearest(matrix, form)
    return compensate(matrix, hessians[name], form)


def _product(graph: onnx.GraphProto, name: str, blocked: Blocked, shape: tuple[int, ...]) -> onnx.NodeProto:
    """A matrix [N, K], put into a graph, and the node that multiplies by it, which lacks its input and output."""
    arrays = {"codes": blocked.packed(), "scales": blocked.stored_scales().reshape(-1)}
    zeros = blocked.packed_zeros()
    arrays |= {} if zeros is None else {"zeros": zeros.reshape(-1)}
    names = [_put(graph, f"{name}.{kind}", array) for kind, array in arrays.items()]
    node = helper.make_node("MatMulNBits", ["", *names], [""], domain="com.microsoft")
    words = {"N": shape[0], "K": shape[1], "bits": blocked.format.bits, "block_size": blocked.format.size, "accuracy_level": 4}
    node.attribute.extend(helper.make_attribute(word, value) for word, value in words.items())
    return node


def _put(graph: onnx.GraphProto, name: str, array: np.ndarray) -> str:
    """Put a constant into a graph; onnxruntime makes float32 of float16 once, when it opens the graph."""
    graph.initializer.append(numpy_helper.from_array(array, name))
    if array.dtype != np.float16:
        return name
    graph.node.append(helper.make_node("Cast", [name], [f"{name}.float"], name=f"{name}.float", to=TensorProto.FLOAT))
    return f"{name}.float"


def _product_nodes(node: onnx.NodeProto, made: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The products in the place of another one, and what joins them if they are several."""
    out, nodes = node.output[0], []
    for nth, product in enumerate(made):
        own = onnx.NodeProto()
        own.CopyFrom(product)
        own.input[0], own.output[0], own.name = node.input[0], out, node.name
        if len(made) > 1:
            own.output[0] = own.name = f"{out}.{nth}"
        nodes.append(own)
    if len(made) > 1:
        nodes.append(helper.make_node("Concat", [own.output[0] for own in nodes], [out], name=node.name, axis=-1))
    return nodes


def _table(model: onnx.ModelProto) -> onnx.ModelProto:
    """A table that is looked up: a row's numbers and scales are gathered and multiplied, nothing else is computed."""
    gathers = [n for n in model.graph.node if n.op_type == "Gather"]
    if len(gathers) != 1 or len(model.graph.node) != 1 or len(model.graph.initializer) != 1:
        raise ExportError(
            "the embedding isn't a plain table", where="text/embed_tokens.onnx", expected="one Gather of one table"
        )
    (ids, out), table = (gathers[0].input[1], gathers[0].output[0]), numpy_helper.to_array(model.graph.initializer[0])
    blocked = round_nearest(table, TABLE)
    quantized = _shell(model, ())
    constants = {
        "table": blocked.codes,
        "scales": blocked.stored_scales()[..., None],
        "middle": np.float32(TABLE.middle),
        "width": np.array([0, 0, -1], np.int64),
        "first": np.array([0], np.int64),
        "last": np.array([table.shape[1]], np.int64),
        "axis": np.array([2], np.int64),
    }
    quantized.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items())
    steps: tuple[
        tuple[str, list[str], str, dict[str, int]], ...
    ] = (  # codes and scales [1,S,blocks,size or 1], then [1,S,blocks x size] and the table's own width
        ("Gather", ["table", ids], "row", {"axis": 0}),
        ("Cast", ["row"], "row.float", {"to": TensorProto.FLOAT}),
        ("Sub", ["row.float", "middle"], "row.even", {}),
        ("Gather", ["scales", ids], "row.scales", {"axis": 0}),
        ("Cast", ["row.scales"], "row.scales.float", {"to": TensorProto.FLOAT}),
        ("Mul", ["row.even", "row.scales.float"], "row.blocks", {}),
        ("Reshape", ["row.blocks", "width"], "row.whole", {}),
        ("Slice", ["row.whole", "first", "last", "axis"], out, {}),
    )
    for kind, read, made, words in steps:
        node = helper.make_node(kind, read, [made], name=made)
        node.attribute.extend(helper.make_attribute(word, value) for word, value in words.items())
        quantized.graph.node.append(node)
    return quantized


def _shell(model: onnx.ModelProto, kept: Collection[str]) -> onnx.ModelProto:
    """A graph without its nodes, and of its constants those of these names."""
    shell = onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    shell.opset_import.extend(model.opset_import)
    if all(opset.domain != "com.microsoft" for opset in shell.opset_import):
        shell.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    shell.graph.name = model.graph.name
    for to, of in ((shell.graph.input, model.graph.input), (shell.graph.output, model.graph.output)):
        to.extend(of)
    shell.graph.value_info.extend(model.graph.value_info)
    shell.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in kept)
    return shell


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of a graph's weights, those in a file beside it included."""
    outside = (int(entry.value) for t in model.graph.initializer for entry in t.external_data if entry.key == "length")
    return sum(int(t.ByteSize()) for t in model.graph.initializer) + sum(outside)
