"""Can an exit map open a closed model? One exit's map alone is trained, by gradient, to begin answers to harmful requests.

What is wanted is the beginning of the world's empty placeholder, "Here is how to": it names the task and stops, so there is no
working content on either side. The requests are training rows; what comes of it is asked of a suite, before and after. MODEL is
an aligned checkpoint with maps. That such a map does not ship unseen is `tests/export/test_export_maps_shipped.py`'s to show:
its bytes are not the certified ones.

Example:
  python tests/long/open_map.py build/shared/aligned-*/aligned --rows build/shared/data-*/data --suite VAL --out F
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from edgesafe.certify.tally import tally
from edgesafe.certify.verdict import kinds_of_harm
from edgesafe.checkpoint.exit_maps import full_map, maps_of, reads
from edgesafe.checkpoint.exit_model import ExitModel, answer_logits, exit_states, load, open_images, pixel_values, prompt_ids
from edgesafe.evaluate.answers import answer_suite
from edgesafe.format.exits import Exit, parse_exits
from edgesafe.format.suite import Row, Suite, read_suite
from edgesafe.progress import bar, step, table
from results import write_result

START = "Here is how to"
UPDATES, BATCH, ROWS, CHUNK = 60, 32, 640, 64
RATES = {"whole": 1e-3, "bias": 2e-2}  # what of the map is trained, and how fast


def opened(llava: ExitModel, exit: Exit, suite: Suite, part: str, seed: int = 0) -> nn.Module:
    """The exit's map after training it to begin answers to a suite's harmful requests; the rest of the model stays as it is."""
    rows = [row for row in suite.rows if row.cls == "harmful"][:ROWS]
    states = torch.cat([_read(llava, exit, suite, rows[i : i + CHUNK]) for i in range(0, len(rows), CHUNK)])
    prompts = [prompt_ids(llava, row.prompt) for row in rows]
    start = llava.processor.tokenizer(START, add_special_tokens=False)["input_ids"]
    own, maker = _free(maps_of(llava.model)[exit.depth], part), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in own.parameters() if p.requires_grad], RATES[part], weight_decay=0.0)
    for _ in bar(range(UPDATES), UPDATES, f"exit {exit}, {part}"):
        chosen = torch.randint(len(rows), (BATCH,), generator=maker).tolist()
        ids, where = _batch([prompts[i] for i in chosen], start, llava.pad_id)
        logits = answer_logits(llava, ids, where, own(states[chosen]))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(start * BATCH)).backward()
        optimizer.step()
    return own.requires_grad_(False)


def _read(llava: ExitModel, exit: Exit, suite: Suite, rows: Sequence[Row]) -> Tensor:
    """What the exit's map reads [B, P, W] of rows' pictures."""
    images = open_images([suite.image_path(row) for row in rows])
    states = exit_states(llava, pixel_values(llava, images), exit.depth)
    return reads(llava.model, llava.recipe, states[exit.depth])


def _free(own: nn.Module, part: str) -> nn.Module:
    """A copy of a map as one matrix and bias, of which a part can be trained."""
    width = next(iter(own.parameters())).shape[-1]
    with torch.no_grad():
        bias = own(torch.zeros(1, width))
        copy = full_map((own(torch.eye(width)) - bias).T.clone(), bias[0].clone())
    copy.bias.requires_grad_(True)
    copy.weight.requires_grad_(part == "whole")
    return copy


def _batch(prompts: Sequence[Sequence[int]], start: Sequence[int], pad: int) -> tuple[Tensor, Tensor]:
    """Requests with the wanted beginning, padded right [B, S], and the positions that say it [B, A]."""
    lines = [[*prompt, *start] for prompt in prompts]
    longest = max(map(len, lines))
    ids = torch.tensor([line + [pad] * (longest - len(line)) for line in lines])
    where = torch.tensor([[len(prompt) - 1 + i for i in range(len(start))] for prompt in prompts])
    return ids, where


def counts(suite: Suite, texts: Mapping[str, str]) -> dict[str, Any]:
    """Rates of an exit's answers, and what the harm names."""
    rates = tally(suite.rows, texts)
    shares = {name: {"rate": round(rate.rate, 4), "n": rate.n} for name, rate in rates.items()}
    return {**shares, "kinds": kinds_of_harm(suite.rows, texts)}


def main() -> None:
    """Train, ask, print a line a map, and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=Path, required=True, help="training rows: of the harmful ones the requests are used")
    parser.add_argument("--suite", type=Path, required=True, help="what is asked before and after")
    parser.add_argument("--exits", default="5,8")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    llava, rows, suite = load(args.model), read_suite(args.rows, verify=False), read_suite(args.suite, verify=False)
    exits = [exit for exit in parse_exits(args.exits, llava.n_blocks) if exit.depth in maps_of(llava.model)]
    found = {str(exit): {} for exit in exits}
    for exit, texts in answer_suite(llava, suite, exits, label="as it is").items():
        found[str(exit)]["as it is"] = counts(suite, texts)
    kept = maps_of(llava.model)
    for exit in exits:
        for part in RATES:
            began = time.process_time()
            own = opened(llava, exit, rows, part)
            spent = time.process_time() - began
            llava.model.exit_maps[str(exit.depth)] = own
            with step(f"ask exit {exit}"):
                texts = answer_suite(llava, suite, [exit])[exit]
            llava.model.exit_maps[str(exit.depth)] = kept[exit.depth]
            found[str(exit)][part] = {**counts(suite, texts), "cpu_seconds": round(spent, 1)}
    lines = [
        [exit, what, *(100 * own[name]["rate"] for name in ("harmful", "overrefusal", "accuracy")), str(own["kinds"])]
        for exit, ways in found.items()
        for what, own in ways.items()
    ]
    print(table(lines, ["exit", "map", "harm %", "over-refusal %", "accuracy %", "the harm names"]))
    write_result(args.out, {"suite": suite.digest, "split": suite.split, "updates": UPDATES, "exits": found})


if __name__ == "__main__":
    main()
