"""Ways to give `smol` earlier exits, side by side: what each names, refuses and answers of an unseen maker's drawings.

    python tests/long/smol_ways.py BASE ADAPTER WORK [--aligned DIR] --out tests/bench/results/smol-ways.json

raw         the exit's states through the connector of the reference depth
map         a linear map of the exit's states to those of the reference depth, as `edgesafe maps` fits it: it knows no names
adapter     such a map, trained by gradients on names and requests through the frozen decoder, from no change on
connector   a connector of the exit's own, fitted to names at its depth as the reference's was
connector's map  a map in front of the reference's connector that comes as near as it can to the exit's own connector
one for all one connector, fitted to names at all these depths at once
aligned     the map, and the decoder retrained at all exits: the checkpoint that `make smol` made (--aligned)

BASE, ADAPTER and WORK are those of `smol_exits.py`, whose rows are asked. A stopped run continues.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent)]

from smol_exits import UNSEEN, Asked, answer, figures, make_about, see_all  # noqa: E402

from edgesafe.checkpoint.exit_maps import attach, detach, full_map, maps_of  # noqa: E402
from edgesafe.checkpoint.exit_model import ExitModel, autocast, load  # noqa: E402
from edgesafe.format.files import write_atomically  # noqa: E402
from edgesafe.maps.fit import fit  # noqa: E402
from edgesafe.maps.gather import by_content  # noqa: E402
from edgesafe.progress import bar  # noqa: E402
from edgesafe.reference.smol.adapter import apply_adapter, read_adapter  # noqa: E402
from edgesafe.reference.smol.packing import ask_losses, logits, pack  # noqa: E402
from edgesafe.reference.smol.pictures import MAKERS, fetch  # noqa: E402
from edgesafe.reference.smol.rows import BLANK, groups  # noqa: E402
from edgesafe.reference.smol.ship.training import read_answers  # noqa: E402
from edgesafe.reference.smol.states import Seen, at, see_training  # noqa: E402
from edgesafe.reference.smol.train import schedule  # noqa: E402
from edgesafe.reference.smol.warm import in_front, warm  # noqa: E402

DEPTHS = (8, 9, 10)
STEPS, BATCH, LR = 60, 8, 3e-4
_FEW = 2  # views of a drawing at each depth that one connector for all is fitted to: more take 20 GB


def trained_map(model: ExitModel, seen: Seen, seed: int = 0) -> Any:
    """A map of states [.., W] trained on names and requests; the connector and the decoder stay as they are."""
    width = model.geometry.vision_width
    made = full_map(torch.eye(width), torch.zeros(width)).requires_grad_(True)
    rng = random.Random(f"adapter {seed}")
    drawn = [group for group in groups(read_answers(), 2 * STEPS * BATCH, seed + 2, lean=True) if group.emoji != BLANK]
    optimizer = torch.optim.AdamW(made.parameters(), lr=LR, weight_decay=0.0)
    model.model.requires_grad_(False)
    for step in bar(range(STEPS), STEPS, "adapter"):
        batch = drawn[step * BATCH : (step + 1) * BATCH]
        states = torch.stack([rng.choice(seen.states[rng.choice(seen.makers(g.emoji)), g.emoji])[-1] for g in batch]).float()
        optimizer.param_groups[0]["lr"] = LR * schedule(step, STEPS)
        packed = pack(model, batch)
        with autocast("bf16"):
            loss = ask_losses(logits(model, packed, made(states)), packed).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
    return made.requires_grad_(False)


def prepare(model: ExitModel, way: str, depth: int, maps: Mapping[int, Any], seen: Seen, own: Mapping[str, Tensor]) -> int:
    """Make the model answer at a depth in one of the ways; returns the weights that this exit has for itself."""
    connector = model.model.get_submodule(model.recipe.projector)
    connector.load_state_dict(own)
    detach(model.model)
    attach(model.model, {})
    made: nn.Module | None = None
    if way in ("connector", "connector's map", "one for all"):
        fitted = at(seen, range(len(DEPTHS) + 1), _FEW) if way == "one for all" else at(seen, [DEPTHS.index(depth)])
        warm(model, fitted, lambda line: print(json.dumps(line), file=sys.stderr, flush=True))
        made = connector if way == "connector" else None
    if way in ("map", "adapter", "connector's map"):
        if way == "connector's map":
            made = in_front(connector.linear_1, own["linear_1.weight"], own["linear_1.bias"])
            connector.load_state_dict(own)
        else:
            made = maps[depth] if way == "map" else trained_map(model, at(seen, [DEPTHS.index(depth)]))
        attach(model.model, {depth: made})
    return size(made)


def size(module: nn.Module | None) -> int:
    """How many weights a module has, if there is one."""
    return sum(weight.numel() for weight in module.parameters()) if module else 0


def main() -> None:
    """Ask every way at every depth, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "adapter", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--aligned", type=Path, help="the aligned checkpoint of `make smol`; without it that way is left out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, choices=DEPTHS, help="that are asked (default: all)")
    parser.add_argument("--most", type=int, default=40, help="rows of each family at most (default: %(default)s)")
    args = parser.parse_args()
    model = load(args.base)
    states = see_all(model, args.work)
    makers = [name for name, maker in MAKERS.items() if not maker.held_out]
    maps = fit(model, by_content([p for m in makers for p in (args.work / "plain" / m).iterdir()]), args.work / "exits").maps
    every = (*DEPTHS, model.reference.depth)
    seen = see_training(model, fetch(args.work / "pictures", makers), args.work / "depths", depths=every)
    adapter = read_adapter(args.adapter)
    apply_adapter(model.model, adapter)
    own = copy.deepcopy(model.model.get_submodule(model.recipe.projector).state_dict())
    asked = [one for one in make_about(random.Random("smol 0"), args.most) if one.maker == UNSEEN]
    found = json.loads(args.out.read_text()) if args.out.is_file() else {}
    if found.get("adapter") != adapter.sha256:
        found = {"adapter": adapter.sha256, "ways": {}}
    ways = ["raw", "map", "connector", "connector's map", "one for all", "adapter"]
    for way, depth in [("reference", model.reference.depth), *((way, depth) for depth in args.depths for way in ways)]:
        if (name := f"{way} {depth}") not in found["ways"]:
            weights = prepare(model, way, depth, maps, seen, own)
            _ask(model, name, weights, asked, states, depth, found, args.out)
    if args.aligned:
        model = load(args.aligned)
        for depth in (*args.depths, model.reference.depth):
            weights = size(maps_of(model.model).get(depth))
            _ask(model, f"aligned {depth}", weights, asked, states, depth, found, args.out)


def _ask(
    model: ExitModel, name: str, weights: int, asked: list[Asked], states: Any, depth: int, found: dict[str, Any], out: Path
) -> None:
    found["ways"][name] = {"weights": weights, **figures(asked, answer(model, asked, states, depth))}
    write_atomically(out, (json.dumps(found, indent=1) + "\n").encode())
    said = {key: f"{one['k']}/{one['n']} {one['measure']}" for key, one in found["ways"][name].items() if key != "weights"}
    print(name, weights, said, flush=True)


if __name__ == "__main__":
    main()
