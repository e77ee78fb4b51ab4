"""Pictures through the tower once: which of them are used, and the sums over their tokens that the maps follow from.

P patches, W tower width.
"""

from __future__ import annotations

import hashlib
import io
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from edgesafe.checkpoint.exit_maps import reads
from edgesafe.checkpoint.exit_model import ExitModel, exit_states, pixel_values
from edgesafe.checkpoint.geometry import Geometry
from edgesafe.errors import InputError
from edgesafe.format.files import sha256_file, write_atomically
from edgesafe.format.pictures import open_picture
from edgesafe.maps import PICTURES as PICTURES
from edgesafe.maps.moments import Moments
from edgesafe.progress import bar, speaks

HELD_OUT = 5  # every fifth picture chooses ridge and rank
# What people name pictures; those of a format that the runtime does not open are skipped and counted.
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif")
_CHUNK, _CHUNK_BYTES = 64, 2**29  # pictures that the tower sees at once, and what their states may take
_KEEP_S = 60.0  # seconds of work that a stopped run may lose
STATE = "gathered.pt"  # in a work folder


@dataclass
class Gathered:
    """What was gathered: sums over the pictures to fit and over those held out, and how many pictures there were.

    `skipped` are those that could not be read, by name, with the reason.
    """

    fit: Moments
    held: Moments
    used: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    done: int = 0

    @property
    def held_out(self) -> int:
        """How many of the pictures were held out."""
        return (self.used + HELD_OUT - 2) // HELD_OUT


def find_pictures(folder: Path, limit: int = PICTURES) -> list[Path]:
    """Picture files below a folder, at most `limit`: which ones depends on their names alone, not on the listing's order.

    Raises:
        InputError: No such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise InputError("there is no such folder", where=str(folder), expected="a folder of pictures", todo="check the name")
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES}
    files = {name: path for name, path in found.items() if path.is_file()}
    if not files:
        raise InputError(
            "no picture here",
            where=str(folder),
            expected="files that end in " + ", ".join(_SUFFIXES),
            todo="name a folder with a few hundred pictures such as the model will see; they need no labels",
        )
    return choose(files, limit)


def choose(files: dict[str, Path], limit: int) -> list[Path]:
    """At most `limit` of the files, drawn by their names."""
    names = sorted(files, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())
    return [files[name] for name in names[:limit]]


def by_content(paths: Iterable[Path]) -> dict[str, Path]:
    """Files by the sha256 of their bytes, in its order, each content once: a copy must not be fitted to and held out."""
    return dict(sorted({sha256_file(path): path for path in paths}.items()))


def depths_of(geometry: Geometry) -> tuple[int, ...]:
    """The depths that get a map: all but the reference's."""
    return tuple(d for d in range(1, geometry.n_blocks + 1) if d != geometry.reference_depth)


def memory_gib(geometry: Geometry) -> float:
    """Memory that gathering and solving take beside the tower, in GiB."""
    width, exits = geometry.vision_width, len(depths_of(geometry))
    states = _chunk_of(geometry) * (geometry.n_blocks + 1) * geometry.tokens * width * 4
    return (2 * 2 * exits * width**2 * 8 + 24 * width**2 * 8 + 2 * states) / 2**30


@torch.no_grad()
def gather(model: ExitModel, files: dict[str, Path], work: Path | None = None) -> Gathered:
    """Run the tower over pictures.

    Args:
        model: The checkpoint; of its weights only the tower's are used.
        files: Pictures by the digest of their content, in its order.
        work: Folder in which a stopped run's sums are found again; None keeps none.

    Raises:
        InputError: Fewer than two pictures can be read.
    """
    key = hashlib.sha256("".join(files).encode()).hexdigest()
    state = (_read(work, key) if work else None) or _nothing(model)
    paths, size, kept = list(files.values()), _chunk_of(model.geometry), time.monotonic()
    starts = range(state.done, len(paths), size)
    for start in bar(starts, len(starts), "pictures through the tower"):
        images = list(_open(paths[start : start + size], state))
        if images:
            _add(model, images, state)
        state.done = start + size
        if work and time.monotonic() - kept > _KEEP_S:
            _write(work, key, state)
            kept = time.monotonic()
    _say_skipped(state)
    if state.used < 2:
        raise InputError(
            f"{state.used} of {len(paths)} pictures can be used",
            where=str(paths[0].parent) if paths else "",
            expected="at least two different ones: one to fit to, one to choose the ridge by; some hundred are better",
            todo="name a folder with more pictures",
        )
    return state


def _nothing(model: ExitModel) -> Gathered:
    width, depths = model.geometry.vision_width, depths_of(model.geometry)
    return Gathered(Moments.empty(depths, width), Moments.empty(depths, width))


def _chunk_of(geometry: Geometry) -> int:
    each = 4 * (geometry.n_blocks + 1) * geometry.tokens * geometry.vision_width
    return max(1, min(_CHUNK, _CHUNK_BYTES // each))


def _open(paths: Sequence[Path], state: Gathered) -> Iterator[Image.Image]:
    for path in paths:
        try:
            yield open_picture(path)
        except InputError as error:
            state.skipped[path.name] = error.what


def _add(model: ExitModel, images: Sequence[Image.Image], state: Gathered) -> None:
    raw = exit_states(model, pixel_values(model, images))
    wanted = reads(model.model, model.recipe, raw[model.reference.depth])
    states = [reads(model.model, model.recipe, raw[depth]) for depth in state.fit.depths]
    held = torch.tensor([(state.used + i) % HELD_OUT == 1 for i in range(len(images))])
    for sums, rows in ((state.fit, ~held), (state.held, held)):
        if bool(rows.any()):
            sums.add([one[rows].flatten(0, 1) for one in states], wanted[rows].flatten(0, 1))
    state.used += len(images)


def _say_skipped(state: Gathered) -> None:
    if state.skipped and speaks():
        print(f"  {len(state.skipped)} pictures were skipped:", file=sys.stderr)
        for name, why in list(state.skipped.items())[:10]:
            print(f"    {name}: {why}", file=sys.stderr, flush=True)


def _write(work: Path, key: str, state: Gathered) -> None:
    buffer = io.BytesIO()
    torch.save({"key": key, **_plain(state), "fit": vars(state.fit), "held": vars(state.held)}, buffer)
    write_atomically(work / STATE, buffer.getvalue())


def _plain(state: Gathered) -> dict[str, Any]:
    return {"used": state.used, "skipped": state.skipped, "done": state.done}


def _read(work: Path, key: str) -> Gathered | None:
    """What a stopped run over the same pictures kept; None where there is nothing that can be used."""
    try:
        kept = torch.load(work / STATE, weights_only=True)
        if kept.pop("key") != key:
            return None
        fit, held = Moments(**kept.pop("fit")), Moments(**kept.pop("held"))
        return Gathered(fit, held, **kept)
    except Exception:  # torch.load raises whatever the damaged bytes make its parts raise; the run starts over
        return None
