"""The default engine, Python's onnxruntime: the one file that imports it.

A graph runs in its CPU provider and is held to what the manifest says about it. Where a decoder was made for it, past and
present are the same memory, bound once: a token costs two graph runs (its embedding and the decoder) and one rebinding, that of
the attention mask, whose length says how much of the buffer is filled. Nothing of the cache is copied or allocated.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edgesafe.errors import BundleError
from edgesafe.format import graph_io
from edgesafe.format.files import sha256_file
from edgesafe.format.specs import GraphSpec, TextSpec
from edgesafe.machine import trim_heap
from edgesafe.runtime.decode import PART_TOKENS, room_for, shares_cache
from edgesafe.runtime.engine import DTYPES, Array, Graph, Reader, State
from edgesafe.runtime.turns import check_process

PROVIDERS = ("CPUExecutionProvider",)
_SPIN_US = "50"
_AS_REQUESTED = 1  # grow by what is asked for, not by powers of two
# Bytes of a cache from which on memory goes back between prompts of two lengths. It takes a millisecond or two: nothing beside
# such a prompt, and half as long as one of the reference model takes.
_LARGE = 2**25


class OnnxRuntime:
    """See `edgesafe.runtime.engine.Engine`."""

    name = "onnxruntime"
    providers = PROVIDERS

    @property
    def version(self) -> str:
        """The installed package's version."""
        return str(ort.__version__)

    @property
    def build(self) -> str:
        """The start of the sha256 of the libraries that compute: of one version there are many builds."""
        return _build()

    def open(self, path: str, spec: GraphSpec, threads: int) -> Graph:
        """See ``Engine``."""
        return OrtGraph(path, spec, threads)


class OrtGraph:
    """One graph in onnxruntime, fed only what the manifest says it wants."""

    def __init__(self, path: str, spec: GraphSpec, threads: int) -> None:
        self.wants = frozenset(tensor.name for tensor in spec.inputs)
        self.dtypes = {tensor.name: DTYPES[tensor.dtype] for tensor in spec.inputs}
        self.outputs = [tensor.name for tensor in spec.outputs]
        self._shares = shares_cache(spec)
        self._last = Last()
        self._process = os.getpid()
        try:
            options = session_options(threads, alone=self._shares)
            self._session = ort.InferenceSession(path, options, providers=list(PROVIDERS))
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
        with graph_errors(self._process):
            return dict(zip(self.outputs, self._session.run(self.outputs, wanted), strict=True))

    def advance(self, state: State) -> State:
        """A vision graph's one output from its one input; both stay onnxruntime's own and are not copied."""
        (name,) = self.wants
        with graph_errors(self._process):
            if isinstance(state, np.ndarray):
                state = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(state, self.dtypes[name]))
            (out,) = self._session.run_with_ort_values(self.outputs, {name: state})
        return out

    def share(self, embed: Graph, text: TextSpec, length: int) -> Reader | None:
        """A reader whose cache is one buffer, or None where the decoder's graph was not made for it."""
        if not self._shares or not isinstance(embed, OrtGraph):
            return None
        return SharedReader(embed._session, self._session, text, length, self._last)


@dataclass
class Last:
    """What a decoder has read last: new tokens in a run, and all tokens that they look at."""

    run: tuple[int, int] = (0, 0)


class SharedReader:
    """See `edgesafe.runtime.engine.Reader`.

    Args:
        embed: The opened ``embed_tokens`` graph.
        decoder: An opened decoder for which ``decode.shares_cache`` holds.
        text: Sizes of the language side.
        length: Tokens to make room for: the prompt's and the answer's.
        last: What this decoder's readers have read last, theirs to share.
    """

    def __init__(
        self,
        embed: ort.InferenceSession,
        decoder: ort.InferenceSession,
        text: TextSpec,
        length: int,
        last: Last | None = None,
    ) -> None:
        self._last = last or Last()
        self._text, self._embed, self._decoder = text, embed, decoder
        self._process = os.getpid()
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
        before, self._last.run = self._last.run, (parts[0].shape[1], self.length + embeds.shape[1])
        if before != self._last.run and sum(array.nbytes for array in self._cache.values()) >= _LARGE:
            self._make_way()
        return [self._run(_value(np.ascontiguousarray(part, np.float32)), part.shape[1]) for part in parts][-1]

    def read_token(self, token: int) -> Array:
        """See ``Reader``."""
        self.reserve(self.length + 1)
        self._token[0, 0] = token
        with graph_errors(self._process):
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

    def _make_way(self) -> None:
        """Give back what the last prompt worked in: its pieces are of other sizes, and would lie beside this one's."""
        check_process(self._process)
        with suppress(Exception):  # an application may have an allocator that can't; the prompt is read all the same
            self._embed.run_with_iobinding(self._embedding, _shrinking())  # any run would do; this is the shortest
        trim_heap()

    def _run(self, embeds: ort.OrtValue, tokens: int) -> Array:
        total = self.length + tokens
        with graph_errors(self._process):
            self._binding.bind_ortvalue_input(graph_io.INPUTS_EMBEDS, embeds)
            self._binding.bind_cpu_input(graph_io.ATTENTION_MASK, self._mask[:, :total])
            self._decoder.run_with_iobinding(self._binding)
        self.length = total
        return self._logits


@cache
def _shrinking() -> ort.RunOptions:
    """A run at whose end the arena gives back what nothing uses (onnxruntime_run_options_config_keys.h)."""
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _value(array: Array) -> ort.OrtValue:
    """The array's own memory as onnxruntime sees it; it keeps the array alive."""
    return ort.OrtValue.ortvalue_from_numpy(array)


@contextmanager
def graph_errors(process: int) -> Iterator[None]:
    """What onnxruntime raises while it runs a graph, as a ``BundleError``.

    Args:
        process: The number of the process that opened the graph.

    Raises:
        ClosedError: This is a fork of it, in which a run would wait for threads that aren't here.
    """
    check_process(process)
    try:
        yield
    except Exception as error:
        raise BundleError(f"onnxruntime can't run the graph: {error}", todo="export the bundle again") from error


def open_in_memory(graph: bytes, weights: Mapping[str, Array]) -> ort.InferenceSession:
    """A serialized graph, opened for a run or two, as parity checks do.

    Args:
        graph: The serialized model.
        weights: Initializers by name that the graph marks as external. They are used where they lie, not copied.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")  # it would copy every weight for one run
    if weights:
        options.add_external_initializers(list(weights), [_value(array) for array in weights.values()])
    return ort.InferenceSession(graph, options, providers=list(PROVIDERS))


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
def _build() -> str:
    """Of what this process has loaded, where Linux tells; a distribution keeps the library apart from the Python module."""
    try:
        maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError):
        maps = []
    loaded = {Path(parts[5]) for parts in maps if len(parts) == 6 and "x" in parts[1]}
    library = Path(ort.capi.onnxruntime_pybind11_state.__file__)
    digests = {sha256_file(path) for path in {library, *(p for p in loaded if "onnxruntime" in p.name)} if path.is_file()}
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:16]


def _leave_at_once() -> None:
    """In a fork: end the process without onnxruntime's own farewell, which waits for a thread that only the parent has.

    Python has ended in good order by then, and C's files are written out first. It takes glibc's ``on_exit``; elsewhere a child
    of ``os.fork`` ends with ``os._exit``, as those of multiprocessing do.
    """
    libc = ctypes.CDLL(None)
    with suppress(AttributeError):
        libc.on_exit(libc._exit, None)
        libc["__cxa_atexit"](libc.fflush, None, None)  # the last one registered runs first


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_leave_at_once)


@cache
def _share_arena() -> None:
    """One arena for the working memory of all graphs of this process; it keeps the largest that any of them used.

    An arena a graph keeps the largest of each. Without any, memory of some size goes back to the system after each operator and
    has to be fetched anew: a block of SmolVLM's tower took 1.3 to 1.5 times as long, with more memory at most.
    """
    where = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    with suppress(Exception):  # an application's own arena is as good, and without one the graphs run the same
        ort.create_and_register_allocator(where, ort.OrtArenaCfg({"arena_extend_strategy": _AS_REQUESTED}))
