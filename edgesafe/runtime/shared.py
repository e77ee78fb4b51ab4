"""The decoder over one preallocated cache: past and present are the same memory, bound once.

A token costs two graph runs (its embedding and the decoder) and one rebinding, that of the attention mask, whose length says
how much of the buffer is filled. Nothing of the cache is copied or allocated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnxruntime as ort

from edgesafe.errors import BundleError
from edgesafe.format import graph_io
from edgesafe.format.manifest import TextSpec
from edgesafe.runtime.decode import Array

# A prompt is read in parts of about as many tokens: attention in onnxruntime computes a part's scores over all that was read,
# the part itself included, and masks the later ones afterwards.
PART_TOKENS = 200
# Room is made in steps, so that a conversation whose questions differ by a few tokens keeps its buffer.
_STEP_TOKENS = 64


def room_for(length: int, context_length: int) -> int:
    """Tokens to make room for: ``length`` rounded up, but no more than the context.

    >>> room_for(65, 4096), room_for(64, 4096), room_for(65, 100)
    (128, 64, 100)
    """
    return min(-(-length // _STEP_TOKENS) * _STEP_TOKENS, context_length)


class SharedReader:
    """See `edgesafe.runtime.decode.Reader`.

    Args:
        embed: The opened ``embed_tokens`` graph.
        decoder: An opened decoder for which ``decode.shares_cache`` holds.
        text: Sizes of the language side.
        length: Tokens to make room for: the prompt's and the answer's.
    """

    def __init__(self, embed: ort.InferenceSession, decoder: ort.InferenceSession, text: TextSpec, length: int) -> None:
        self._text, self._embed, self._decoder = text, embed, decoder
        self._token = np.zeros((1, 1), np.int64)
        self._logits = np.zeros((1, 1, text.vocab_size), np.float32)
        self._binding, self._embedding = decoder.io_binding(), embed.io_binding()
        self._one = _value(np.zeros((1, 1, text.hidden_size), np.float32))
        self._embedding.bind_ortvalue_input(graph_io.INPUT_IDS, _value(self._token))
        self._embedding.bind_ortvalue_output(graph_io.INPUTS_EMBEDS, self._one)
        self._binding.bind_ortvalue_output(graph_io.LOGITS, _value(self._logits))
        self._cache: dict[tuple[str, str], Array] = {}
        self.length = 0
        self.room = 0
        self.reserve(length)

    def read(self, embeds: Array) -> Array:
        """See ``Reader``."""
        self.reserve(self.length + embeds.shape[1])
        parts = np.array_split(embeds, -(-embeds.shape[1] // PART_TOKENS), axis=1)
        return [self._run(_value(np.ascontiguousarray(part, np.float32)), part.shape[1]) for part in parts][-1]

    def read_token(self, token: int) -> Array:
        """See ``Reader``."""
        self.reserve(self.length + 1)
        self._token[0, 0] = token
        with graph_errors():
            self._embed.run_with_iobinding(self._embedding)
        return self._run(self._one, 1)

    def rewind(self, length: int) -> None:
        """See ``Reader``. What lies behind is written over, not read."""
        self.length = length

    def reserve(self, length: int) -> None:
        """See ``Reader``; a larger buffer takes over what was read."""
        room = room_for(length, self._text.context_length)
        if room <= self.room:
            return
        self.room = room
        self._mask = np.ones((1, self.room), np.int64)
        shape = (1, self._text.num_kv_heads, self.room, self._text.head_dim)
        for i in range(self._text.num_layers):
            for past, present in (
                (graph_io.past_key(i), graph_io.present_key(i)),
                (graph_io.past_value(i), graph_io.present_value(i)),
            ):
                buffer = np.zeros(shape, np.float32)
                if self.length:
                    buffer[:, :, : self.length] = self._cache[past, present][:, :, : self.length]
                self._cache[past, present] = buffer
                self._binding.bind_ortvalue_input(past, _value(buffer))
                self._binding.bind_ortvalue_output(present, _value(buffer))

    def _run(self, embeds: ort.OrtValue, tokens: int) -> Array:
        total = self.length + tokens
        with graph_errors():
            self._binding.bind_ortvalue_input(graph_io.INPUTS_EMBEDS, embeds)
            self._binding.bind_cpu_input(graph_io.ATTENTION_MASK, self._mask[:, :total])
            self._decoder.run_with_iobinding(self._binding)
        self.length = total
        return self._logits


def _value(array: Array) -> ort.OrtValue:
    """The array's own memory as onnxruntime sees it; it keeps the array alive."""
    return ort.OrtValue.ortvalue_from_numpy(array)


@contextmanager
def graph_errors() -> Iterator[None]:
    """What onnxruntime raises while it runs a graph, as a ``BundleError``."""
    try:
        yield
    except Exception as error:
        raise BundleError(f"onnxruntime can't run the graph: {error}", todo="export the bundle again") from error
