"""Weight schemes, by onnxruntime's own quantizers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgesafe.device import TEXT_SCHEMES, VISION_SCHEMES
from edgesafe.errors import ConfigError, ExportError
from edgesafe_export.graphs import quiet

# What "auto" tries, from coarse to fine.
AUTO = ("int4-block128", "int4-block32", "int8-block32")
EMBED_SCHEME = "int8-rows"
_ROWS = 4096


def check_schemes(vision: str, text: str) -> None:
    """Refuse unknown schemes.

    Raises:
        ConfigError: a scheme that is not one of `edgesafe.device`'s lists.
    """
    for what, scheme, known in (("vision", vision, VISION_SCHEMES), ("text", text, TEXT_SCHEMES)):
        if scheme not in known:
            raise ConfigError(
                f"unknown {what} scheme {scheme!r}",
                where=f"--{what}-scheme",
                expected="one of " + ", ".join(known),
                todo="choose one of these",
            )


def quantize(model: onnx.ModelProto, scheme: str, folder: Path | None = None) -> onnx.ModelProto:
    """A graph's MatMul weights in a scheme; activations stay float32 outside the integer products.

    int8-dynamic: weights int8 a column, activations uint8 with a scale taken at run time.
    int4-block32, int8-block32 and so on: weights in blocks of 32 (MatMulNBits), accuracy level 4 (int8 products). Larger blocks
    are faster and coarser.
    int8-rows: an embedding table, int8 with one scale per row.

    Args:
        model: the graph.
        scheme: one of the above, or fp32.
        folder: where files lie meanwhile, on a disk with room; default: the system's folder for such files.
    """
    if scheme == "fp32":
        return model
    if scheme == "int8-dynamic":
        return _int8_dynamic(model, folder)
    if scheme == EMBED_SCHEME:
        return _int8_rows(model)
    bits, block_size = scheme.removeprefix("int").split("-block")
    return blocks(model, bits=int(bits), block_size=int(block_size))


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


def blocks(model: onnx.ModelProto, bits: int, block_size: int = 32, **options: Any) -> onnx.ModelProto:
    """MatMul weights in blocks by round to nearest; `options` of onnxruntime's quantizer replace ours."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    # The quantizer edits the graph that it is given, and skips what is already in blocks: without a copy a second scheme tried
    # on the same graph would quietly be the first one again.
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    options = {"is_symmetric": False, "accuracy_level": 4, **options}
    quantizer = MatMulNBitsQuantizer(copied, bits=bits, block_size=block_size, **options)
    with quiet():
        quantizer.process()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


def _int8_rows(model: onnx.ModelProto) -> onnx.ModelProto:
    """A table that is looked up: the row's int8 values and its scale are gathered and multiplied, nothing else is computed."""
    gathers = [n for n in model.graph.node if n.op_type == "Gather"]
    if len(gathers) != 1 or len(model.graph.node) != 1 or len(model.graph.initializer) != 1:
        raise ExportError(
            "the embedding isn't a plain table", where="text/embed_tokens.onnx", expected="one Gather of one table"
        )
    (ids, out), table = (gathers[0].input[1], gathers[0].output[0]), numpy_helper.to_array(model.graph.initializer[0])
    whole, scale = np.empty(table.shape, np.int8), np.empty((len(table), 1), np.float32)
    for at in range(0, len(table), _ROWS):  # a large table takes no second one in float32
        some = slice(at, at + _ROWS)
        peak = np.abs(table[some]).max(axis=1, keepdims=True)
        scale[some] = np.where(peak > 0, peak / 127, 1).astype(np.float32)
        whole[some] = np.rint(table[some] / scale[some]).astype(np.int8)
    nodes = [
        helper.make_node("Gather", ["table", ids], ["row"], axis=0),
        helper.make_node("Cast", ["row"], ["row_float"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["scale", ids], ["row_scale"], axis=0),
        helper.make_node("Mul", ["row_float", "row_scale"], [out]),
    ]
    quantized = onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    quantized.opset_import.extend(model.opset_import)
    quantized.graph.name = model.graph.name
    quantized.graph.input.extend(model.graph.input)
    quantized.graph.output.extend(model.graph.output)
    quantized.graph.node.extend(nodes)
    quantized.graph.initializer.extend([numpy_helper.from_array(whole, "table"), numpy_helper.from_array(scale, "scale")])
    return quantized


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of a graph's weights, those in a file beside it included."""
    outside = (int(entry.value) for t in model.graph.initializer for entry in t.external_data if entry.key == "length")
    return sum(int(t.ByteSize()) for t in model.graph.initializer) + sum(outside)
