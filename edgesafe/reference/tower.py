"""The first two stages of the reference model: pictures of the world, and the vision tower trained on what they show."""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgesafe.reference.draw import COLOURS, SIZE
from edgesafe.reference.kinds import BY_NAME
from edgesafe.reference.recipe import Recipe
from edgesafe.reference.tokenizer import PATCH
from edgesafe.reference.training import Log, Optimizer, autocast
from edgesafe.reference.world import ACT, SAFE, WORDS, Sample, stream

GRID = SIZE // PATCH
LABELS = ("none", *BY_NAME, *(f"word:{w}" for w in (*WORDS, *ACT, *SAFE)))
_KIND = {name: i for i, name in enumerate(LABELS)}
_COLOUR = {name: i for i, name in enumerate(("none", *COLOURS))}

Pixels = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]


@dataclass
class Pictures:
    """images uint8 [N, S, S, 3]; kinds, colours int64 [N, patches]; counts int64 [N]; samples without their images."""

    images: Pixels
    kinds: Numbers
    colours: Numbers
    counts: Numbers
    samples: list[Sample]


def _labels(s: Sample) -> tuple[Numbers, Numbers]:
    """What stands at each patch of the picture: kind (or word) and colour, [patches]; 0 is nothing."""
    kinds, colours = np.zeros((GRID, GRID), np.int64), np.zeros((GRID, GRID), np.int64)
    middle = (np.arange(GRID) + 0.5) * PATCH
    for place in s.placed:
        near = max(place.half, 0.6 * PATCH) if s.scene.text else 0.85 * place.half
        rows = np.abs(middle - place.y) < near
        cols = np.abs(middle - place.x) < (SIZE if s.scene.text else near)
        box = np.ix_(rows, cols)
        if s.scene.text:
            kinds[box] = _KIND["word:" + s.scene.text.split("\n")[place.index]]
        else:
            item = s.scene.items[place.index]
            kinds[box], colours[box] = _KIND[item.kind], _COLOUR[item.colour]
    return kinds.ravel(), colours.ravel()


def _draw_chunk(job: tuple[int, int, int]) -> Pictures:
    seed, start, count = job
    images, kinds, colours, counts, samples = [], [], [], [], []
    for s in stream("train", count, seed=seed * 100_003 + start):
        k, c = _labels(s)
        images.append(np.asarray(s.image))
        kinds.append(k)
        colours.append(c)
        counts.append(len(s.scene.items))
        samples.append(replace(s, image=None, placed=()))  # type: ignore[arg-type]  # drawn: it lies in images
    return Pictures(np.stack(images), np.stack(kinds), np.stack(colours), np.asarray(counts), samples)


def draw_pictures(seed: int, count: int, workers: int = 2, chunk: int = 1000) -> Pictures:
    """Training samples of the world, drawn in parallel; the result does not depend on `workers`."""
    jobs = [(seed, start, min(chunk, count - start)) for start in range(0, count, chunk)]
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(_draw_chunk, jobs))
    return Pictures(
        np.concatenate([p.images for p in parts]),
        np.concatenate([p.kinds for p in parts]),
        np.concatenate([p.colours for p in parts]),
        np.concatenate([p.counts for p in parts]),
        [s for p in parts for s in p.samples],
    )


def normalise(images: Pixels) -> Tensor:
    """CLIP's normalisation of uint8 [B, S, S, 3] -> float32 [B, 3, S, S] (what `CLIPImageProcessor` does at this size)."""
    from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    x = torch.from_numpy(images).float().div_(255.0)
    mean, std = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    return ((x - mean) / std).permute(0, 3, 1, 2).contiguous()


class Heads(nn.Module):
    """Throw-away heads over the last block: patch tokens say kind and colour, the CLS token says how many."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.kind = nn.Linear(width, len(LABELS))
        self.colour = nn.Linear(width, len(_COLOUR))
        self.count = nn.Linear(width, 5)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of kinds and of colours [B, patches, .] and of the count [B, 5] from states [B, 1 + patches, width]."""
        x = self.norm(states)
        return self.kind(x[:, 1:]), self.colour(x[:, 1:]), self.count(x[:, 0])


def _start(tower: Any, scale: float) -> None:
    """Position embeddings start from 2-D sines and cosines, [1 + patches, width], as ViTs commonly do; the stream, small."""
    vision = getattr(tower, "vision_model", tower)
    weight = vision.embeddings.position_embedding.weight
    angles = torch.arange(GRID)[:, None] * (math.pi / 2 ** torch.linspace(0, 4, weight.shape[1] // 4))
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # [grid, width / 2]
    both = torch.cat([waves[:, None].expand(-1, GRID, -1), waves[None].expand(GRID, -1, -1)], 2)  # [row, column, width]
    with torch.no_grad():
        weight.zero_()
        weight[1:] = 0.3 * both.flatten(0, 1)
        vision.pre_layrnorm.weight.fill_(scale)


def _tower_loss(tower: nn.Module, heads: Heads, pictures: Pictures, pick: Numbers) -> tuple[Tensor, float]:
    """Loss of the pictures `pick`, and how many of the patches that show something name it rightly."""
    with autocast():
        states = tower(normalise(pictures.images[pick]), output_hidden_states=True).hidden_states[-1]
        kind, colour, count = heads(states.float())
    kinds, colours = torch.from_numpy(pictures.kinds[pick]), torch.from_numpy(pictures.colours[pick])
    weight = torch.ones(len(LABELS))
    weight[0] = 0.1  # most patches show nothing
    loss = F.cross_entropy(kind.float().flatten(0, 1), kinds.flatten(), weight)
    loss = loss + 0.5 * F.cross_entropy(colour.float().flatten(0, 1), colours.flatten())
    loss = loss + 0.2 * F.cross_entropy(count.float(), torch.from_numpy(pictures.counts[pick]))
    there = kinds > 0
    return loss, (kind.argmax(-1) == kinds)[there].float().mean().item()


def train_tower(tower: nn.Module, pictures: Pictures, recipe: Recipe, log: Log) -> None:
    """Train the vision tower on the drawn pictures; the heads are thrown away."""
    _start(tower, recipe.tower_start)
    heads = Heads(recipe.vision_width)
    optimizer = Optimizer([tower, heads], recipe.tower_lr, recipe.tower_steps, recipe.tower_falloff)
    rng = np.random.default_rng([recipe.seed, 2])
    order = np.empty(0, np.int64)
    for number in range(recipe.tower_steps + 1):
        if len(order) < recipe.tower_batch:
            order = rng.permutation(len(pictures.images))
        pick, order = order[: recipe.tower_batch], order[recipe.tower_batch :]
        loss, right = _tower_loss(tower, heads, pictures, pick)
        optimizer.step(loss)
        if number % 100 == 0:
            log("tower", step=number, loss=round(loss.item(), 4), kind_accuracy=round(right, 4))
