"""Reading and answering with the merged decoder: prefill and steps are one graph with a cache.

A `Reader` is the decoder with what it has read. Where the graph and its engine can share one buffer between past and present
(`Graph.share`), tokens are written into it in place; else the cache goes in and comes out of every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from edgesafe.errors import BundleError
from edgesafe.format import graph_io
from edgesafe.format.specs import GraphSpec, TextSpec
from edgesafe.runtime.engine import Array, Graph, Reader, State, as_array
from edgesafe.runtime.sampling import last_row

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


def argmax_token(logits: Array) -> int:
    """The likeliest next token.

    Args:
        logits: [1,S,V]; the last of S is read.

    Raises:
        BundleError: A logit is not finite, where argmax would quietly return some token.

    >>> argmax_token(np.array([[[9.0, 0.0], [1.0, 2.0]]]))
    1
    """
    return int(last_row(logits).argmax())


def empty_cache(text: TextSpec) -> dict[str, Array]:
    """The cache before the first token: float32 [1,KVH,0,HD] for each layer's keys and values."""
    shape = (1, text.num_kv_heads, 0, text.head_dim)
    names = [name(i) for i in range(text.num_layers) for name in (graph_io.past_key, graph_io.past_value)]
    return {name: np.zeros(shape, np.float32) for name in names}


def step(decoder: Graph, text: TextSpec, embeds: Array, cache: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Read new tokens after the cached ones.

    Args:
        decoder: The merged decoder.
        text: Sizes of the language side.
        embeds: float32 [1,S,D].
        cache: ``past_key_values.*``, float32 [1,KVH,P,HD].

    Returns:
        Logits [1,S or 1,V] and the cache with S more tokens.
    """
    past = cache[graph_io.past_key(0)].shape[2]
    new = embeds.shape[1]
    feeds: dict[str, Array] = {
        graph_io.INPUTS_EMBEDS: embeds,
        graph_io.ATTENTION_MASK: np.ones((1, past + new), np.int64),
        graph_io.POSITION_IDS: np.arange(past, past + new, dtype=np.int64)[None],
        **cache,
    }
    out = decoder.run(feeds)
    grown = {}
    for i in range(text.num_layers):
        grown[graph_io.past_key(i)] = out[graph_io.present_key(i)]
        grown[graph_io.past_value(i)] = out[graph_io.present_value(i)]
    return out[graph_io.LOGITS], grown


class GrowingReader:
    """A reader over any engine's plain ``run``: the cache goes in and comes out one run longer."""

    def __init__(self, embed: Graph, decoder: Graph, text: TextSpec) -> None:
        self._embed, self._decoder, self._text = embed, decoder, text
        self._cache = empty_cache(text)
        self.length = 0

    def read(self, embeds: Array) -> Array:
        """See ``Reader``."""
        logits, self._cache = step(self._decoder, self._text, embeds, self._cache)
        self.length += embeds.shape[1]
        return logits

    def read_token(self, token: int) -> Array:
        """See ``Reader``."""
        return self.read(embed_ids(self._embed, np.array([[token]], np.int64)))

    def rewind(self, length: int) -> None:
        """See ``Reader``."""
        self._cache = {name: array[:, :, :length] for name, array in self._cache.items()}
        self.length = length

    def reserve(self, length: int) -> None:
        """Nothing to do: each run makes room for itself."""


def shares_cache(spec: GraphSpec) -> bool:
    """Whether a decoder may write its new tokens into the buffer that it reads the cache from.

    It says so by the names of its shapes: past and present have the same length. Its lengths come from the attention mask then,
    it takes no position ids, and it gives the last token's logits alone.
    """
    inputs = {tensor.name: tensor for tensor in spec.inputs}
    outputs = {tensor.name: tensor for tensor in spec.outputs}
    past, present = inputs.get(graph_io.past_key(0)), outputs.get(graph_io.present_key(0))
    if past is None or present is None or graph_io.LOGITS not in outputs:
        return False
    fits = past.shape == present.shape and all(isinstance(n, int) for n in outputs[graph_io.LOGITS].shape)
    return fits and graph_io.ATTENTION_MASK in inputs and graph_io.POSITION_IDS not in inputs


def open_reader(embed: Graph, decoder: Graph, text: TextSpec, length: int) -> Reader:
    """A reader with room for ``length`` tokens, over one shared buffer where the decoder and its engine can do that."""
    return decoder.share(embed, text, length) or GrowingReader(embed, decoder, text)


def embed_ids(embed: Graph, ids: Array) -> Array:
    """Embeddings float32 [1,S,D] of ids int64 [1,S]."""
    return embed.run({graph_io.INPUT_IDS: ids})[graph_io.INPUTS_EMBEDS]


def merge_features(embed: Graph, ids: list[int], image_token_id: int, features: State) -> Array:
    """The prompt's embeddings with the picture's features in the image token's places.

    Args:
        embed: The ``embed_tokens`` graph.
        ids: The prompt's S ids, N of them the image token.
        image_token_id: Its id.
        features: float32 [N,D].

    Returns:
        float32 [1,S,D].
    """
    tokens, features = np.array([ids], np.int64), as_array(features)
    where = tokens[0] == image_token_id
    if int(where.sum()) != features.shape[0]:
        raise BundleError(
            f"the vision graphs returned {features.shape[0]} image features",
            expected=f"{int(where.sum())}, one for each image token",
            todo="export the bundle again",
        )
    # The image token's own embedding is never used, and its id may lie outside the table.
    merged = embed_ids(embed, np.where(tokens == image_token_id, 0, tokens)).copy()
    merged[0, where] = features
    return merged


def generate(reader: Reader, logits: Array, text: TextSpec, max_new_tokens: int, pick: Callable[[Array], int]) -> Iterator[int]:
    """The answer's ids one by one, the end token included if it comes.

    Args:
        reader: It has read the prompt.
        logits: Its logits after that.
        text: Sizes and end tokens of the language side.
        max_new_tokens: At most this many ids; the context's end may come sooner.
        pick: The next token from logits [1,S or 1,V].
    """
    room = min(max_new_tokens, text.context_length - reader.length)
    for made in range(1, room + 1):
        token = pick(logits)
        yield token
        if token in text.eos_token_ids or made == room:
            return
        logits = reader.read_token(token)
