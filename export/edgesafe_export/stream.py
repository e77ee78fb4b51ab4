"""Pieces one after the other: loaded, compared, quantized, written, released. What is written is not done again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from edgesafe.format import graph_io
from edgesafe.format.exits import Exit
from edgesafe.format.files import write_atomically
from edgesafe.format.specs import GraphSpec
from edgesafe.progress import bar
from edgesafe_export import parity_pieces as compare
from edgesafe_export.calibrate import Calibration
from edgesafe_export.family import Family
from edgesafe_export.parity_model import Probe, processed
from edgesafe_export.pieces import (
    EMBED,
    HEAD,
    LAYER,
    MAP,
    SEGMENT,
    TOKENS,
    WHOLE,
    Piece,
    decoder_spec,
    text_pieces,
    vision_pieces,
)
from edgesafe_export.placeholders import fill, with_weights
from edgesafe_export.quantize import BLOCKS, EMBED_SCHEME, quantize
from edgesafe_export.skeleton import Sketch
from edgesafe_export.tolerances import PIECE_TOKENS

# Rows of image features in front of the words that the decoder's pieces are compared on.
_FEATURES = 8


@dataclass(frozen=True)
class Made:
    """A bundle's graph as files of its pieces in order."""

    files: tuple[Path, ...]
    spec: GraphSpec


def trace_pieces(sketch: Sketch, ladder: tuple[Exit, ...], layout: str, *, text: bool = True) -> list[Piece]:
    """Every piece of an export, in order."""
    return [*vision_pieces(sketch, ladder, layout), *(text_pieces(sketch) if text else ())]


def scheme_of(path: str, vision: str, text: str) -> str:
    """A graph's scheme. The embedding is looked up, not multiplied: where text is quantized its table takes int8 rows.

    What averages visual tokens has no weights.
    """
    if path.startswith(graph_io.TOKENS):
        return "fp32"
    if path == graph_io.EMBED_PATH:
        return "fp32" if text == "fp32" else EMBED_SCHEME
    return vision if path.startswith("vision/") else text


def make_pieces(
    sketch: Sketch,
    pieces: Sequence[Piece],
    schemes: Mapping[str, str],
    work: Path,
    probe: Probe,
    examples: Sequence[Probe] = (),
    seed: int = 0,
) -> tuple[dict[str, Made], dict[str, dict[str, float]]]:
    """Write every piece that is not there yet.

    Args:
        sketch: where the weights are.
        pieces: all of them, in order.
        schemes: of `vision` and of `text`.
        work: folder that keeps them.
        probe: the picture and request that they are compared on.
        examples: pictures and requests that a calibrated scheme's errors are compensated on, beside neutral text.
        seed: picks that text.

    Returns:
        The graphs by their paths, and what was measured of each piece: `float` and `quantized`.

    Raises:
        ParityError: a piece does not compute what torch computes.
        InputError: a weight is damaged or not finite.
    """
    states, text = States(work / "states", sketch.family, probe), schemes["text"]
    calibrated = text in BLOCKS and BLOCKS[text].calibrated
    calibration = Calibration(sketch, pieces, examples, seed, work / text / "calibration") if calibrated else None
    files: dict[str, list[Path]] = {}
    measured = {}
    targets = {p.name: work / scheme_of(p.graph, schemes["vision"], schemes["text"]) / p.name for p in pieces}
    sizes = [_size(sketch, p) if not targets[p.name].with_suffix(".json").is_file() else 0 for p in pieces]
    for piece in bar(pieces, label="pieces", sizes=sizes):
        target, scheme = targets[piece.name], scheme_of(piece.graph, schemes["vision"], schemes["text"])
        record = target.with_suffix(".json")
        if not record.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(record, json.dumps(_make(piece, sketch, scheme, states, target, calibration)).encode())
        measured[piece.name] = json.loads(record.read_text(encoding="utf-8"))
        files.setdefault(piece.graph, []).append(target)
    specs = {piece.graph: piece.blueprint.spec for piece in pieces}
    if graph_io.DECODER_PATH in specs:
        specs[graph_io.DECODER_PATH] = decoder_spec(sketch, specs[graph_io.DECODER_PATH])
    return {path: Made(tuple(found), specs[path]) for path, found in files.items()}, measured


def _size(sketch: Sketch, piece: Piece) -> int:
    return sum(sketch.stored[name].count for name in piece.weights)


def _make(
    piece: Piece, sketch: Sketch, scheme: str, states: States, target: Path, calibration: Calibration | None
) -> dict[str, float]:
    """Load, compare, quantize and write one piece; the weights are gone when it returns."""
    state = states.before(piece)
    weights = sketch.load(piece.weights)
    constants = fill(piece.blueprint, weights)
    wanted = compare.want(piece, weights, state)
    del weights
    found = compare.got(piece, compare.open_graph(piece.blueprint.proto, constants), state)
    errors = {"float": compare.float_error(piece, state, wanted, found)}
    calibration = calibration if piece.kind == LAYER else None
    hessians = calibration.hessians(piece, constants) if calibration else None
    whole = with_weights(piece.blueprint, constants)
    del constants
    if scheme != "fp32":
        whole = quantize(whole, scheme, target.parent, hessians)
        del hessians
        found = compare.got(piece, compare.open_graph(whole, {}), state)
        errors["quantized"] = compare.quantized_error(piece, state, wanted, found)
        if calibration:
            calibration.advance(piece, whole)
    states.keep(piece, wanted)
    partial = target.with_suffix(".partial")
    onnx.save(whole, partial)
    partial.replace(target)
    return {key: float(f"{value:.3e}") for key, value in errors.items()}


class States:
    """torch's states between the pieces, on disk, so that a resumed export has those of its finished pieces."""

    def __init__(self, folder: Path, family: Family, probe: Probe) -> None:
        self.folder, self.family, self.probe = folder, family, probe
        folder.mkdir(parents=True, exist_ok=True)

    def before(self, piece: Piece) -> np.ndarray:
        """What a piece is compared on."""
        if piece.kind == WHOLE or (piece.kind == SEGMENT and piece.at[0] == 0):
            pixels = np.asarray(processed(self.family, *self.probe)["pixel_values"].numpy())
            return pixels.reshape(-1, *pixels.shape[-3:])[:1]  # of a picture in tiles the first
        if piece.kind == HEAD and self.family.exit_map(piece.at[0]) is not None:
            return self._load(f"mapped_{piece.at[0]:03d}")
        if piece.kind in (SEGMENT, MAP, HEAD):
            return self._load(f"vision_{piece.at[0]:03d}")
        if piece.kind == TOKENS:
            return self._load("features")
        if piece.kind == EMBED:
            ids = self.family.processor.tokenizer(self.probe[1])["input_ids"]
            return np.resize(np.array(ids, np.int64), (1, PIECE_TOKENS))
        return self._load(f"text_{piece.at[0]:03d}")

    def keep(self, piece: Piece, after: np.ndarray) -> None:
        """Keep what torch made of it."""
        if piece.kind == SEGMENT:
            self._save(f"vision_{piece.at[1]:03d}", after)
        elif piece.kind == MAP:
            self._save(f"mapped_{piece.at[1]:03d}", after)
        elif piece.kind in (HEAD, WHOLE):
            self._save("features", after)
        elif piece.kind == EMBED:
            rows = min(_FEATURES, len(features := self._load("features")))
            self._save("text_000", np.concatenate([features[None, :rows], after[:, rows:]], axis=1))
        elif piece.kind == LAYER:
            self._save(f"text_{piece.at[1]:03d}", after)

    def _load(self, name: str) -> np.ndarray:
        return np.asarray(np.load(self.folder / f"{name}.npy"))

    def _save(self, name: str, array: np.ndarray) -> None:
        partial = self.folder / f"{name}.partial"
        with partial.open("wb") as file:
            np.save(file, array)
        partial.replace(self.folder / f"{name}.npy")


def by_exit(measured: Mapping[str, Mapping[str, float]], graphs: Mapping[Exit, Iterable[str]], kind: str) -> dict[str, float]:
    """The largest error of the pieces that each exit runs of the vision side.

    >>> measured = {"a": {"float": 1.0}, "b": {"float": 3.0}, "text/end.onnx": {"float": 9.0}}
    >>> by_exit(measured, {Exit(1): ["a"], Exit(2): ["a", "b"]}, "float")
    {'1': 1.0, '2': 3.0}
    """
    return {str(exit): max(measured[name].get(kind, 0.0) for name in names) for exit, names in graphs.items()}


def of_text(measured: Mapping[str, Mapping[str, float]], kind: str) -> float:
    """The largest error of the text pieces, which every exit runs.

    >>> of_text({"vision/a.onnx": {"float": 3.0}, "text/end.onnx": {"float": 2.0}}, "float")
    2.0
    """
    return max((found.get(kind, 0.0) for name, found in measured.items() if name.startswith("text/")), default=0.0)
