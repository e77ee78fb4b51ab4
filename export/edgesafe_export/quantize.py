"""Weight schemes, by onnxruntime's own quantizers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx

from edgesafe.errors import ConfigError
from edgesafe_export.graphs import quiet

VISION_SCHEMES = ("int8-dynamic", "fp32")
TEXT_SCHEMES = ("int4-block32", "int8-block32", "fp32", "auto")


def check_schemes(vision: str, text: str) -> None:
    """Refuse unknown schemes.

    Raises:
        ConfigError: a scheme that is not one of the lists above.
    """
    for what, scheme, known in (("vision", vision, VISION_SCHEMES), ("text", text, TEXT_SCHEMES)):
        if scheme not in known:
            raise ConfigError(
                f"unknown {what} scheme {scheme!r}",
                where=f"--{what}-scheme",
                expected="one of " + ", ".join(known),
                todo="choose one of these",
            )


def quantize(model: onnx.ModelProto, scheme: str) -> onnx.ModelProto:
    """A graph's MatMul weights in a scheme; activations stay float32 outside the integer products.

    int8-dynamic: weights int8 a column, activations uint8 with a scale taken at run time.
    int4-block32, int8-block32: weights in blocks of 32 (MatMulNBits), accuracy level 4 (int8 products).
    """
    if scheme == "fp32":
        return model
    if scheme == "int8-dynamic":
        return _int8_dynamic(model)
    return _blocks(model, bits=4 if scheme.startswith("int4") else 8)


def _int8_dynamic(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
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


def _blocks(model: onnx.ModelProto, bits: int) -> onnx.ModelProto:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(model, bits=bits, block_size=32, is_symmetric=False, accuracy_level=4)
    quantizer.process()
    return quantizer.model.model


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of a graph's weights."""
    return sum(t.ByteSize() for t in model.graph.initializer)
