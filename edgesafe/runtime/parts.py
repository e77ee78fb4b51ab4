"""A bundle's opened graphs, and the steps that answers are made of."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from PIL import Image

from edgesafe.errors import BundleError
from edgesafe.format import graph_io
from edgesafe.format.bundle import Bundle
from edgesafe.format.tiles import ALONE, Cut
from edgesafe.machine import on_cores
from edgesafe.runtime import decode
from edgesafe.runtime.decode import Array, Graph, Reader, State
from edgesafe.runtime.engine import Engine
from edgesafe.runtime.image import Picture
from edgesafe.runtime.tiles import join_tiles, picture_cut, pixel_values
from edgesafe.runtime.tokenizer import load_tokenizer


class Parts:
    """The graphs of a verified bundle and its tokenizer.

    Nothing here waits for its turn or looks at a certificate: whoever calls this beside a session's asks sees to both.

    Args:
        bundle: The bundle.
        engine: What opens the graphs.
        threads: Threads of each graph.
        cores: The cores that they stay on, or None.
    """

    def __init__(self, bundle: Bundle, engine: Engine, threads: int, cores: Sequence[int] | None) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.engine = engine
        self.threads = threads
        self._graphs: dict[str, Graph] = {}
        self.tokenizer = load_tokenizer(bundle.root / self.manifest.tokenizer)
        with on_cores(cores):
            self._eager()

    def graph(self, path: str) -> Graph:
        """A loaded graph by its path in the bundle."""
        if path not in self._graphs:
            where = str(self.bundle.graph_path(path))
            self._graphs[path] = self.engine.open(where, self.manifest.graphs[path], self.threads)
        return self._graphs[path]

    def cut(self, picture: Picture) -> Cut:
        """How a picture is cut into tiles; a bundle without tiles doesn't look at it."""
        return picture_cut(picture, self.manifest)

    def look(self, picture: Picture) -> State:
        """A picture's ``pixel_values`` float32 [1,3,H,W], or a list of them where the bundle has tiles."""
        return pixel_values(picture, self.manifest)

    def run_exits(self, pixels: State, depths: Collection[int], cut: Cut = ALONE) -> dict[int, Array]:
        """The image features float32 [N,D] of each asked exit from what ``look`` gave, shared segments run once."""
        done: dict[tuple[str, ...], State] = {(): pixels}
        features = {}
        for depth in sorted(depths):
            graphs = self.manifest.exit(depth).graphs
            for i, path in enumerate(graphs):
                if graphs[: i + 1] not in done:
                    done[graphs[: i + 1]] = self.run_vision_graph(path, done[graphs[:i]])
            features[depth] = self.joined(done[graphs], cut)
        return features

    def run_vision_graph(self, path: str, state: State) -> State:
        """One segment, head or whole exit: its one input is the picture or the state, its one output the next.

        A list of tiles runs one by one and gives a list.
        """
        graph = self.graph(path)
        return [decode.advance(graph, tile) for tile in state] if isinstance(state, list) else decode.advance(graph, state)

    def joined(self, state: State, cut: Cut) -> Array:
        """The image features float32 [N,D] of what the last vision graph gave."""
        if self.manifest.tiles is None:
            return decode.as_array(state)
        return join_tiles([decode.as_array(tile) for tile in state], cut, self.manifest.tiles)

    def prefill(self, features: Array, ids: list[int]) -> tuple[Array, dict[str, Array]]:
        """Read a whole prompt: its logits and its cache."""
        embeds = self.merged(features, ids)
        text = self.manifest.text
        return decode.step(self.graph(text.decoder), text, embeds, decode.empty_cache(text))

    def tokens(self, features: State, ids: list[int], limit: int, *, past_the_end: bool = False) -> Iterator[int]:
        """The answer's ids one by one, greedily; the first of them costs reading the prompt.

        ``past_the_end`` goes on after an end token, so that the work doesn't depend on what the model says.
        """
        text = replace(self.manifest.text, eos_token_ids=()) if past_the_end else self.manifest.text
        reader = self.reader(len(ids) + limit)
        yield from decode.generate(reader, reader.read(self.merged(features, ids)), text, limit, decode.argmax_token)

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
