"""An opened bundle: its graphs, the steps of an answer, what was learned about its times, and the line of requests."""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

from PIL import Image

from edgesafe.device import profile_of
from edgesafe.errors import BundleError
from edgesafe.format import graph_io
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import Certificate, certified_exits
from edgesafe.format.exits import Exit
from edgesafe.format.tiles import ALONE, Cut
from edgesafe.machine import on_cores
from edgesafe.runtime import decode
from edgesafe.runtime.calibrate import Correction
from edgesafe.runtime.deadline import Clock
from edgesafe.runtime.engine import Array, Engine, Graph, Reader, State, as_array
from edgesafe.runtime.forecast import Forecast
from edgesafe.runtime.image import Picture
from edgesafe.runtime.scope import scope_of
from edgesafe.runtime.standing import standing
from edgesafe.runtime.threads import Tuning, forecast, tune
from edgesafe.runtime.tiles import join_tiles, picture_cut, pixel_values
from edgesafe.runtime.tokenizer import load_tokenizer
from edgesafe.runtime.turns import WAIT, Turns


class Talk(Protocol):
    """Something that keeps a cache of the decoder's, which closing frees."""

    def forget(self) -> None:
        """Free it."""
        ...


class OpenedBundle:
    """A verified bundle, its certificate and its graphs, shared by all requests.

    No step here waits for its turn or looks at a certificate: whoever calls one beside a session's requests sees to both.

    Args:
        bundle: The bundle.
        certificate: Its certificate, or None.
        threads: Threads of each graph; by default those that were measured to be best here, else the profile's.
        tuning: Threads and cores that were found before; then ``threads`` plays no part.
        allow_uncertified: Let every request use an exit without a passed verdict.
        note: What each answer's caller should know.
        engine: What opens the graphs; by default Python's onnxruntime.
        when_busy: What a request does while another one runs: ``wait`` or ``refuse``.
        clock: Seconds of a clock that never goes back.
    """

    def __init__(
        self,
        bundle: Bundle,
        certificate: Certificate | None,
        *,
        threads: int | None = None,
        tuning: Tuning | None = None,
        allow_uncertified: bool = False,
        note: str = "",
        engine: Engine | None = None,
        when_busy: str = WAIT,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.bundle, self.manifest = bundle, bundle.manifest
        self.engine = engine or default_engine()
        self.certificate, self.scope = certificate, scope_of(certificate)
        self.standing = standing(bundle, certificate, self.engine)
        self.certified = self.standing.exits
        self.allow_uncertified = allow_uncertified
        self.profile = profile_of(bundle)
        self.tuning = tuning or tune(bundle, self.profile, threads, self.engine)
        self.threads = self.tuning.threads
        self.correction = Correction()
        self.runs: Counter[str] = Counter()  # how often each stage has run
        self.clock = clock
        self._note = note
        self._forecasts: dict[tuple[int, int], Forecast] = {}
        self.turns = Turns(when_busy)
        self.handing_over = threading.Lock()
        self.worker = ThreadPoolExecutor(1, "edgesafe-ask")  # its thread starts with the first ask_async
        # Those that hold a cache of the decoder's, which close frees; they enter while it is their turn.
        self.talks: weakref.WeakSet[Talk] = weakref.WeakSet()
        self._graphs: dict[str, Graph] = {}
        self.tokenizer = load_tokenizer(bundle.root / self.manifest.tokenizer)
        with on_cores(self.tuning.cores):
            self._eager()
        _opened.add(self)

    def close(self) -> None:
        """Free the graphs and end what runs or waits (``ClosedError``), from any thread; twice does nothing.

        In a fork of the process that opened them it only ends the use of this copy.
        """
        self.turns.close()
        if self.turns.forked:
            return
        self._graphs.clear()
        for talk in list(self.talks):
            talk.forget()
        self.worker.shutdown(wait=False)

    def graph(self, path: str) -> Graph:
        """A loaded graph by its path in the bundle.

        Raises:
            ClosedError: It was closed, or opened in another process.
        """
        self.turns.check_open()
        if path not in self._graphs:
            where = str(self.bundle.graph_path(path))
            self._graphs[path] = self.engine.open(where, self.manifest.graphs[path], self.threads)
        return self._graphs[path]

    def predict(self, prompt_tokens: int, tiles: int = 1) -> Forecast:
        """The stages' times, from this machine's measurement or else from the profile."""
        key = (prompt_tokens, tiles)
        if key not in self._forecasts:
            found = forecast(self.bundle, self.tuning, self.profile, prompt_tokens)
            self._forecasts[key] = found.tiled(tiles)
        return self._forecasts[key]

    def notes(self, exit: Exit, prediction: Forecast, outside: Sequence[str] = ()) -> str:
        """What an answer's caller should know; ``outside`` is why the exit's verdict doesn't speak for it."""
        notes = [self._note, prediction.note]
        if exit not in self.certified:
            passed = exit in certified_exits(self.certificate)
            why = self.standing.why if passed else "its answers were not shown to be safe"
            notes.insert(0, f"exit {exit} is NOT certified{' on this machine' if passed else ''}: {why}")
        elif outside:
            notes.insert(0, f"NOT certified: the answer {' and '.join(outside)}, but exits are certified on {self.scope}")
        return "; ".join(note for note in notes if note)

    def cut(self, picture: Picture, exit: Exit | None = None) -> Cut:
        """How a picture is cut into tiles at an exit, by default all; a bundle without tiles doesn't look at it."""
        return picture_cut(picture, self.manifest, exit)

    def look(self, picture: Picture, exit: Exit | None = None) -> State:
        """A picture's ``pixel_values`` float32 [1,3,H,W], or a list of them where the bundle has tiles."""
        return pixel_values(picture, self.manifest, exit)

    def run_exits(self, pixels: State, exits: Collection[Exit | int | str], cut: Cut = ALONE) -> dict[Exit, Array]:
        """The image features float32 [N,D] of each asked exit from what ``look`` gave, shared segments run once.

        All of them see a picture in as many tiles.
        """
        done: dict[tuple[str, ...], State] = {(): pixels}
        features = {}
        for exit in sorted(map(Exit.of, exits)):
            graphs = self.manifest.exit(exit).graphs
            for i, path in enumerate(graphs):
                if graphs[: i + 1] not in done:
                    done[graphs[: i + 1]] = self.run_vision_graph(path, done[graphs[:i]])
            features[exit] = self.joined(done[graphs], cut)
        return features

    def run_vision_graph(self, path: str, state: State) -> State:
        """One segment, head or whole exit: its one input is the picture or the state, its one output the next.

        A list of tiles runs one by one and gives a list.
        """
        graph = self.graph(path)
        return [graph.advance(tile) for tile in state] if isinstance(state, list) else graph.advance(state)

    def joined(self, state: State, cut: Cut) -> Array:
        """The image features float32 [N,D] of what the last vision graph gave."""
        if self.manifest.tiles is None:
            return as_array(state)
        return join_tiles([as_array(tile) for tile in state], cut, self.manifest.tiles)

    def prefill(self, features: Array, ids: list[int]) -> tuple[Array, dict[str, Array]]:
        """Read a whole prompt: its logits and its cache."""
        embeds = self.merged(features, ids)
        text = self.manifest.text
        return decode.step(self.graph(text.decoder), text, embeds, decode.empty_cache(text))

    def tokens(
        self,
        features: State,
        ids: list[int],
        limit: int,
        pick: Callable[[Array], int] = decode.argmax_token,
        *,
        past_the_end: bool = False,
    ) -> Iterator[int]:
        """The answer's ids one by one, by default greedily; the first of them costs reading the prompt.

        ``past_the_end`` continues after an end token, so that the work doesn't depend on what the model says.
        """
        text = replace(self.manifest.text, eos_token_ids=()) if past_the_end else self.manifest.text
        reader = self.reader(len(ids) + limit)
        yield from decode.generate(reader, reader.read(self.merged(features, ids)), text, limit, pick)

    def reader(self, length: int) -> Reader:
        """The language side before its first token, with room for so many."""
        text = self.manifest.text
        return decode.open_reader(self.graph(text.embed_tokens), self.graph(text.decoder), text, length)

    def merged(self, features: State, ids: list[int]) -> Array:
        """A prompt's embeddings [1,S,D] with the picture's features [N,D] in their places."""
        embed = self.graph(self.manifest.text.embed_tokens)
        return decode.merge_features(embed, ids, self.manifest.image_token_id, features)

    def _eager(self) -> None:
        """Load at once what any answer needs, so that the first question isn't slower than the next.

        A chain's segments hold each weight once; standalone exits would hold it again for every exit, so these
        are loaded when first used.
        """
        Image.preinit()
        paths = [self.manifest.text.embed_tokens, self.manifest.text.decoder]
        if self.manifest.layout == "chain":
            paths += [path for spec in self.manifest.exits for path in spec.graphs]
        for path in paths:
            self.graph(path)
        wanted = {graph_io.INPUTS_EMBEDS, graph_io.ATTENTION_MASK, graph_io.POSITION_IDS}
        unknown = self.graph(paths[1]).wants - wanted - decode.empty_cache(self.manifest.text).keys()
        if unknown:
            raise BundleError(f"the decoder wants {sorted(unknown)}, which this runtime doesn't know")


def default_engine() -> Engine:
    """Python's onnxruntime."""
    # Here and not above: whoever brings an engine of his own needs no onnxruntime.
    from edgesafe.runtime.ort import OnnxRuntime

    return OnnxRuntime()


_opened: weakref.WeakSet[OpenedBundle] = weakref.WeakSet()


def _keep_graphs() -> None:
    """In a fork: never free the parent's graphs. Their threads don't live here, and freeing would wait for them forever."""
    for opened in list(_opened):
        for graph in opened._graphs.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(graph))


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_keep_graphs)
