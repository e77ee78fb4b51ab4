"""An engine in numpy: it runs the graphs of the bundle made by hand as handmade.py describes them, and needs no onnxruntime.

``NumpyEngine()`` is a plain function for each graph. ``NumpyEngine(in_place=True)`` has the two powers besides: a vision
graph's output is a value of its own (``Value``), and one buffer holds the cache. ``ran`` counts what was done.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from edgesafe.errors import BundleError
from edgesafe.runtime import Reader, RunnableGraph
from handmade import ANSWER, END_ID, FEATURES, HIDDEN, TOKENS, VOCAB, WIDTH, make_tokenizer


def next_tokens() -> dict[int, int]:
    """What the decoder says after each token."""
    ids = [*make_tokenizer().encode(":" + ANSWER).ids, END_ID]
    return dict(zip(ids, ids[1:], strict=False))


AFTER = next_tokens()


def run_vision(name: str, state: np.ndarray) -> np.ndarray:
    """One vision graph by its file's name."""
    if name == "head.onnx":
        out = np.zeros((FEATURES, HIDDEN), np.float32)
        out[:, -1] = state[0, 1:, 0]
        return out
    if name == "blocks_00-01.onnx":
        return np.full((1, TOKENS, WIDTH), state.mean() + 1, np.float32)
    return state + 1


def embedded(ids: np.ndarray) -> np.ndarray:
    return np.eye(VOCAB, HIDDEN, dtype=np.float32)[ids]


def logits_after(embeds: np.ndarray) -> np.ndarray:
    """[1,S,V] of one-hot embeddings [1,S,D]."""
    logits = np.zeros((*embeds.shape[:2], VOCAB), np.float32)
    for last, following in AFTER.items():
        logits[..., following] += embeds[..., last]
    return logits


class Value:
    """A state in the engine's own memory."""

    def __init__(self, array: np.ndarray, ran: Counter) -> None:
        self.array, self._ran = array, ran

    def numpy(self) -> np.ndarray:
        self._ran["copied out"] += 1
        return self.array


class OneBuffer:
    """A reader over one cache of embeddings, which are its keys and its values."""

    def __init__(self, length: int, ran: Counter) -> None:
        self.length, self._ran = 0, ran
        self.cache = np.zeros((1, length, HIDDEN), np.float32)

    def read(self, embeds: np.ndarray) -> np.ndarray:
        self._ran["read in place"] += 1
        end = self.length + embeds.shape[1]
        self.reserve(end)
        self.cache[:, self.length : end] = embeds
        self.length = end
        return logits_after(self.cache[:, end - 1 : end])

    def read_token(self, token: int) -> np.ndarray:
        return self.read(embedded(np.array([[token]])))

    def rewind(self, length: int) -> None:
        self.length = length

    def reserve(self, length: int) -> None:
        if length > self.cache.shape[1]:
            self.cache = np.concatenate([self.cache, np.zeros((1, length - self.cache.shape[1], HIDDEN), np.float32)], axis=1)


class NumpyEngine:
    """See the module."""

    name, version = "numpy-by-hand", "7"

    def __init__(self, *, in_place: bool = False) -> None:
        self.in_place, self.ran = in_place, Counter()

    def open(self, path, spec, threads) -> RunnableGraph:
        name = Path(path).name
        if not Path(path).is_file():
            raise BundleError("there is no such graph", where=path)
        work = {"embed_tokens.onnx": self._embed, "decoder_model_merged.onnx": self._decode}.get(name)

        def run(inputs):
            self.ran[f"run {Path(path).parent.name}"] += 1
            if work is not None:
                return work(inputs)
            (state,), (out,) = inputs.values(), spec.outputs
            return {out.name: run_vision(name, state)}

        def advance(state):
            self.ran["advanced"] += 1
            return Value(run_vision(name, state.array if isinstance(state, Value) else state), self.ran)

        powers = {"advance": advance, "share": self._share} if self.in_place else {}
        return RunnableGraph(spec, run, path, **powers)

    def _embed(self, inputs):
        self.ran["embedded"] += 1
        return {"inputs_embeds": embedded(inputs["input_ids"])}

    def _decode(self, inputs):
        self.ran["cache copied"] += 1
        embeds = inputs["inputs_embeds"]
        grown = {f"present.0.{kind}": np.concatenate([inputs[f"past_key_values.0.{kind}"], embeds[:, None]], axis=2)
                 for kind in ("key", "value")}  # fmt: skip
        return {"logits": logits_after(embeds), **grown}

    def _share(self, embed, text, length) -> Reader:
        self.ran["shared"] += 1
        return OneBuffer(length, self.ran)
