"""onnxruntime's Java library as an engine of edgesafe, for apps that Chaquopy builds: no wheel of onnxruntime is needed.

``Session.open(bundle, engine=JavaOnnxRuntime())``. The Java names are those of the package ``ai.onnxruntime`` in the AAR
``com.microsoft.onnxruntime:onnxruntime-android``; README.md lists them. Python reaches them by Chaquopy's module ``java``.

Of a token, its id goes in and a row of logits comes out. The cache is written in place in Java's own memory, and no part of it
is copied. States between vision graphs stay in Java too.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from java import jarray, jbyte, jclass, jlong  # Chaquopy's own; there is no such module elsewhere

from edgesafe.format import graph_io
from edgesafe.format.specs import GraphSpec, TextSpec
from edgesafe.runtime import Reader, RunnableGraph
from edgesafe.runtime.decode import PART_TOKENS, room_for, shares_cache
from edgesafe.runtime.engine import Array, Graph, State

ByteBuffer, ByteOrder = jclass("java.nio.ByteBuffer"), jclass("java.nio.ByteOrder")
HashMap, HashSet = jclass("java.util.HashMap"), jclass("java.util.HashSet")
OnnxTensor, OrtEnvironment = jclass("ai.onnxruntime.OnnxTensor"), jclass("ai.onnxruntime.OrtEnvironment")
SessionOptions = jclass("ai.onnxruntime.OrtSession$SessionOptions")


class JavaOnnxRuntime:
    """See `edgesafe.runtime.engine.Engine`."""

    name = "onnxruntime-java"
    providers = ("CPUExecutionProvider",)

    def __init__(self) -> None:
        self._environment = OrtEnvironment.getEnvironment()
        self._sessions: WeakKeyDictionary[Graph, Any] = WeakKeyDictionary()

    @property
    def version(self) -> str:
        """The native library's version."""
        return str(self._environment.getVersion())

    def open(self, path: str, spec: GraphSpec, threads: int) -> Graph:
        """See ``Engine``; a graph is loaded from its path, so a bundle is a real folder and no asset."""
        options = SessionOptions()
        options.setIntraOpNumThreads(threads)
        options.setInterOpNumThreads(1)
        options.setMemoryPatternOptimization(False)
        options.addConfigEntry("session.intra_op.allow_spinning", "0")
        session = self._environment.createSession(path, options)

        def run(feeds: dict[str, Array]) -> dict[str, Array]:
            return {name: value.numpy() for name, value in self._run(session, spec, feeds).items()}

        def advance(state: State) -> State:
            (name,) = (tensor.name for tensor in spec.inputs)
            (value,) = self._run(session, spec, {name: state}).values()
            return value

        def share(embed: Graph, text: TextSpec, length: int) -> Reader | None:
            embedder = self._sessions.get(embed)
            if embedder is None or not shares_cache(spec):
                return None
            return JavaReader(self._environment, embedder, session, text, length)

        graph = RunnableGraph(spec, run, path, advance=advance, share=share)
        self._sessions[graph] = session
        return graph

    def _run(self, session: Any, spec: GraphSpec, feeds: dict[str, State]) -> dict[str, JavaValue]:
        """A run whose outputs stay in Java."""
        held = {
            name: feed if isinstance(feed, JavaValue) else JavaValue.of(self._environment, feed) for name, feed in feeds.items()
        }
        inputs, wanted = HashMap(), HashSet()
        for name, value in held.items():
            inputs.put(name, value.tensor)
        for tensor in spec.outputs:
            wanted.add(tensor.name)
        result = session.run(inputs, wanted)
        return {tensor.name: JavaValue(result.get(tensor.name).get()) for tensor in spec.outputs}


class JavaValue:
    """An ``OnnxTensor``, freed with this object."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    @staticmethod
    def of(environment: Any, array: Array) -> JavaValue:
        """A tensor with a copy of the numbers, float32 or int64."""
        return JavaValue(_over(environment, _filled(np.ascontiguousarray(array)), array.dtype, array.shape))

    def numpy(self) -> Array:
        """A copy of its numbers, float32."""
        shape = tuple(int(n) for n in self.tensor.getInfo().getShape())
        return _read(self.tensor.getByteBuffer(), jarray(jbyte)(4 * int(np.prod(shape)))).reshape(shape)

    def __del__(self) -> None:
        self.tensor.close()


class JavaReader:
    """See `edgesafe.runtime.engine.Reader`: past and present are one direct buffer a layer, for keys and for values."""

    def __init__(self, environment: Any, embed: Any, decoder: Any, text: TextSpec, length: int) -> None:
        self._environment, self._embed, self._decoder, self._text = environment, embed, decoder, text
        self.length = self._room = 0
        self._cache: dict[tuple[str, str], tuple[Any, JavaValue]] = {}
        token, one = _direct(8), _direct(4 * text.hidden_size)
        self._logits, self._row = _direct(4 * text.vocab_size), jarray(jbyte)(4 * text.vocab_size)
        self._token = token.asLongBuffer()
        self._one = self._value(one, np.float32, (1, 1, text.hidden_size))
        self._id = self._value(token, np.int64, (1, 1))
        self._ids = _map({graph_io.INPUT_IDS: self._id})
        self._embedded = _map({graph_io.INPUTS_EMBEDS: self._one})
        self._out = self._value(self._logits, np.float32, (1, 1, text.vocab_size))
        self.reserve(length)

    def read(self, embeds: Array) -> Array:
        """See ``Reader``."""
        self.reserve(self.length + embeds.shape[1])
        parts = np.array_split(embeds.astype(np.float32, copy=False), -(-embeds.shape[1] // PART_TOKENS), axis=1)
        return [self._run(JavaValue.of(self._environment, part), part.shape[1]) for part in parts][-1]

    def read_token(self, token: int) -> Array:
        """See ``Reader``."""
        self.reserve(self.length + 1)
        self._token.put(0, token)
        self._embed.run(self._ids, self._embedded).close()  # what is pinned stays open
        return self._run(self._one, 1)

    def rewind(self, length: int) -> None:
        """See ``Reader``. What lies behind is written over, not read."""
        self.length = length

    def reserve(self, length: int) -> None:
        """See ``Reader``; larger buffers take over what was read."""
        room = room_for(length, self._text.context_length)
        if room <= self._room:
            return
        self._mask = _filled(np.ones(room, np.int64)).asLongBuffer()
        shape = (1, self._text.num_kv_heads, room, self._text.head_dim)
        for i in range(self._text.num_layers):
            for names in ((graph_io.past_key(i), graph_io.present_key(i)), (graph_io.past_value(i), graph_io.present_value(i))):
                array = np.zeros(shape, np.float32)
                if self.length:
                    buffer = self._cache[names][0]
                    buffer.rewind()
                    old = _read(buffer, jarray(jbyte)(buffer.capacity())).reshape(*shape[:2], self._room, shape[3])
                    array[:, :, : self.length] = old[:, :, : self.length]
                buffer = _filled(array)
                self._cache[names] = buffer, self._value(buffer, np.float32, shape)
        self._room = room
        self._inputs = _map({past: value for (past, _), (_, value) in self._cache.items()})
        self._pinned = _map({present: value for (_, present), (_, value) in self._cache.items()} | {graph_io.LOGITS: self._out})

    def _run(self, embeds: JavaValue, tokens: int) -> Array:
        total = self.length + tokens
        mask = self._mask.duplicate()
        mask.limit(total)
        seen = JavaValue(OnnxTensor.createTensor(self._environment, mask, jarray(jlong)([1, total])))
        self._inputs.put(graph_io.INPUTS_EMBEDS, embeds.tensor)
        self._inputs.put(graph_io.ATTENTION_MASK, seen.tensor)
        self._decoder.run(self._inputs, self._pinned).close()
        self.length = total
        self._logits.rewind()
        return _read(self._logits, self._row).reshape(1, 1, -1)

    def _value(self, buffer: Any, dtype: Any, shape: tuple[int, ...]) -> JavaValue:
        return JavaValue(_over(self._environment, buffer, np.dtype(dtype), shape))


def _direct(size: int) -> Any:
    """Memory outside Java's heap, which onnxruntime uses where it lies."""
    return ByteBuffer.allocateDirect(size).order(ByteOrder.nativeOrder())


def _filled(array: Array) -> Any:
    buffer = _direct(array.nbytes)
    buffer.put(jarray(jbyte)(array.tobytes()))
    buffer.rewind()
    return buffer


def _over(environment: Any, buffer: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    """A tensor over a direct buffer's own memory."""
    typed = buffer.asLongBuffer() if dtype == np.int64 else buffer.asFloatBuffer()
    return OnnxTensor.createTensor(environment, typed, jarray(jlong)(shape))


def _read(buffer: Any, into: Any) -> Array:
    """The float32 numbers of a buffer from its position on, by way of a ``byte[]`` that is as large."""
    buffer.get(into)
    return np.frombuffer(bytes(into), np.float32)


def _map(values: dict[str, JavaValue]) -> Any:
    made = HashMap()
    for name, value in values.items():
        made.put(name, value.tensor)
    return made
