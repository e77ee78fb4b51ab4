"""A start for the connector in closed form: one hidden unit for each of many names, which says the name's embedding.

LLaVA starts from chance, on 558,000 pairs. Here there are 3,000 drawings, and a connector that is trained on them by gradients
learns the drawings: of a maker that it never saw it read 62 to 68 % of the names, and ridge regression on the same states reads
75 to 80 %. So the first layer is that regression, a unit for each name, and GELU lets through the patches that speak clearly
for it: the tokens of a picture then lie nearer to its name than those of the regression alone (edgesafe/align/LOG.md).

An earlier exit's states want a regression of their own. A linear map in front of the first layer brings most of it: such a map
is an exit map of the checkpoint, and the connector stays one for all.

W tower width, D text width, C names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgesafe.checkpoint.exit_maps import full_map
from edgesafe.checkpoint.exit_model import ExitModel
from edgesafe.reference.smol.states import Seen, at
from edgesafe.reference.smol.things import THINGS

_RIDGE = 0.01  # over the spread of a state
_PATCHES = 16  # the regression reads means of so many patches of a picture: patches alone say less, means of all hide them
_CLEAR = 0.5  # spreads of a unit's input below which it says nothing
_CHUNK = 512  # views that are looked at together
_SHARP = 4.0  # GELU's width is a spread over this


def warm(model: ExitModel, seen: Seen, say: Callable[[Mapping[str, Any]], None]) -> None:
    """Set the connector, from every view of every drawing.

    Args:
        model: Its connector is set in place; its input embeddings say what names are.
        seen: States of pictures, and their names.
        say: Gets a line of the log.
    """
    connector = model.model.get_submodule(model.recipe.projector)
    names = _names(seen, len(connector.get_parameter("linear_1.bias")))
    place = {emoji: index for index, emoji in enumerate(names)}
    pairs = [pair for pair in sorted(seen.states) if pair[1] in place]
    views = torch.cat([seen.states[pair][:, -1] for pair in pairs])
    of = torch.cat([torch.full((len(seen.states[pair]),), place[pair[1]]) for pair in pairs])
    read, at = detectors(views, nn.functional.one_hot(of, len(names)))
    spread = _spread(views, read, at)
    clear = _CLEAR * spread
    says = torch.cat([nn.functional.relu(some.float() @ read + at - clear).mean(1) for some in torch.split(views, _CHUNK)])
    right = (says.argmax(1) == of).double().mean()
    say({"stage": "warm", "views": len(views), "names": len(names), "right": round(float(right), 3)})
    embeddings = torch.stack([embedding(model, seen.names[emoji]) for emoji in names])
    middle = embeddings.mean(0)
    own = embeddings - middle
    towards = nn.functional.normalize(own, dim=1)
    length = own.norm(dim=1).median() / (says @ towards).norm(dim=1).mean()
    sharp = _SHARP / spread
    put(connector, read * sharp, (at - clear) * sharp, towards * length / sharp, middle)


def early_maps(
    model: ExitModel, seen: Seen, depths: Sequence[int], say: Callable[[Mapping[str, Any]], None]
) -> dict[int, nn.Module]:
    """Exit maps in front of the model's connector, which is left as it is.

    Args:
        model: Its connector is that of the reference depth.
        seen: States at `depths` and, behind them, at the reference depth.
        depths: For which maps are made.
        say: Gets a line of the log.
    """
    connector = model.model.get_submodule(model.recipe.projector)
    own = {name: weight.clone() for name, weight in connector.state_dict().items()}
    maps: dict[int, nn.Module] = {}
    for place, depth in enumerate(depths):
        warm(model, at(seen, [place]), say)
        maps[depth] = in_front(connector.linear_1, own["linear_1.weight"], own["linear_1.bias"])
    connector.load_state_dict(own)
    return maps


@torch.no_grad()
def in_front(wanted: nn.Linear, weight: Tensor, bias: Tensor) -> nn.Module:
    """The map of states through which a layer of weight [C, W] and bias [C] comes nearest to another, by least squares."""
    back = torch.linalg.pinv(weight.double())
    return full_map((back @ wanted.weight.double()).float(), (back @ (wanted.bias - bias).double()).float())


def _names(seen: Seen, most: int) -> list[str]:
    """Emoji with names: the things that are asked about, then others."""
    drawn = {emoji for _, emoji in seen.states if emoji in seen.names}
    things = [thing.emoji for thing in THINGS if thing.emoji in drawn]
    return [*things, *sorted(drawn - set(things))][:most]


def detectors(views: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [W, C] and biases [C] by which a patch speaks for names.

    Args:
        views: States [N, P, W], of any precision.
        chosen: [N, C], 1 at each view's name.
    """
    means = torch.cat([some.float().mean(1) for some in torch.split(views, _CHUNK)]).double()
    mean, spread = means.mean(0), means.std(0).clamp(min=1e-3)
    z = (means - mean) / spread
    square = z.T @ z + _RIDGE * len(z) * torch.eye(z.shape[1], dtype=z.dtype)
    for some in map(Tensor.float, torch.split(views, _CHUNK)):
        off = ((some - some.mean(1, keepdim=True)).double() / spread).flatten(0, 1)
        square += off.T @ off / (views.shape[1] * _PATCHES)
    wanted = chosen.double()
    read = torch.linalg.solve(square, z.T @ (wanted - wanted.mean(0))) / spread[:, None]
    return read.float(), (-mean @ read).float()


def _spread(views: Tensor, read: Tensor, at: Tensor) -> Tensor:
    """The spread of all scores of patches, without holding them: there are some hundred million."""
    count, total, square = 0, 0.0, 0.0
    for some in torch.split(views, _CHUNK):
        scores = (some.float() @ read + at).double()
        count, total, square = count + scores.numel(), total + float(scores.sum()), square + float(scores.square().sum())
    return torch.tensor(((square - total * total / count) / (count - 1)) ** 0.5)


def embedding(model: ExitModel, name: str) -> Tensor:
    """The mean input embedding [D] of a name's tokens, without the article."""
    first, _, rest = name.partition(" ")
    word = rest if first in ("a", "an") and rest else name
    ids = model.processor.tokenizer(" " + word, add_special_tokens=False)["input_ids"]
    weight: Tensor = model.model.get_input_embeddings().weight
    return weight[torch.tensor(ids)].detach().mean(0)


@torch.no_grad()
def put(connector: nn.Module, down: Tensor, at: Tensor, up: Tensor, middle: Tensor) -> None:
    """Make the connector compute `middle + gelu(x @ down + at) @ up`; units that are left over say nothing."""
    weights = {"linear_1.weight": down.T, "linear_1.bias": at, "linear_2.weight": up.T, "linear_2.bias": middle}
    for name, weight in weights.items():
        own = connector.get_parameter(name)
        own.zero_()
        own[tuple(slice(size) for size in weight.shape)] = weight.to(own.dtype)
