"""One weight file behind several graphs: the exits of the standalone layout, or the embedding and a head that is the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx

# Smaller tensors (shapes, scales, axes) stay inside their graph, where onnxruntime wants to see them when it loads it.
_INLINE_BYTES = 1024
_ALIGNMENT = 64


class SharedWeights:
    """A file that holds each distinct weight of several graphs once. It is there from the first of them on."""

    def __init__(self, path: Path) -> None:
        self.path, self.end = path, 0
        self.places: dict[bytes, tuple[int, int]] = {}

    def move(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A copy of the graph whose larger weights point into the shared file."""
        moved = onnx.ModelProto()
        moved.CopyFrom(model)
        for tensor in moved.graph.initializer:
            data = onnx.numpy_helper.to_array(tensor).tobytes()
            if len(data) >= _INLINE_BYTES:
                self._point(tensor, data)
        light = onnx.ModelProto()
        light.CopyFrom(moved)  # a message gives the memory of cleared fields back only when it is gone itself
        return light

    def _point(self, tensor: onnx.TensorProto, data: bytes) -> None:
        key = hashlib.sha256(data).digest()
        if key not in self.places:
            start = self.end + -self.end % _ALIGNMENT
            with self.path.open("ab") as file:
                file.write(b"\0" * (start - self.end) + data)
            self.places[key], self.end = (start, len(data)), start + len(data)
        start, size = self.places[key]
        for field in ("raw_data", "float_data", "int32_data", "int64_data"):
            tensor.ClearField(field)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        for name, value in (("location", self.path.name), ("offset", str(start)), ("length", str(size))):
            tensor.external_data.add(key=name, value=value)
