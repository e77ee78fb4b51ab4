"""What a checkpoint itself thinks of a bundle's answers, piece by piece: one pass over its weights, whatever their size.

The bundle answers, and the float model reads each answer as if it had written it. Where its best token is the bundle's in every
place, the two greedy answers are the same by induction, so the float model never has to write one token by token. Where it is
not, its logits tell how much it minds.

Between the pieces all states lie on the disk; in memory are one piece's weights and one state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from os.path import commonprefix
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from edgesafe.format.exits import Exit
from edgesafe.format.tiles import Cut
from edgesafe.progress import bar
from edgesafe.runtime.tiles import join_tiles
from edgesafe_export import parity_pieces as compare
from edgesafe_export.family import Family
from edgesafe_export.parity_model import processed
from edgesafe_export.pieces import END, HEAD, LAYER, MAP, SEGMENT, TOKENS, WHOLE, Piece
from edgesafe_export.skeleton import Sketch

# Stands for any larger loss, and for logits that are not finite: a figure that JSON can hold.
WORST = 99.0
Run = Callable[..., np.ndarray]


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
        logits: what the bundle gave in each of the answer's places [n,V].
    """

    image: Image.Image
    prompt: str
    exit: Exit
    cut: Cut
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    logits: np.ndarray = field(compare=False, repr=False)


@dataclass(frozen=True)
class Score:
    """What the float model says in each place of an answer.

    Attributes:
        best: its own best token there, after the prompt and the answer's tokens before.
        losses: by how much its log-probability of the answer's token is below that of its best, in nats, at most `WORST`.
        divergence: of its distribution from the bundle's, in nats, at most `WORST`.
    """

    best: tuple[int, ...]
    losses: tuple[float, ...]
    divergence: tuple[float, ...]


def score(sketch: Sketch, pieces: Sequence[Piece], answers: Sequence[Answered], folder: Path) -> list[Score]:
    """The float model's score of each answer.

    Args:
        sketch: where the weights are.
        pieces: all of them, in order.
        answers: what a bundle answered.
        folder: where the states lie meanwhile.
    """
    desk = open_desk(sketch, answers, folder)
    scores: list[Score] = []
    sizes = [sum(sketch.stored[name].count for name in piece.weights) for piece in pieces]
    for piece in bar(pieces, label="the checkpoint reads the answers", sizes=sizes):
        weights = sketch.load(sorted(set(piece.names.values())))
        run = partial(compare.want, piece, weights)
        if piece.kind in (SEGMENT, MAP, HEAD, WHOLE, TOKENS):
            see(desk, piece, run)
        elif piece.kind == END:
            scores = _scores(desk, run)
        else:
            _read(desk, piece, run)
    return scores


@dataclass(frozen=True)
class _Reading:
    """Requests about one picture at one exit as one sequence: what all prompts begin with, and behind it the rest of each.

    The rests don't see each other. So the picture, which is most of a prompt, is read once.

    Attributes:
        members: the answers' numbers.
        begin: the tokens that all prompts begin with, the picture's among them.
        rests: of each, the prompt's other tokens and the answer's but the last, which nothing follows.
    """

    members: tuple[int, ...]
    begin: tuple[int, ...]
    rests: tuple[tuple[int, ...], ...]

    @property
    def ids(self) -> np.ndarray:
        """All tokens [1,S]."""
        return np.array([[*self.begin, *(token for rest in self.rests for token in rest)]], np.int64)

    def order(self) -> dict[str, torch.Tensor]:
        """Each token's position [1,S], and the mask [1,1,S,S]: 0 where one may see another, else the least float."""
        first = len(self.begin)
        owner = np.repeat(np.arange(-1, len(self.rests)), [first, *map(len, self.rests)])
        positions = np.concatenate([np.arange(first), *(np.arange(first, first + len(rest)) for rest in self.rests)])
        sees = np.tri(len(owner), dtype=bool) & ((owner == -1) | (owner == owner[:, None]))
        mask = np.where(sees, np.float32(0), np.finfo(np.float32).min)
        return {"position_ids": torch.from_numpy(positions[None]), "attention_mask": torch.from_numpy(mask[None, None])}

    def places(self, nth: int, count: int) -> slice:
        """Where the tokens of a member's answer, `count` of them, are foretold: from its prompt's last token on."""
        end = len(self.begin) + sum(map(len, self.rests[: nth + 1]))
        return slice(end - count, end)


@dataclass(frozen=True)
class Desk:
    """The answers and the states between two pieces.

    Attributes:
        family: the checkpoint's.
        answers: all of them.
        folder: where the states lie.
        pictures: one answer about each picture; one that exits see in fewer tiles counts again.
        picture_of: by answer, its picture's number.
        depths: by picture, those of the exits that it is needed at.
        readings: the requests, those about one picture at one exit together.
    """

    family: Family
    answers: Sequence[Answered]
    folder: Path
    pictures: Sequence[Answered]
    picture_of: Sequence[int]
    depths: Sequence[set[int]]
    readings: Sequence[_Reading]

    def load(self, name: str) -> np.ndarray:
        """A state."""
        return np.asarray(np.load(self.folder / f"{name}.npy"))

    def save(self, name: str, state: np.ndarray) -> None:
        """Keep a state."""
        np.save(self.folder / f"{name}.npy", state)

    def features(self, number: int) -> np.ndarray:
        """The rows that stand in an answer's prompt for its picture [n,D]; the pieces of the vision side have run."""
        one, spec = self.answers[number], self.family.tiles
        if one.exit.visual_tokens is not None:  # pictures are whole then
            return self.load(f"features_{self.picture_of[number]}_{one.exit}")
        tiles = self.load(f"features_{self.picture_of[number]}_{one.exit.depth}")
        return np.asarray(tiles[0] if spec is None else join_tiles(list(tiles), one.cut, spec))

    def vision(self, picture: int, depth: int) -> np.ndarray:
        """A picture's tiles [n,T,W] after so many blocks; after none its pixel values [n,3,H,W]."""
        if depth:
            return self.load(f"vision_{picture}_{depth}")
        one = self.pictures[picture]
        pixels = np.asarray(processed(self.family, one.image, one.prompt, one.exit)["pixel_values"].numpy())
        return pixels.reshape(-1, *pixels.shape[-3:])


def open_desk(sketch: Sketch, answers: Sequence[Answered], folder: Path) -> Desk:
    """A desk before the first piece."""
    folder.mkdir(parents=True, exist_ok=True)
    seen = [(id(one.image), one.exit.tiles) for one in answers]
    pictures = dict(zip(seen, answers, strict=True))
    numbers = {key: number for number, key in enumerate(pictures)}
    picture_of = [numbers[key] for key in seen]
    depths: list[set[int]] = [set() for _ in pictures]
    for picture, one in zip(picture_of, answers, strict=True):
        depths[picture].add(one.exit.depth)
    return Desk(sketch.family, answers, folder, list(pictures.values()), picture_of, depths, _readings(answers, picture_of))


def _readings(answers: Sequence[Answered], picture_of: Sequence[int]) -> list[_Reading]:
    """The requests about each picture at each exit."""
    groups: dict[tuple[int, Exit], list[int]] = {}
    for number, (picture, one) in enumerate(zip(picture_of, answers, strict=True)):
        groups.setdefault((picture, one.exit), []).append(number)
    readings = []
    for members in groups.values():
        asked = [answers[number] for number in members]
        begin = tuple(commonprefix([one.prompt_ids[:-1] for one in asked]))  # each rest has a prompt's last token
        rests = tuple((*one.prompt_ids[len(begin) :], *one.ids[:-1]) for one in asked)
        readings.append(_Reading(tuple(members), begin, rests))
    return readings


def see(desk: Desk, piece: Piece, run: Run) -> None:
    """A piece of the vision side, over every tile of every picture that needs it."""
    start, end = piece.at
    if piece.kind == TOKENS:
        for picture, exit in {(p, one.exit) for p, one in zip(desk.picture_of, desk.answers, strict=True)}:
            if exit.visual_tokens == end:
                desk.save(f"features_{picture}_{exit}", run(desk.load(f"features_{picture}_{exit.depth}")[0]))
        return
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


def _read(desk: Desk, piece: Piece, run: Run) -> None:
    """The embedding or a decoder layer, over every prompt with its answer."""
    for i, reading in enumerate(desk.readings):
        if piece.kind == LAYER:
            desk.save(f"text_{i}", run(desk.load(f"text_{i}"), **reading.order()))
            continue
        places = reading.ids == desk.family.geometry.image_token_id
        places[:, len(reading.begin) :] = False  # a bundle that babbles may answer an image token
        embeds = run(np.where(places, 0, reading.ids)).copy()
        embeds[places] = desk.features(reading.members[0])
        desk.save(f"text_{i}", embeds)


def _scores(desk: Desk, run: Run) -> list[Score]:
    """The decoder's end, over the places of every answer."""
    found = {}
    for i, reading in enumerate(desk.readings):
        state = desk.load(f"text_{i}")[0]
        for nth, number in enumerate(reading.members):
            one = desk.answers[number]
            found[number] = _score(run(state[reading.places(nth, len(one.ids)), None]), one)
    return [found[number] for number in range(len(desk.answers))]


def _score(logits: np.ndarray, one: Answered) -> Score:
    """The score of an answer from the float model's logits [n,1,V] in its places."""
    float_, bundle = _log_softmax(logits[:, 0]), _log_softmax(one.logits)
    best, places = float_.argmax(axis=1), np.arange(len(float_))
    losses = float_[places, best] - float_[places, list(one.ids)]
    divergence = (np.exp(float_) * (float_ - bundle)).sum(axis=1)
    return Score(tuple(best.tolist()), _capped(losses), _capped(divergence))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities [n,V] of logits.

    >>> _log_softmax(np.array([[0.0, 0.0]])).round(3).tolist()
    [[-0.693, -0.693]]
    """
    rows = logits - logits.max(axis=1, keepdims=True).astype(np.float64)
    return np.asarray(rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)))


def _capped(nats: np.ndarray) -> tuple[float, ...]:
    """Numbers that JSON can hold.

    >>> _capped(np.array([0.5, np.inf, np.nan, -1e-17]))
    (0.5, 99.0, 99.0, 0.0)
    """
    return tuple(np.clip(np.nan_to_num(nats, nan=WORST, posinf=WORST), 0.0, WORST).tolist())
