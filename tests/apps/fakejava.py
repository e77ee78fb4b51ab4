"""Chaquopy's module ``java`` with the classes of Java and of onnxruntime's Java library that the engine uses, in Python.

The computing is onnxruntime's own. As in Java, a tensor over a direct buffer is that buffer's memory, a pinned output is
written where it lies, ``close`` frees a tensor, and arrays are copied in and out of buffers; ``copied`` counts their bytes.
"""

from __future__ import annotations

import sys
from collections import Counter
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

copied: Counter[str] = Counter()


class ByteBuffer:
    """A view of memory from a position to a limit, in bytes, floats or longs."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory, self.position, self.end = memory, 0, len(memory)

    @classmethod
    def allocateDirect(cls, size: int) -> ByteBuffer:
        return cls(np.zeros(size, np.uint8))

    def order(self, order: str) -> ByteBuffer:
        assert order == "native"
        return self

    def put(self, *what: Any) -> None:
        if len(what) == 2:  # an index and a number
            self.memory[what[0]] = what[1]
            return
        data = np.frombuffer(what[0], self.memory.dtype)
        copied["in"] += data.nbytes
        self.memory[self.position : self.position + len(data)] = data
        self.position += len(data)

    def get(self, into: bytearray) -> None:
        copied["out"] += len(into)
        assert self.position + len(into) <= self.end, "BufferUnderflowException"
        into[:] = self.memory[self.position : self.position + len(into)].tobytes()
        self.position += len(into)

    def rewind(self) -> None:
        self.position = 0

    def capacity(self) -> int:
        return len(self.memory)

    def limit(self, end: int) -> None:
        self.end = end

    def duplicate(self) -> ByteBuffer:
        return ByteBuffer(self.memory)

    def asFloatBuffer(self) -> ByteBuffer:
        return ByteBuffer(self.memory.view(np.float32))

    def asLongBuffer(self) -> ByteBuffer:
        return ByteBuffer(self.memory.view(np.int64))


class OnnxTensor:
    def __init__(self, value: ort.OrtValue) -> None:
        self.value, self.open = value, True

    @staticmethod
    def createTensor(environment: Any, buffer: ByteBuffer, shape: list[int]) -> OnnxTensor:
        memory = buffer.memory[buffer.position : buffer.end]
        assert memory.size == np.prod(shape), "OrtException: shape and buffer differ"
        return OnnxTensor(ort.OrtValue.ortvalue_from_numpy(memory.reshape(shape)))

    def used(self) -> ort.OrtValue:
        assert self.open, "IllegalStateException: closed"
        return self.value

    def getInfo(self) -> Any:
        return SimpleNamespace(getShape=lambda: self.used().shape())

    def getByteBuffer(self) -> ByteBuffer:
        return ByteBuffer(np.frombuffer(self.used().numpy().tobytes(), np.uint8))

    def close(self) -> None:
        self.open = False


class Result:
    def __init__(self, values: dict[str, OnnxTensor], pinned: bool) -> None:
        self.values, self.pinned = values, pinned

    def get(self, name: str) -> Any:
        return SimpleNamespace(get=lambda: self.values[name])  # an Optional

    def close(self) -> None:
        for value in () if self.pinned else self.values.values():
            value.close()


class OrtSession:
    def __init__(self, path: str, options: ort.SessionOptions) -> None:
        self.session = ort.InferenceSession(path, options)

    def run(self, inputs: HashMap, outputs: HashMap | HashSet) -> Result:
        binding = self.session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_ortvalue_input(name, tensor.used())
        if isinstance(outputs, HashMap):
            for name, tensor in outputs.items():
                binding.bind_ortvalue_output(name, tensor.used())
            self.session.run_with_iobinding(binding)
            return Result(dict(outputs), True)
        for name in outputs:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        return Result(dict(zip(outputs, map(OnnxTensor, binding.get_outputs()), strict=True)), False)


class SessionOptions(ort.SessionOptions):
    def setIntraOpNumThreads(self, threads: int) -> None:
        self.intra_op_num_threads = threads

    def setInterOpNumThreads(self, threads: int) -> None:
        self.inter_op_num_threads = threads

    def setMemoryPatternOptimization(self, on: bool) -> None:
        self.enable_mem_pattern = on

    def addConfigEntry(self, key: str, value: str) -> None:
        self.add_session_config_entry(key, value)


class HashMap(dict):
    def put(self, key: str, value: Any) -> None:
        self[key] = value


class HashSet(list):
    def add(self, value: str) -> None:
        self.append(value)


CLASSES = {
    "java.nio.ByteBuffer": ByteBuffer,
    "java.nio.ByteOrder": SimpleNamespace(nativeOrder=lambda: "native"),
    "java.util.HashMap": HashMap,
    "java.util.HashSet": HashSet,
    "ai.onnxruntime.OnnxTensor": OnnxTensor,
    "ai.onnxruntime.OrtEnvironment": SimpleNamespace(
        getEnvironment=lambda: SimpleNamespace(getVersion=lambda: ort.__version__, createSession=OrtSession)
    ),
    "ai.onnxruntime.OrtSession$SessionOptions": SessionOptions,
}
ARRAYS = {"byte": bytearray, "long": lambda values: [int(n) for n in values]}


def install() -> None:
    """Make ``import java`` find this."""
    java = ModuleType("java")
    java.jclass, java.jarray, java.jbyte, java.jlong = CLASSES.__getitem__, ARRAYS.__getitem__, "byte", "long"  # type: ignore[attr-defined]
    sys.modules["java"] = java
