"""One ONNX graph in onnxruntime's CPU provider, held to what the manifest says about it."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

import numpy as np
import onnxruntime as ort

from edgesafe.errors import BundleError
from edgesafe.format.manifest import GraphSpec, TextSpec
from edgesafe.runtime.decode import Array, Graph, Reader, State, shares_cache
from edgesafe.runtime.shared import SharedReader, graph_errors

_DTYPES = {"float32": np.float32, "int64": np.int64}
_SPIN_US = "50"
_AS_REQUESTED = 1  # grow by what is asked for, not by powers of two


class OrtGraph:
    """One graph in onnxruntime, fed only what the manifest says it wants."""

    def __init__(self, path: str, spec: GraphSpec, threads: int) -> None:
        self.wants = frozenset(tensor.name for tensor in spec.inputs)
        self.dtypes = {tensor.name: _DTYPES[tensor.dtype] for tensor in spec.inputs}
        self.outputs = [tensor.name for tensor in spec.outputs]
        self._shares = shares_cache(spec)
        try:
            options = session_options(threads, alone=self._shares)
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BundleError(f"onnxruntime can't load the graph: {error}", where=path) from error
        names = {tensor.name for tensor in self._session.get_inputs()}
        if names != self.wants or not set(self.outputs) <= {t.name for t in self._session.get_outputs()}:
            raise BundleError(
                "the graph's inputs or outputs are not those of the manifest",
                where=path,
                expected=f"inputs {sorted(self.wants)}, outputs {sorted(self.outputs)}",
                todo="export the bundle again",
            )

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Named arrays in, named arrays out."""
        missing = self.wants - feeds.keys()
        if missing:
            raise BundleError(f"the graph wants {sorted(missing)}, which this runtime doesn't know")
        wanted = {name: feeds[name].astype(self.dtypes[name], copy=False) for name in self.wants}
        with graph_errors():
            return dict(zip(self.outputs, self._session.run(self.outputs, wanted), strict=True))

    def advance(self, state: State) -> State:
        """A vision graph's one output from its one input; both stay onnxruntime's own and are not copied."""
        (name,) = self.wants
        with graph_errors():
            if isinstance(state, np.ndarray):
                state = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(state, self.dtypes[name]))
            (out,) = self._session.run_with_ort_values(self.outputs, {name: state})
        return out

    def share(self, embed: Graph, text: TextSpec, length: int) -> Reader | None:
        """A reader whose cache is one buffer, or None where the decoder's graph was not made for it."""
        if not self._shares or not isinstance(embed, OrtGraph):
            return None
        return SharedReader(embed._session, self._session, text, length)


def session_options(threads: int, *, alone: bool = False) -> ort.SessionOptions:
    """How every graph is opened.

    Args:
        threads: Threads of its own.
        alone: It runs many times without another graph of many threads in between, as a decoder does.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A chain is many graphs, each with threads of its own: those that wait must not keep the cores busy for those that
    # work. With 15 graphs on 2 cores the first token took 6.6 times as long with onnxruntime's own spinning. The decoder's
    # threads may wait awake for the next operator: a token took 0.84 times as long.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if alone else "0")
    options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_US)
    # A pattern plans one block for a whole run, which is larger than what the run needs at any moment.
    options.enable_mem_pattern = False
    # Weights stay outside the arena, so that a session that is closed gives their memory back.
    _share_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    return options


@cache
def _share_arena() -> None:
    """One arena for the working memory of all graphs of this process; it keeps the largest that any of them used.

    An arena a graph keeps the largest of each. Without any, memory of some size goes back to the system after each operator and
    has to be fetched anew: a block of SmolVLM's tower took 1.3 to 1.5 times as long, with more memory at most.
    """
    where = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    with suppress(Exception):  # an application's own arena is as good, and without one the graphs run the same
        ort.create_and_register_allocator(where, ort.OrtArenaCfg({"arena_extend_strategy": _AS_REQUESTED}))
