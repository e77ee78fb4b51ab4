"""Greedy decoding over the merged decoder: prefill and steps are one graph with a growing cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgesafe import graph_io
from edgesafe.bundle import TextSpec
from edgesafe.errors import BundleError

Array = npt.NDArray[Any]


class Graph(Protocol):
    """A loaded graph: named arrays in, named arrays out, and the input names that it wants."""

    wants: frozenset[str]

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Run once; feeds that the graph doesn't want are left out."""
        ...


def argmax_token(logits: Array) -> int:
    """The likeliest next token.

    Args:
        logits: [1,S,V]; the last of S is read.

    Raises:
        BundleError: A logit is not finite, where argmax would quietly return some token.

    >>> argmax_token(np.array([[[9.0, 0.0], [1.0, 2.0]]]))
    1
    """
    row = logits[0, -1]
    if not np.isfinite(row).all():
        raise BundleError("the decoder returned logits that are not finite", todo="export the bundle again")
    return int(row.argmax())


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


def merge_features(embed: Graph, ids: list[int], image_token_id: int, features: Array) -> Array:
    """The prompt's embeddings with the picture's features in the image token's places.

    Args:
        embed: The ``embed_tokens`` graph.
        ids: The prompt's S ids, N of them the image token.
        image_token_id: Its id.
        features: float32 [N,D].

    Returns:
        float32 [1,S,D].
    """
    tokens = np.array([ids], np.int64)
    where = tokens[0] == image_token_id
    if int(where.sum()) != features.shape[0]:
        raise BundleError(
            f"the vision graphs returned {features.shape[0]} image features",
            expected=f"{int(where.sum())}, one for each image token",
            todo="export the bundle again",
        )
    # The image token's own embedding is never used, and its id may lie outside the table.
    embeds = embed.run({graph_io.INPUT_IDS: np.where(tokens == image_token_id, 0, tokens)})
    merged = embeds[graph_io.INPUTS_EMBEDS].copy()
    merged[0, where] = features
    return merged


def greedy(embed: Graph, decoder: Graph, text: TextSpec, embeds: Array, max_new_tokens: int) -> Iterator[int]:
    """The answer's ids one by one, the end token included if it comes.

    Args:
        embed: The ``embed_tokens`` graph.
        decoder: The merged decoder.
        text: Sizes and end tokens of the language side.
        embeds: The prompt, float32 [1,S,D].
        max_new_tokens: At most this many ids; the context's end may come sooner.
    """
    room = min(max_new_tokens, text.context_length - embeds.shape[1])
    logits, cache = step(decoder, text, embeds, empty_cache(text))
    for made in range(1, room + 1):
        token = argmax_token(logits)
        yield token
        if token in text.eos_token_ids or made == room:
            return
        new = embed.run({graph_io.INPUT_IDS: np.array([[token]], np.int64)})[graph_io.INPUTS_EMBEDS]
        logits, cache = step(decoder, text, new, cache)
