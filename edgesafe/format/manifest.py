"""What a bundle's manifest.json says, as frozen types that read strictly and write back the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from edgesafe.errors import BundleError, ConfigError, FormatVersionError
from edgesafe.format import graph_io
from edgesafe.format.chat import ChatSpec
from edgesafe.format.exits import Exit, pool_windows, read_exit
from edgesafe.format.fields import Fields
from edgesafe.format.graph_io import TensorSpec
from edgesafe.format.specs import (
    ExitSpec,
    FileSpec,
    GraphSpec,
    ImageSpec,
    ParentSpec,
    SuiteRef,
    TextSpec,
    plain,
    read_file,
    read_graph,
    read_text,
)
from edgesafe.format.tiles import ALONE, PICTURE, Cut, TilesSpec, at_most, caps, cut_of, most_tiles

# Format 2 added `tiles`, format 3 `chat.control` and exits by text, format 4 exits with fewer visual tokens, format 5 those
# with fewer tiles. Earlier ones are read, and a bundle without such exits is still written as format 3.
FORMAT_VERSION = 5
TOKENS_VERSION, TEXT_VERSION, TILES_VERSION = 4, 3, 2
LAYOUTS = ("chain", "standalone")


@dataclass(frozen=True)
class Manifest:
    """Everything that the runtime needs to know about a bundle; BUNDLE.md explains each key."""

    name: str
    family: str
    device: str
    layout: str
    parent: ParentSpec
    n_blocks: int
    reference: Exit
    exits: tuple[ExitSpec, ...]
    text: TextSpec
    graphs: dict[str, GraphSpec]
    image: ImageSpec
    image_token: str
    image_token_id: int
    image_tokens: int
    chat: ChatSpec
    quantization: dict[str, str]
    files: dict[str, FileSpec]
    tokenizer: str = "tokenizer.json"
    parity: dict[str, Any] = field(default_factory=dict)
    suite: SuiteRef | None = None
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    tiles: TilesSpec | None = None

    @property
    def ladder(self) -> tuple[Exit, ...]:
        """Every exit, ascending."""
        return tuple(spec.exit for spec in self.exits)

    def exit(self, exit: Exit) -> ExitSpec:
        """What the bundle has for an exit.

        Raises:
            BundleError: It has no such exit.
        """
        for spec in self.exits:
            if spec.exit == exit:
                return spec
        raise BundleError(f"the bundle has no exit {exit}", expected="one of " + ", ".join(map(str, self.ladder)))

    def tokens_of(self, exit: Exit) -> int:
        """Image tokens of a picture, or of a tile, at an exit."""
        return exit.visual_tokens or self.image_tokens

    def tiles_of(self, exit: Exit | None) -> TilesSpec | None:
        """How an exit's picture is cut, of which there may be fewer tiles; without one as the family cuts it."""
        if self.tiles is None or exit is None or exit.tiles is None:
            return self.tiles
        return at_most(self.tiles, self.image.height, exit.tiles)

    def told_cut(self, exit: Exit) -> Cut:
        """How an exit cuts the picture that times are told for: `PICTURE` where exits differ in tiles, else one of one tile."""
        tiles = self.tiles_of(exit)
        if tiles is None or all(one.tiles is None for one in self.ladder):
            return ALONE
        return cut_of(tiles, self.image.height, PICTURE)

    @property
    def by_cost(self) -> tuple[Exit, ...]:
        """Every exit, ascending by what it computes: its graphs' operations and the decoder's over its image tokens.

        It is the order in which exits are preferred, and backwards the one in which they are certified. Without fewer visual
        tokens or tiles it is that of the depths.
        """
        known = [self.graphs[path].flops is not None for spec in self.exits for path in (*spec.graphs, self.text.decoder)]
        if all(exit.whole for exit in self.ladder) or not all(known):
            return self.ladder
        return tuple(spec.exit for spec in sorted(self.exits, key=lambda spec: (self._operations(spec), spec.exit)))

    def _operations(self, spec: ExitSpec) -> int:
        """One picture's at an exit, in as many tiles as it may have, the words around it left out: they hardly differ."""
        decoder = self.tokens_of(spec.exit) * (self.graphs[self.text.decoder].flops or 0)
        tiles = self.tiles_of(spec.exit)
        times = most_tiles(tiles, self.image.height) if tiles is not None else 1
        return times * (decoder + sum(self.graphs[path].flops or 0 for path in spec.graphs))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` reads them back to an equal manifest."""
        obj: dict[str, Any] = plain(asdict(self))
        obj["image"] = self.image.to_dict()
        obj["reference"] = str(self.reference)
        obj["exits"] = [{"exit": str(spec.exit), "graphs": list(spec.graphs)} for spec in self.exits]
        return {**obj, "format_version": max(map(_version_of, self.ladder))}

    @staticmethod
    def from_dict(obj: Mapping[str, Any], *, where: str = "manifest.json") -> Manifest:
        """Read strictly.

        Raises:
            BundleError: A key is missing, unknown, of a wrong type, or points at nothing.
            FormatVersionError: The format is newer than this edgesafe.
        """
        fields = Fields(obj, where, BundleError)
        version = fields.integer("format_version", 1)
        if version > FORMAT_VERSION:
            raise FormatVersionError(
                f"the bundle has format {version}",
                where=where,
                expected=f"format {FORMAT_VERSION} or older",
                todo="upgrade: pip install --upgrade edgesafe",
            )
        manifest = _read_manifest(fields, version)
        fields.done()
        _check(manifest, version, where)
        return manifest


def _version_of(exit: Exit) -> int:
    """The format that an exit is written in, the earliest one that knows such exits."""
    if exit.tiles is not None:
        return FORMAT_VERSION
    return TEXT_VERSION if exit.visual_tokens is None else TOKENS_VERSION


def _read_manifest(fields: Fields, version: int) -> Manifest:
    parent = fields.child("parent")
    suite = fields.child("suite") if fields.has("suite") else None
    tiled = version == TILES_VERSION or (version > TILES_VERSION and fields.has("tiles"))
    by_depth = version <= TILES_VERSION
    manifest = Manifest(
        tiles=TilesSpec.read(fields.child("tiles")) if tiled else None,
        name=fields.text("name"),
        family=fields.text("family"),
        device=fields.text("device"),
        layout=fields.choice("layout", LAYOUTS),
        parent=ParentSpec(parent.text("kind"), parent.text("name"), parent.text("digest")),
        n_blocks=fields.integer("n_blocks", 1),
        reference=read_exit(fields, "reference", by_depth=by_depth),
        exits=tuple(_read_exit_spec(child, by_depth=by_depth) for child in fields.children("exits")),
        text=read_text(fields.child("text")),
        graphs={path: read_graph(fields.child("graphs").child(path)) for path in fields.table("graphs")},
        image=ImageSpec.read(fields.child("image")),
        image_token=fields.text("image_token"),
        image_token_id=fields.integer("image_token_id"),
        image_tokens=fields.integer("image_tokens", 1),
        chat=ChatSpec.read(fields.child("chat"), control=version > TILES_VERSION),
        quantization={k: fields.child("quantization").text(k) for k in fields.table("quantization")},
        files={path: read_file(fields.child("files").child(path)) for path in fields.table("files")},
        tokenizer=fields.text("tokenizer"),
        parity=fields.table("parity"),
        suite=SuiteRef(suite.text("path"), suite.text("digest")) if suite else None,
        seed=fields.integer("seed"),
        config=fields.table("config"),
        versions={k: fields.child("versions").text(k) for k in fields.table("versions")},
        created=fields.text("created"),
    )
    for child in (parent, *([suite] if suite else [])):
        child.done()
    return manifest


def _read_exit_spec(fields: Fields, *, by_depth: bool) -> ExitSpec:
    spec = ExitSpec(read_exit(fields, by_depth=by_depth), fields.texts("graphs"))
    fields.done()
    return spec


def _check(manifest: Manifest, version: int, where: str) -> None:
    """Refuse a manifest whose parts don't fit each other."""
    ladder = manifest.ladder
    for path in manifest.files:
        if PurePosixPath(path).is_absolute() or ".." in path.split("/") or "\\" in path or path != path.strip("/"):
            raise BundleError(f"the path {path!r} leaves the bundle", where=where)
    named = ", ".join(map(str, ladder))
    if not ladder or list(ladder) != sorted(set(ladder)) or ladder[-1].depth > manifest.n_blocks:
        raise BundleError(f"the exits {named} are not ascending within 1..{manifest.n_blocks}", where=where)
    if later := [exit for exit in ladder if not exit.whole and _version_of(exit) > version]:
        kind = "visual tokens" if later[0].tiles is None else "tiles"
        expected = f"depths{', or visual tokens,' if version == TOKENS_VERSION else ''} alone in format {version}"
        raise BundleError(f"exit {later[0]} of {named} has fewer {kind}", where=where, expected=expected)
    if manifest.reference not in ladder:
        raise BundleError(f"the reference {manifest.reference} is not one of the exits {named}", where=where)
    needed = {path for e in manifest.exits for path in e.graphs} | {
        manifest.text.embed_tokens,
        manifest.text.decoder,
    }
    for path in sorted(needed):
        if path not in manifest.graphs or path not in manifest.files:
            raise BundleError(f"the graph {path!r} is not described under both graphs and files", where=where)
    if manifest.tokenizer not in manifest.files:
        raise BundleError(f"the tokenizer {manifest.tokenizer!r} is not under files", where=where)
    if manifest.chat.prefix.count(manifest.image_token) != 1 or manifest.image_token in manifest.chat.suffix:
        raise BundleError("the chat prefix must hold the image token exactly once", where=where)
    if manifest.tiles is not None:
        tile = (manifest.image.height, manifest.image.width)
        if manifest.image.resize != "exact" or manifest.image.center_crop:
            raise BundleError("tiles are resized to another size", where=where, expected="resize exact, no centre crop")
        manifest.tiles.check(manifest.image_token, manifest.image_tokens, tile, f"{where}: tiles")
    if not all(e.graphs for e in manifest.exits):
        raise BundleError("an exit lists no graphs", where=where)
    if manifest.suite and f"{manifest.suite.path}/suite.json" not in manifest.files:
        raise BundleError(f"the suite {manifest.suite.path!r} is not under files", where=where)
    _check_sizes(manifest, where)


def _check_sizes(manifest: Manifest, where: str) -> None:
    """Refuse sizes that are not those of the graphs.

    Raises:
        BundleError: A graph lacks an input or output, or a size differs from the one in its shapes.
    """
    text, image = manifest.text, manifest.image
    for spec in manifest.exits:
        graphs = [manifest.graphs[path] for path in spec.graphs]
        for path, graph in zip(spec.graphs, graphs, strict=True):
            if len(graph.inputs) != 1 or len(graph.outputs) != 1:
                raise BundleError(f"the graph {path!r} needs one input and one output", where=where)
        _same(graphs[0].inputs[0], (1, 3, image.height, image.width), where)
        rows = manifest.image_tokens + (manifest.tiles is not None and manifest.tiles.newline)
        if spec.exit.visual_tokens is not None:
            _check_fewer(manifest, spec, where)
            _same(graphs[-1].outputs[0], (spec.exit.visual_tokens, text.hidden_size), where)
            graphs = graphs[:-1]
        if spec.exit.tiles is not None:
            _check_tiles(manifest, spec, where)
        _same(graphs[-1].outputs[0], (rows, text.hidden_size), where)
    embed, decoder = manifest.graphs[text.embed_tokens], manifest.graphs[text.decoder]
    # Counted before a list of that length is made.
    if 2 * text.num_layers + 1 > len(decoder.inputs) or manifest.image_tokens >= text.context_length:
        raise BundleError("num_layers or image_tokens is larger than the graphs allow", where=where)
    if {tensor.name for tensor in embed.inputs} != {graph_io.INPUT_IDS}:
        raise BundleError(f"the graph {text.embed_tokens!r} needs input_ids alone", where=where)
    _has(embed.outputs, graph_io.INPUTS_EMBEDS, (1, "S", text.hidden_size), where)
    _has(decoder.inputs, graph_io.INPUTS_EMBEDS, (1, "S", text.hidden_size), where)
    _has(decoder.outputs, graph_io.LOGITS, (1, "S", text.vocab_size), where)
    cache = (1, text.num_kv_heads, "P", text.head_dim)
    for i in range(text.num_layers):
        for name in (graph_io.past_key(i), graph_io.past_value(i)):
            _has(decoder.inputs, name, cache, where)
        for name in (graph_io.present_key(i), graph_io.present_value(i)):
            _has(decoder.outputs, name, cache, where)


def _check_fewer(manifest: Manifest, spec: ExitSpec, where: str) -> None:
    """Refuse an exit with fewer visual tokens that no picture of this bundle can have, or that runs other blocks.

    Raises:
        BundleError: It is refused.
    """
    if manifest.tiles is not None:
        raise BundleError(f"exit {spec.exit} has fewer visual tokens, and pictures are cut into tiles", where=where)
    try:
        pool_windows(manifest.image_tokens, manifest.tokens_of(spec.exit))
    except ConfigError as error:
        raise BundleError(error.what, where=where, expected=error.expected) from error
    _check_way(manifest, spec, where, "the graphs of the other exits of its depth, and one more that averages tokens")


def _check_tiles(manifest: Manifest, spec: ExitSpec, where: str) -> None:
    """Refuse an exit with fewer tiles that no picture of this bundle can have, or that runs other blocks.

    Raises:
        BundleError: It is refused.
    """
    known = caps(manifest.tiles, manifest.image.height) if manifest.tiles is not None else []
    if spec.exit.tiles not in known:
        expected = f"one of {', '.join(map(str, known))} tiles" if known else "no tiles: pictures aren't cut into any"
        raise BundleError(f"exit {spec.exit} has fewer tiles than a picture can have", where=where, expected=expected)
    _check_way(manifest, spec, where, "the graphs of the other exits of its depth")


def _check_way(manifest: Manifest, spec: ExitSpec, where: str, expected: str) -> None:
    ways = {other.trunk for other in manifest.exits if other.exit.depth == spec.exit.depth}
    if len(ways) != 1 or not spec.trunk:
        raise BundleError(f"exit {spec.exit} runs other graphs than its depth", where=where, expected=expected)


def _has(tensors: tuple[TensorSpec, ...], name: str, shape: tuple[int | str, ...], where: str) -> None:
    found = [tensor for tensor in tensors if tensor.name == name]
    if len(found) != 1:
        raise BundleError(f"the text graphs have {len(found)} tensors {name!r}", where=where, expected="one")
    _same(found[0], shape, where)


def _same(tensor: TensorSpec, shape: tuple[int | str, ...], where: str) -> None:
    """Refuse a shape that isn't this one; a text on either side stands for any size."""
    pairs = zip(tensor.shape, shape, strict=False)
    if len(tensor.shape) != len(shape) or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
        raise BundleError(f"{tensor.name} is {list(tensor.shape)} in its graph", where=where, expected=f"{list(shape)}")
