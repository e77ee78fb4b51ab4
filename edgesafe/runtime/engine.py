"""The seam to whatever runs the graphs, so that another engine (Android's Java onnxruntime) can stand in for Python's.

An engine opens graph files, and a graph runs on named arrays. Two powers more save time and memory: ``advance`` hands a vision
graph's output on without a copy, and ``share`` reads and answers over one key-value cache in place. An engine that lacks them
answers the same, only slower: ``RunnableGraph`` makes a whole graph of one plain function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgesafe.errors import BundleError, EdgesafeError
from edgesafe.format.specs import GraphSpec, TextSpec

Array = npt.NDArray[Any]
DTYPES = {"float32": np.float32, "int64": np.int64}


class Held(Protocol):
    """A value that an engine keeps in memory of its own."""

    def numpy(self) -> Array:
        """Its numbers."""
        ...


# What goes from one vision graph to the next. A bundle with tiles has a list of them, which no engine sees.
State = Any  # Array | Held


class Reader(Protocol):
    """The language side with its memory; ``length`` is how many tokens it has read."""

    length: int

    def read(self, embeds: Array) -> Array:
        """Read embeddings, float32 [1,S,D], after what was read; the logits [1,S or 1,V] stand until the next read."""
        ...

    def read_token(self, token: int) -> Array:
        """Read one token by its id."""
        ...

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        ...

    def reserve(self, length: int) -> None:
        """Make room for so many tokens in all."""
        ...


class Graph(Protocol):
    """An opened graph: the names of the inputs that it wants, and all that may be done with it."""

    wants: frozenset[str]

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Named arrays in, named arrays out; feeds that the graph doesn't want are left out."""
        ...

    def advance(self, state: State) -> State:
        """A vision graph's one output from its one input; both may be the engine's own values."""
        ...

    def share(self, embed: Graph, text: TextSpec, length: int) -> Reader | None:
        """Of a decoder: a reader over one cache that is written in place.

        Args:
            embed: The ``embed_tokens`` graph, which the same engine opened.
            text: Sizes of the language side.
            length: Tokens to make room for: the prompt's and the answer's.

        Returns:
            None where the engine or this graph can't: then the cache goes in and comes out of every ``run``.
        """
        ...


class Engine(Protocol):
    """Opens graphs. ``name`` and ``version`` go into certificates and measurements.

    It may also have ``build``, a text that stands for the bytes of its program, and ``providers``, a tuple of texts; they go
    into certificates too.
    """

    @property
    def name(self) -> str:
        """The engine, e.g. ``onnxruntime``."""
        ...

    @property
    def version(self) -> str:
        """Its version: a measurement made with another one doesn't hold."""
        ...

    def open(self, path: str, spec: GraphSpec, threads: int) -> Graph:
        """A graph file, ready to run; ``RunnableGraph`` makes one of a plain function.

        Raises:
            BundleError: The file is not a graph that this engine can run.
        """
        ...


Run = Callable[[dict[str, Array]], Mapping[str, Array]]
Advance = Callable[[State], State]
Share = Callable[[Graph, TextSpec, int], Reader | None]


class RunnableGraph:
    """A graph of a plain function, fed exactly what the manifest lists and held to give what it lists.

    Args:
        spec: The manifest's entry.
        run: Arrays by input name in, arrays by output name out; further outputs are left aside.
        where: The file, for messages.
        advance: See ``Graph.advance``; by default one ``run``, with a copy.
        share: See ``Graph.share``; by default there is no shared cache.
    """

    def __init__(
        self, spec: GraphSpec, run: Run, where: str, *, advance: Advance | None = None, share: Share | None = None
    ) -> None:
        self.wants = frozenset(tensor.name for tensor in spec.inputs)
        self._spec, self._run, self._where = spec, run, where
        self._advance, self._share = advance, share

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Named arrays in, named arrays out.

        Raises:
            BundleError: An input or output is missing, or the engine failed.
        """
        wanted = {t.name: DTYPES[t.dtype] for t in self._spec.inputs}
        missing = sorted(wanted.keys() - feeds.keys())
        if missing:
            raise BundleError(f"the graph wants {missing}, which this runtime doesn't know", where=self._where)
        given = {name: feeds[name].astype(dtype, copy=False) for name, dtype in wanted.items()}
        out = self._held(lambda: self._run(given))
        names = [tensor.name for tensor in self._spec.outputs]
        absent = sorted(set(names) - out.keys())
        if absent:
            raise BundleError(f"the graph gave no {absent}", where=self._where, todo="export the bundle again")
        return {name: np.asarray(out[name]) for name in names}

    def advance(self, state: State) -> State:
        """See ``Graph``."""
        direct = self._advance
        if direct is not None:
            return self._held(lambda: direct(state))
        (out,) = self.run(dict.fromkeys(self.wants, as_array(state))).values()
        return out

    def share(self, embed: Graph, text: TextSpec, length: int) -> Reader | None:
        """See ``Graph``."""
        shared = self._share
        return None if shared is None else self._held(lambda: shared(embed, text, length))

    def _held(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except EdgesafeError:
            raise
        except Exception as error:
            raise BundleError(f"the graph failed: {type(error).__name__}: {error}", where=self._where) from error


def as_array(state: State) -> Array:
    """A state's numbers; the array stays good when the state is gone."""
    return state if isinstance(state, np.ndarray) else np.array(state.numpy())
