"""The seam to whatever runs the graphs, so that another engine (Android's Java onnxruntime) can stand in for Python's.

An engine is two methods: ``open`` a graph file, ``run`` it on named arrays. What an opened graph can do beyond that, such as
running on bound buffers, is its own business: the code that would use it asks for it and does without where it is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from edgesafe.errors import BundleError, EdgesafeError
from edgesafe.format.manifest import GraphSpec
from edgesafe.runtime.decode import Array, Graph

_DTYPES = {"float32": np.float32, "int64": np.int64}


class Engine(Protocol):
    """Opens graphs. ``name`` and ``version`` go into certificates and measurements."""

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
            BundleError: The file is no graph that this engine can run.
        """
        ...


class OnnxRuntime:
    """The default: Python's onnxruntime, imported when its version is read or a graph opened, and by nothing else."""

    name = "onnxruntime"

    @property
    def version(self) -> str:
        """The installed package's version."""
        import onnxruntime

        return str(onnxruntime.__version__)

    def open(self, path: str, spec: GraphSpec, threads: int) -> Graph:
        """See ``Engine.open``."""
        from edgesafe.runtime.ort import OrtGraph

        return OrtGraph(path, spec, threads)


class RunnableGraph:
    """A graph of another engine, fed exactly what the manifest lists and held to give what it lists.

    Args:
        spec: The manifest's entry.
        run: Arrays by input name in, arrays by output name out; further outputs are left aside.
        where: The file, for messages.
    """

    def __init__(self, spec: GraphSpec, run: Callable[[dict[str, Array]], Mapping[str, Array]], where: str) -> None:
        self.wants = frozenset(tensor.name for tensor in spec.inputs)
        self._spec, self._run, self._where = spec, run, where

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Named arrays in, named arrays out.

        Raises:
            BundleError: An input or output is missing, or the engine failed.
        """
        wanted = {t.name: _DTYPES[t.dtype] for t in self._spec.inputs}
        missing = sorted(wanted.keys() - feeds.keys())
        if missing:
            raise BundleError(f"the graph wants {missing}, which this runtime doesn't know", where=self._where)
        try:
            out = self._run({name: feeds[name].astype(dtype, copy=False) for name, dtype in wanted.items()})
        except EdgesafeError:
            raise
        except Exception as error:
            raise BundleError(f"the graph failed: {type(error).__name__}: {error}", where=self._where) from error
        names = [tensor.name for tensor in self._spec.outputs]
        absent = sorted(set(names) - out.keys())
        if absent:
            raise BundleError(f"the graph gave no {absent}", where=self._where, todo="export the bundle again")
        return {name: np.asarray(out[name]) for name in names}
