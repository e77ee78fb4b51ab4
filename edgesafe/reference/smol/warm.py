"""A start for the connector that costs a minute: a picture's tokens are drawn towards the embedding of the picture's name.

LLaVA starts from chance, on 558,000 pairs. Here there are 7,000 pictures: a decoder that reads the name's own embedding where
the picture stands can already say it, and the stage that follows has only to tune that.

W tower width, D text width.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgesafe.checkpoint.exit_model import ExitModel
from edgesafe.reference.smol.states import Seen

_BATCH, _PATCHES = 192, 16
_SHARP = 20.0  # cosines of names times this are their logits
_SAY = 100


def warm(model: ExitModel, seen: Seen, steps: int, seed: int, say: Callable[[Mapping[str, Any]], None]) -> None:
    """Train the connector towards names.

    Args:
        model: Its connector is trained in place; its input embeddings say what names are.
        seen: States of pictures, and their names.
        steps: Updates.
        seed: Of the batches.
        say: Gets a line of the log now and then.
    """
    rng = random.Random(f"{seed} warm")
    emoji = sorted({one for _, one in seen.states if one in seen.names})
    wanted = nn.functional.normalize(torch.stack([embedding(model, seen.names[one]) for one in emoji]), dim=-1)
    size = float(model.model.get_input_embeddings().weight.norm(dim=-1).median())
    connector = model.model.get_submodule(model.recipe.projector)
    connector.requires_grad_(True)
    start(connector, torch.cat([one[:1, -1] for one in seen.states.values()]).float())
    optimizer = torch.optim.AdamW(connector.parameters(), lr=1e-3, weight_decay=0.01)
    place = {one: index for index, one in enumerate(emoji)}
    pairs = [pair for pair in sorted(seen.states) if pair[1] in place]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        batch = rng.choices(pairs, k=_BATCH)
        tokens = connector(torch.stack([_some(seen.states[pair], rng) for pair in batch]).float())
        scores = _SHARP * nn.functional.normalize(tokens.mean(1), dim=-1) @ wanted.T
        target = torch.tensor([place[one] for _, one in batch])
        loss = nn.functional.cross_entropy(scores, target)
        uneven = (tokens.norm(dim=-1) / size - 1).square().mean()  # tokens as long as those of words
        optimizer.zero_grad()
        (loss + uneven).backward()
        optimizer.step()
        if (step + 1) % _SAY == 0:
            right = (scores.argmax(-1) == target).float().mean()
            say(
                {"stage": "warm", "step": step + 1, "of": steps, "loss": round(loss.item(), 3), "right": round(right.item(), 3)}
            )
    connector.requires_grad_(False)


def embedding(model: ExitModel, name: str) -> Tensor:
    """The mean input embedding [D] of a name's tokens, without the article."""
    first, _, rest = name.partition(" ")
    word = rest if first in ("a", "an") and rest else name
    ids = model.processor.tokenizer(" " + word, add_special_tokens=False)["input_ids"]
    weight: Tensor = model.model.get_input_embeddings().weight
    return weight[torch.tensor(ids)].detach().mean(0)


@torch.no_grad()
def start(connector: nn.Module, states: Tensor) -> None:
    """Let the connector's first layer see states of mean 0 and spread 1: DINOv2's own are small and lean to one side."""
    flat = states.flatten(0, 1)
    mean, spread = flat.mean(0), flat.std(0).clamp(min=1e-3)
    weight, bias = connector.get_parameter("linear_1.weight"), connector.get_parameter("linear_1.bias")
    weight.copy_(torch.randn_like(weight) * len(mean) ** -0.5 / spread)
    bias.copy_(-weight @ mean)
    nn.init.normal_(connector.get_parameter("linear_2.weight"), std=0.02)


def _some(views: Tensor, rng: random.Random) -> Tensor:
    """Some patches [16, W] of a view: less to compute, and no two batches are alike."""
    view = views[rng.randrange(len(views)), -1]
    return view[rng.sample(range(len(view)), min(_PATCHES, len(view)))]
