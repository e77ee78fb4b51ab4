"""What a bundle's manifest.json says, as frozen types that read strictly and write back the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from edgesafe.errors import BundleError, FormatVersionError, UnsupportedModelError
from edgesafe.format.chat import ChatSpec
from edgesafe.format.fields import Fields
from edgesafe.format.graph_io import TensorSpec
from edgesafe.format.sizes import MAX_CONTEXT, MAX_SIDE, check_sizes
from edgesafe.format.tiles import TilesSpec

# A bundle has the oldest format that says all of it: format 2 adds `tiles`, format 3 `chat.control`.
FORMAT_VERSION = 3
TILES_VERSION = 2
PLAIN_VERSION = 1
LAYOUTS = ("chain", "standalone")
DTYPES = ("float32", "int64")
RESIZES = ("shortest_edge", "exact", "none")
# PIL's numbers, which image processor configs use.
RESAMPLES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class ParentSpec:
    """What the bundle was made from: the checkpoint's kind, name and folder digest."""

    kind: str
    name: str
    digest: str


@dataclass(frozen=True)
class FileSpec:
    """The sha256 and size of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class ExitSpec:
    """One exit: how many blocks it runs and the graphs to run in order."""

    exit_depth: int
    graphs: tuple[str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One graph: inputs, outputs, weights' bytes, and operations a run (a decoder's: a token; None = unknown)."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    flops: int | None
    weight_bytes: int


@dataclass(frozen=True)
class TextSpec:
    """The language side: its two graphs' paths and the sizes that the cache needs."""

    embed_tokens: str
    decoder: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class SuiteRef:
    """The certification suite inside the bundle: its folder and digest."""

    path: str
    digest: str


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes ``pixel_values`` [1,3,height,width].

    ``resize`` is ``shortest_edge`` (``resize_to[0]`` is the edge), ``exact`` (``resize_to`` is height, width)
    or ``none``. Then a centre crop to height x width where ``center_crop``, then times ``rescale_factor``, minus
    ``mean``, over ``std``.
    """

    height: int
    width: int
    resize: str
    resize_to: tuple[int, int]
    resample: str
    center_crop: bool
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @staticmethod
    def from_hf(config: Mapping[str, Any]) -> ImageSpec:
        """The spec of a CLIP-like image processor's config (``CLIPImageProcessor.to_dict()``).

        Raises:
            UnsupportedModelError: The config does something that the runtime can't.

        Source: transformers ``image_processing_clip.py``.
        """
        size, crop = dict(config.get("size") or {}), dict(config.get("crop_size") or {})
        if config.get("do_resize", True) and size.get("shortest_edge"):
            resize, to = "shortest_edge", (int(size["shortest_edge"]),) * 2
        elif config.get("do_resize", True) and size.get("height") and size.get("width"):
            resize, to = "exact", (int(size["height"]), int(size["width"]))
        else:
            resize, to = "none", (0, 0)
        center_crop = bool(config.get("do_center_crop", bool(crop))) and bool(crop)
        final = (int(crop["height"]), int(crop["width"])) if center_crop else to
        if (resize != "exact" and not center_crop) or config.get("do_pad"):
            raise UnsupportedModelError(
                "the image processor does not lead to one fixed picture size",
                where="preprocessor_config.json",
                expected="a resize to height x width, or a resize and a centre crop; no padding",
            )
        normalise = bool(config.get("do_normalize", True))
        mean = tuple(map(float, config["image_mean"])) if normalise else (0.0, 0.0, 0.0)
        std = tuple(map(float, config["image_std"])) if normalise else (1.0, 1.0, 1.0)
        factor = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
        resample = RESAMPLES[int(config.get("resample", 3))]
        return ImageSpec(*final, resize, (to[0], to[1]), resample, center_crop, factor, _three(mean), _three(std))

    def to_dict(self) -> dict[str, Any]:
        """The manifest's ``image`` table."""
        table = asdict(self)
        return {"size": {"height": table.pop("height"), "width": table.pop("width")}, **_plain(table)}

    @staticmethod
    def read(fields: Fields) -> ImageSpec:
        """Read the manifest's ``image`` table strictly."""
        size = fields.child("size")
        resize_to, mean, std = fields.integers("resize_to"), fields.numbers("mean"), fields.numbers("std")
        if len(resize_to) != 2 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise BundleError("resize_to needs two numbers, mean and std three each, std above 0", where=fields.where)
        if not 0 <= min(resize_to) <= max(resize_to) <= MAX_SIDE:
            raise BundleError(f"resize_to is {list(resize_to)}", where=fields.where, expected=f"sides of 0 to {MAX_SIDE}")
        spec = ImageSpec(
            height=size.integer("height", 1, MAX_SIDE),
            width=size.integer("width", 1, MAX_SIDE),
            resize=fields.choice("resize", RESIZES),
            resize_to=(resize_to[0], resize_to[1]),
            resample=fields.choice("resample", tuple(RESAMPLES.values())),
            center_crop=fields.flag("center_crop"),
            rescale_factor=fields.number("rescale_factor"),
            mean=_three(mean),
            std=_three(std),
        )
        size.done()
        fields.done()
        if spec.resize != "none" and min(resize_to) < 1:
            raise BundleError("resize_to is 0", where=fields.where, expected="at least one pixel a side")
        if not spec.center_crop and (spec.resize != "exact" or resize_to != (spec.height, spec.width)):
            raise BundleError("the resize has another size", where=fields.where, expected="height x width or a centre crop")
        return spec


@dataclass(frozen=True)
class Manifest:
    """Everything that the runtime needs to know about a bundle; BUNDLE.md explains each key."""

    name: str
    family: str
    device: str
    layout: str
    parent: ParentSpec
    n_blocks: int
    reference_depth: int
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
    def format_version(self) -> int:
        """The oldest format that can say what this manifest says."""
        if self.chat.control:
            return FORMAT_VERSION
        return PLAIN_VERSION if self.tiles is None else TILES_VERSION

    @property
    def depths(self) -> tuple[int, ...]:
        """The ladder: every exit depth, ascending."""
        return tuple(e.exit_depth for e in self.exits)

    def exit(self, exit_depth: int) -> ExitSpec:
        """The exit of that depth.

        Raises:
            BundleError: The bundle has none.
        """
        for spec in self.exits:
            if spec.exit_depth == exit_depth:
                return spec
        raise BundleError(f"the bundle has no exit at depth {exit_depth}", expected=f"one of {list(self.depths)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` reads them back to an equal manifest."""
        obj: dict[str, Any] = _plain(asdict(self))
        obj["image"] = self.image.to_dict()
        obj["format_version"] = self.format_version
        if self.format_version < FORMAT_VERSION:
            del obj["chat"]["control"]
        if self.format_version == PLAIN_VERSION:
            del obj["tiles"]
        return obj

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
        _check(manifest, where)
        return manifest


def _read_manifest(fields: Fields, version: int) -> Manifest:
    parent = fields.child("parent")
    suite = fields.child("suite") if fields.has("suite") else None
    tiled = version == TILES_VERSION or (version > TILES_VERSION and fields.has("tiles"))
    manifest = Manifest(
        tiles=TilesSpec.read(fields.child("tiles")) if tiled else None,
        name=fields.text("name"),
        family=fields.text("family"),
        device=fields.text("device"),
        layout=fields.choice("layout", LAYOUTS),
        parent=ParentSpec(parent.text("kind"), parent.text("name"), parent.text("digest")),
        n_blocks=fields.integer("n_blocks", 1),
        reference_depth=fields.integer("reference_depth", 1),
        exits=tuple(ExitSpec(e.integer("exit_depth", 1), e.texts("graphs")) for e in fields.children("exits")),
        text=_read_text(fields.child("text")),
        graphs={path: _read_graph(fields.child("graphs").child(path)) for path in fields.table("graphs")},
        image=ImageSpec.read(fields.child("image")),
        image_token=fields.text("image_token"),
        image_token_id=fields.integer("image_token_id"),
        image_tokens=fields.integer("image_tokens", 1),
        chat=ChatSpec.read(fields.child("chat"), control=version > TILES_VERSION),
        quantization={k: fields.child("quantization").text(k) for k in fields.table("quantization")},
        files={path: _read_file(fields.child("files").child(path)) for path in fields.table("files")},
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


def _read_text(fields: Fields) -> TextSpec:
    spec = TextSpec(
        embed_tokens=fields.text("embed_tokens"),
        decoder=fields.text("decoder"),
        num_layers=fields.integer("num_layers", 1),
        num_kv_heads=fields.integer("num_kv_heads", 1),
        head_dim=fields.integer("head_dim", 1),
        hidden_size=fields.integer("hidden_size", 1),
        vocab_size=fields.integer("vocab_size", 1),
        context_length=fields.integer("context_length", 1, MAX_CONTEXT),
        eos_token_ids=fields.integers("eos_token_ids"),
    )
    fields.done()
    return spec


def _read_graph(fields: Fields) -> GraphSpec:
    spec = GraphSpec(
        inputs=tuple(map(_read_tensor, fields.children("inputs"))),
        outputs=tuple(map(_read_tensor, fields.children("outputs"))),
        flops=fields.integer("flops") if fields.has("flops") else None,
        weight_bytes=fields.integer("weight_bytes"),
    )
    fields.done()
    return spec


def _read_tensor(fields: Fields) -> TensorSpec:
    shape = fields.items("shape")
    if not all(isinstance(n, int | str) and not isinstance(n, bool) for n in shape):
        raise BundleError("a shape holds numbers and names", where=fields.where)
    spec = TensorSpec(fields.text("name"), fields.choice("dtype", DTYPES), tuple(shape))
    fields.done()
    return spec


def _read_file(fields: Fields) -> FileSpec:
    spec = FileSpec(fields.text("sha256"), fields.integer("bytes"))
    fields.done()
    return spec


def _check(manifest: Manifest, where: str) -> None:
    """Refuse a manifest whose parts don't fit each other."""
    depths = manifest.depths
    for path in manifest.files:
        if PurePosixPath(path).is_absolute() or ".." in path.split("/") or "\\" in path or path != path.strip("/"):
            raise BundleError(f"the path {path!r} leaves the bundle", where=where)
    if not depths or list(depths) != sorted(set(depths)) or depths[-1] > manifest.n_blocks:
        raise BundleError(f"exit depths {list(depths)} are not ascending within 1..{manifest.n_blocks}", where=where)
    if manifest.reference_depth not in depths:
        raise BundleError(f"the reference depth {manifest.reference_depth} is no exit", where=where)
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
    check_sizes(manifest, where)


def _three(values: tuple[float, ...]) -> tuple[float, float, float]:
    return values[0], values[1], values[2]


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down, so that what is written equals what is read."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise BundleError(f"{value} can't be written to a manifest", expected="finite numbers")
    return value
