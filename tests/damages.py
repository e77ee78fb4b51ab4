"""Damage to a checkpoint's weights on their way into a bundle, as a fault of the exporter would do it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from edgesafe_export import export
from edgesafe_export.export import Job
from edgesafe_export.graphs import Exported
from edgesafe_export.pieces import Piece
from edgesafe_export.quantize import quantize
from edgesafe_export.skeleton import Sketch
from edgesafe_export.stream import scheme_of

Change = Callable[[str, np.ndarray], np.ndarray]
SCHEMES = {"vision": "int8-dynamic", "text": "int4-block32"}  # nearest to what auto takes that needs no calibration
PARTS = {
    "decoder": ("language_model.layers.", "lm_head."),
    "vision": ("vision_tower.encoder.",),
    "projector": ("multi_modal_projector.",),
}
BITS, NOISE = (8, 6, 5, 4, 3, 2), (0.03, 0.1, 0.2, 0.4, 0.8)


@dataclass(frozen=True)
class Damage:
    """What is done to each matrix of a part of the model, by its name.

    Attributes:
        name: what it is called in tables.
        part: a key of `PARTS`.
        only: a piece of the names of the weights that are changed; "" for all.
        change: from a weight's name and values to its new values.
        vectors: whether biases are changed with the matrices.
    """

    name: str
    part: str
    change: Change
    only: tuple[str, ...] = ("",)
    vectors: bool = False

    def __call__(self, name: str, weight: np.ndarray) -> np.ndarray:
        """The weight as it is shipped."""
        return self.change(name, weight) if self.hits(name) and (weight.ndim == 2 or self.vectors) else weight

    def hits(self, name: str) -> bool:
        """Whether a weight of this name is changed."""
        return any(text in name for text in PARTS[self.part]) and any(text in name for text in self.only)


def rounded(bits: int) -> Change:
    """Every row to whole multiples of its own step, `bits` of them with the sign."""
    most = 2 ** (bits - 1) - 1

    def change(_: str, weight: np.ndarray) -> np.ndarray:
        step = np.abs(weight).max(axis=1, keepdims=True) / most
        return np.asarray(np.round(weight / np.maximum(step, 1e-12)) * step, np.float32)

    return change


def noised(share: float) -> Change:
    """Noise of a share of each matrix's own spread, the same in every run."""

    def change(name: str, weight: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return np.asarray(weight + share * weight.std() * rng.standard_normal(weight.shape), np.float32)

    return change


def unscaled(rows: slice) -> Change:
    """Some rows as int8 numbers whose scale was lost."""

    def change(_: str, weight: np.ndarray) -> np.ndarray:
        out = weight.copy()
        out[rows] = np.round(127 * weight[rows] / np.maximum(np.abs(weight[rows]).max(axis=1, keepdims=True), 1e-12))
        return out

    return change


def zeroed(_: str, weight: np.ndarray) -> np.ndarray:
    """Nothing left."""
    return np.zeros_like(weight)


def skipped(part: str, block: int) -> Damage:
    """A block that adds nothing to its state."""
    ends = ("self_attn.o_proj", "mlp.down_proj") if part == "decoder" else ("self_attn.out_proj", "mlp.fc2")
    only = tuple(f"layers.{block}.{end}." for end in ends)
    return Damage(f"{part}: block {block} skipped", part, zeroed, only, vectors=True)


_LAST = {"decoder": "layers.1.mlp.down_proj", "vision": "layers.2.mlp.fc2", "projector": "linear_2"}


def of_part(part: str) -> Iterable[Damage]:
    """All damages of a part but skipped blocks."""
    yield from (Damage(f"{part}: {bits} bits", part, rounded(bits)) for bits in BITS)
    yield from (Damage(f"{part}: noise {share:g}", part, noised(share)) for share in NOISE)
    yield Damage(f"{part}: a channel's scale lost", part, unscaled(slice(5, 6)), (_LAST[part],))
    yield Damage(f"{part}: a matrix's scales lost", part, unscaled(slice(None)), (_LAST[part],))
    yield Damage(f"{part}: zeroed", part, zeroed)


DAMAGES = (
    *(damage for part in PARTS for damage in of_part(part)),
    *(skipped("decoder", block) for block in (0, 2)),
    *(skipped("vision", block) for block in (1, 8)),
)


@dataclass(frozen=True)
class DamagedSketch(Sketch):
    """A checkpoint whose weights are damaged on their way."""

    damage: Change

    def load(self, names: list[str]) -> dict[str, np.ndarray]:
        """Some weights, damaged."""
        return {name: self.damage(name, weight) for name, weight in super().load(names).items()}


def damaged(sketch: Sketch, damage: Change) -> DamagedSketch:
    """The same checkpoint with a damage."""
    return DamagedSketch(**{one.name: getattr(sketch, one.name) for one in fields(Sketch)}, damage=damage)


@dataclass(frozen=True)
class Workshop:
    """A model's pieces, traced once, and its float graphs without damage."""

    job: Job
    sketch: Sketch
    pieces: list[Piece]
    right: dict[str, Exported]
    _made: dict[str, dict[str, Exported]] = field(default_factory=dict)

    @staticmethod
    def of(job: Job, sketch: Sketch, pieces: list[Piece]) -> Workshop:
        """Fill the pieces."""
        return Workshop(job, sketch, pieces, export.filled(sketch, pieces))

    def bundle(self, folder: Path, damage: Damage | None = None, schemes: Mapping[str, str] = SCHEMES) -> Path:
        """Write a whole bundle with a damage, or without one; graphs that it doesn't touch are the right ones."""
        key = " ".join(schemes.values())
        if key not in self._made:
            self._made[key] = _quantized(self.right, schemes)
        parts = dict(self._made[key])
        if damage is not None:
            hit = {piece.graph for piece in self.pieces if any(map(damage.hits, piece.weights))}
            pieces = [piece for piece in self.pieces if piece.graph in hit]
            parts |= _quantized(export.filled(damaged(self.sketch, damage), pieces), schemes)
        export.write(self.job, folder, parts, dict(schemes), {})
        return folder


def _quantized(parts: Mapping[str, Exported], schemes: Mapping[str, str]) -> dict[str, Exported]:
    return {path: (quantize(proto, scheme_of(path, **schemes)), spec) for path, (proto, spec) in parts.items()}
