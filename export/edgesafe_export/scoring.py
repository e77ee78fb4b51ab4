"""What a checkpoint itself thinks of a bundle's answers, piece by piece: one pass over its weights, whatever their size.

The bundle answers, and the float model reads each answer as if it had written it. Where its best token is the bundle's in every
place, the two greedy answers are the same by induction, so the float model never has to write one token by token. Where it is
not, its logits tell how much it minds.

Between the pieces all states lie on the disk; in memory are one piece's weights and one state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from edgesafe.format.exits import Exit
from edgesafe.format.tiles import Cut
from edgesafe.progress import bar
from edgesafe.runtime.tiles import join_tiles
from edgesafe_export import parity_pieces as compare
from edgesafe_export.family import Family
from edgesafe_export.parity_model import processed
from edgesafe_export.pieces import END, HEAD, LAYER, MAP, SEGMENT, WHOLE, Piece
from edgesafe_export.skeleton import Sketch

# Stands for any larger loss, and for logits that are not finite: a figure that JSON can hold.
WORST = 99.0
Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Answered:
    """A request and a bundle's greedy answer to it.

    Attributes:
        image: the picture; requests about one picture hold the same object.
        prompt: the request.
        exit: the exit that answered.
        cut: how the picture is cut into tiles.
        prompt_ids: the whole prompt's tokens, the picture's among them.
        ids: the answer's tokens, the end token included where it came.
        text: the answer.
    """

    image: Image.Image
    prompt: str
    exit: Exit
    cut: Cut
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Score:
    """What the float model says in each place of an answer.

    Attributes:
        best: its own best token there, after the prompt and the answer's tokens before.
        losses: by how much its log-probability of the answer's token is below that of its best, in nats, at most `WORST`.
    """

    best: tuple[int, ...]
    losses: tuple[float, ...]


def score(sketch: Sketch, pieces: Sequence[Piece], answers: Sequence[Answered], folder: Path) -> list[Score]:
    """The float model's score of each answer.

    Args:
        sketch: where the weights are.
        pieces: all of them, in order.
        answers: what a bundle answered.
        folder: where the states lie meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    desk = _desk(sketch, answers, folder)
    scores: list[Score] = []
    sizes = [sum(sketch.stored[name].count for name in piece.weights) for piece in pieces]
    for piece in bar(pieces, label="the checkpoint reads the answers", sizes=sizes):
        weights = sketch.load(sorted(set(piece.names.values())))
        run = partial(compare.want, piece, weights)
        if piece.kind in (SEGMENT, MAP, HEAD, WHOLE):
            _see(desk, piece, run)
        elif piece.kind == END:
            scores = [_score(run(_last(desk.load(f"text_{i}"), len(one.ids))), one.ids) for i, one in enumerate(answers)]
        else:
            _read(desk, piece, run)
    return scores


@dataclass(frozen=True)
class _Desk:
    """The answers and the states between two pieces.

    Attributes:
        family: the checkpoint's.
        answers: all of them.
        folder: where the states lie.
        pictures: one answer about each picture.
        picture_of: by answer, its picture's number.
        depths: by picture, those of the exits that it is needed at.
    """

    family: Family
    answers: Sequence[Answered]
    folder: Path
    pictures: Sequence[Answered]
    picture_of: Sequence[int]
    depths: Sequence[set[int]]

    def load(self, name: str) -> np.ndarray:
        """A state."""
        return np.asarray(np.load(self.folder / f"{name}.npy"))

    def save(self, name: str, state: np.ndarray) -> None:
        """Keep a state."""
        np.save(self.folder / f"{name}.npy", state)

    def vision(self, picture: int, depth: int) -> np.ndarray:
        """A picture's tiles [n,T,W] after so many blocks; after none its pixel values [n,3,H,W]."""
        if depth:
            return self.load(f"vision_{picture}_{depth}")
        one = self.pictures[picture]
        pixels = np.asarray(processed(self.family, one.image, one.prompt)["pixel_values"].numpy())
        return pixels.reshape(-1, *pixels.shape[-3:])


def _desk(sketch: Sketch, answers: Sequence[Answered], folder: Path) -> _Desk:
    pictures = list({id(one.image): one for one in answers}.values())
    numbers = {id(one.image): number for number, one in enumerate(pictures)}
    picture_of = [numbers[id(one.image)] for one in answers]
    depths: list[set[int]] = [set() for _ in pictures]
    for picture, one in zip(picture_of, answers, strict=True):
        depths[picture].add(one.exit.depth)
    return _Desk(sketch.family, answers, folder, pictures, picture_of, depths)


def _see(desk: _Desk, piece: Piece, run: Run) -> None:
    """A piece of the vision side, over every tile of every picture that needs it."""
    start, end = piece.at
    for picture, depths in enumerate(desk.depths):
        if piece.kind == SEGMENT and max(depths) >= end:
            desk.save(f"vision_{picture}_{end}", _tiles(piece, run, desk.vision(picture, start)))
            if start and start not in depths:  # a large picture's state at every depth would fill the disk
                (desk.folder / f"vision_{picture}_{start}.npy").unlink()
        elif piece.kind == MAP and end in depths:
            desk.save(f"vision_{picture}_{end}", _tiles(piece, run, desk.vision(picture, end)))
        elif piece.kind == WHOLE and end in depths:
            desk.save(f"features_{picture}_{end}", _tiles(piece, run, desk.vision(picture, 0)))
        elif piece.kind == HEAD:
            for depth in depths:
                desk.save(f"features_{picture}_{depth}", _tiles(piece, run, desk.vision(picture, depth)))


def _tiles(piece: Piece, run: Run, tiles: np.ndarray) -> np.ndarray:
    """What a piece makes of each tile; features have no batch axis."""
    made = [run(tile[None]) for tile in tiles]
    return np.stack(made) if piece.kind in (HEAD, WHOLE) else np.concatenate(made)


def _read(desk: _Desk, piece: Piece, run: Run) -> None:
    """The embedding or a decoder layer, over every prompt with its answer."""
    for i, one in enumerate(desk.answers):
        if piece.kind == LAYER:
            desk.save(f"text_{i}", run(desk.load(f"text_{i}")))
            continue
        ids = np.array([[*one.prompt_ids, *one.ids[:-1]]], np.int64)  # nothing follows the last token
        places = ids == desk.family.geometry.image_token_id
        embeds = run(np.where(places, 0, ids)).copy()
        tiles = desk.load(f"features_{desk.picture_of[i]}_{one.exit.depth}")
        spec = desk.family.tiles
        embeds[places] = tiles[0] if spec is None else join_tiles(list(tiles), one.cut, spec)
        desk.save(f"text_{i}", embeds)


def _last(state: np.ndarray, count: int) -> np.ndarray:
    """The last places of a text state [1,S,D] as states of their own, [count,1,D]: of each the logits are wanted."""
    return np.ascontiguousarray(state[0, -count:, None])


def _score(logits: np.ndarray, ids: Sequence[int]) -> Score:
    """The score of an answer's tokens from the logits [n,1,V] in their places.

    >>> _score(np.array([[[0.0, 2.0, 1.0]], [[5.0, 0.0, 0.0]]]), [2, 0])
    Score(best=(1, 0), losses=(1.0, 0.0))
    >>> _score(np.array([[[np.nan, 2.0]]]), [1]).losses
    (99.0,)
    """
    rows = logits[:, 0].astype(np.float64)
    best, places = rows.argmax(axis=1), np.arange(len(rows))
    losses = np.where(np.isfinite(rows).all(axis=1), rows[places, best] - rows[places, list(ids)], WORST)
    return Score(tuple(best.tolist()), tuple(np.minimum(losses, WORST).tolist()))
