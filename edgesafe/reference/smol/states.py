"""What the frozen tower sees, once per picture: training and evaluation read states, never pixels.

V views, E exits, P patches, W tower width.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from edgesafe.checkpoint.exit_model import ExitModel, exit_states, pixel_values
from edgesafe.format.files import write_atomically
from edgesafe.progress import bar
from edgesafe.reference.smol.pictures import MAKERS, NAMES, blank, read_names, read_pictures, views
from edgesafe.reference.smol.rows import BLANK, with_article
from edgesafe.reference.smol.things import THINGS

_VIEWS, _WILD, _FEW = 6, 6, 2  # of a thing that is asked about, and of an emoji that is only named
_BLANKS = 24
_CHUNK = 32


@dataclass(frozen=True)
class Seen:
    """States of pictures.

    Attributes:
        states: By maker and emoji, [V, E, P, W] float16; the first view is the plain one. Blank paper is the maker "".
        names: With articles, by emoji: ours where we have one, Unicode's elsewhere.
    """

    states: Mapping[tuple[str, str], Tensor]
    names: Mapping[str, str]

    def makers(self, emoji: str) -> list[str]:
        """Who draws an emoji."""
        return sorted(maker for maker, one in self.states if one == emoji)

    def firms(self) -> list[str]:
        """Whose drawings there are; blank paper is nobody's."""
        return sorted({firm(maker) for maker, _ in self.states} - {""})


def firm(maker: str) -> str:
    """Whose a maker's drawings are; some firms drew all things more than once.

    >>> firm("microsoft flat"), firm("")
    ('microsoft', '')
    """
    return maker.partition(" ")[0]


def without(seen: Seen, other: str) -> Seen:
    """The pictures of all other firms."""
    return Seen({pair: states for pair, states in seen.states.items() if firm(pair[0]) != other}, seen.names)


def at(seen: Seen, places: Sequence[int], views: int | None = None) -> Seen:
    """The states of some of the depths that were kept, each as views of its own; all views of a drawing, or so many."""
    return replace(seen, states={key: torch.cat([one[:views, [p]] for p in places]) for key, one in seen.states.items()})


def see_training(
    model: ExitModel, archives: Mapping[str, Path], cache: Path, seed: int = 0, depths: Sequence[int] | None = None
) -> Seen:
    """States of the pictures of every maker but those held out, and of blank paper.

    Args:
        model: Its tower is used.
        archives: By maker, as `fetch` gives them.
        cache: Folder in which each maker's states are kept.
        seed: Of the views.
        depths: At which; by default at the reference depth alone. Training reads the last of them.
    """
    depths = depths or [model.reference.depth]
    names = read_names(archives[NAMES[0]])
    named = {emoji: with_article(name) for emoji, name in names.items()} | {t.emoji: t.name for t in THINGS}
    asked = {thing.emoji for thing in THINGS}
    states: dict[tuple[str, str], Tensor] = {}
    for maker in (name for name, one in MAKERS.items() if not one.held_out):
        pictures = read_pictures(archives[maker], MAKERS[maker], named)
        wanted = []
        for emoji, picture in sorted(pictures.items()):
            count, wild = (_VIEWS, _WILD) if emoji in asked else (_FEW, 0)
            wanted += [(emoji, view) for view in views(picture, count, f"{seed} {maker} {emoji}", wild)]
        states |= {(maker, emoji): one for emoji, one in see(model, wanted, depths, cache, maker).items()}
    rng = random.Random(f"{seed} blank")
    sheets = [(BLANK, blank(rng if index else None)) for index in range(_BLANKS)]
    states["", BLANK] = see(model, sheets, depths, cache, "blank")[BLANK]
    return Seen(states, named)


def see(
    model: ExitModel, pictures: Sequence[tuple[str, Image.Image]], depths: Sequence[int], cache: Path, label: str
) -> dict[str, Tensor]:
    """States [V, E, P, W] at some depths of named pictures, by name; kept in a file that knows what they are of."""
    digest = hashlib.sha256(repr(list(depths)).encode())
    for name, picture in pictures:
        digest.update(name.encode() + picture.tobytes())
    key, path = digest.hexdigest(), cache / f"{label}.pt"
    kept = torch.load(path, weights_only=True) if path.is_file() else {}
    if kept.get("key") != key:
        states = _through_tower(model, [picture for _, picture in pictures], depths, label)
        kept = {"key": key, "states": states}
        buffer = io.BytesIO()
        torch.save(kept, buffer)
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    return _by_name((name for name, _ in pictures), kept["states"])


def _through_tower(model: ExitModel, pictures: Sequence[Image.Image], depths: Sequence[int], label: str) -> Tensor:
    chunks = [pictures[start : start + _CHUNK] for start in range(0, len(pictures), _CHUNK)]
    found = []
    for chunk in bar(chunks, len(chunks), f"tower: {label}"):
        states = exit_states(model, pixel_values(model, chunk))
        found.append(torch.stack([states[depth] for depth in depths], 1).half())
    return torch.cat(found)


def _by_name(names: Iterable[str], states: Tensor) -> dict[str, Tensor]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return {name: states[found] for name, found in rows.items()}
