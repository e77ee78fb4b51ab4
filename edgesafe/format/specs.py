"""The parts of a manifest: frozen types that read strictly. BUNDLE.md explains each key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgesafe.errors import BundleError, UnsupportedModelError
from edgesafe.format.exits import Exit
from edgesafe.format.fields import Fields
from edgesafe.format.graph_io import MAX_CONTEXT, MAX_SIDE, TensorSpec

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
    """One exit and the graphs to run for it, in order; of one with fewer visual tokens the last averages tokens."""

    exit: Exit
    graphs: tuple[str, ...]

    @property
    def trunk(self) -> tuple[str, ...]:
        """The graphs up to all image features, which all exits of its depth run."""
        return self.graphs if self.exit.visual_tokens is None else self.graphs[:-1]


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
        return {"size": {"height": table.pop("height"), "width": table.pop("width")}, **plain(table)}

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
            raise BundleError("resize_to is 0", where=fields.where, expected="at least one pixel per side")
        if not spec.center_crop and (spec.resize != "exact" or resize_to != (spec.height, spec.width)):
            raise BundleError("the resize has another size", where=fields.where, expected="height x width or a centre crop")
        return spec


def _three(values: tuple[float, ...]) -> tuple[float, float, float]:
    return values[0], values[1], values[2]


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down, so that what is written equals what is read."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise BundleError(f"{value} can't be written to a manifest", expected="finite numbers")
    return value


def read_text(fields: Fields) -> TextSpec:
    """Read the manifest's ``text`` table strictly."""
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


def read_graph(fields: Fields) -> GraphSpec:
    """Read a table of the manifest's ``graphs`` strictly."""
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


def read_file(fields: Fields) -> FileSpec:
    """Read a table of the manifest's ``files`` strictly."""
    spec = FileSpec(fields.text("sha256"), fields.integer("bytes"))
    fields.done()
    return spec
