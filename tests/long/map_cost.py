"""What exit maps cost at LLaVA-1.5-7B's size: bytes of all of them, and time beside a first token. Random weights.

A map's int8 graph, made and quantized by the export's own code, is run in turns with the tower's segment before it and the head
behind it. The bundle's bytes and first tokens are those that `make fullsize MODEL=llava-1.5-7b` planned and measured. Beside it
stands the other way to ship a map, folded into the projector's first matrix: every exit would then have a head of its own.

Example:
  python tests/long/map_cost.py --out tests/bench/results/map-cost.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnx
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from edgesafe.checkpoint.exit_maps import full_map
from edgesafe.format.graph_io import HIDDEN_STATES
from edgesafe.format.specs import GraphSpec
from edgesafe.progress import bar, table
from edgesafe.runtime.ort import OrtGraph
from edgesafe_export import graphs
from edgesafe_export.modules import ExitMap, Head, Segment
from edgesafe_export.quantize import quantize
from results import write_result

WIDTH, TOKENS, TEXT, DEPTHS, BLOCKS = 1024, 577, 4096, 24, 3  # the published ladder has an exit every three blocks
SCHEME = "int8-dynamic"
MOST_BYTES, MOST_TIME = 1.01, 1.02
FULLSIZE = Path(__file__).resolve().parents[1] / "bench" / "results" / "fullsize-llava-1.5-7b.json"


def family() -> Any:
    """As much of a family as its graphs are traced from."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    tower = CLIPVisionModel(config).eval()
    blocks = getattr(tower, "vision_model", tower).encoder.layers
    projector = torch.nn.Sequential(torch.nn.Linear(WIDTH, TEXT), torch.nn.GELU(), torch.nn.Linear(TEXT, TEXT))
    own = full_map(torch.eye(WIDTH) + torch.randn(WIDTH, WIDTH) / WIDTH**0.5, torch.randn(WIDTH))
    return SimpleNamespace(
        geometry=SimpleNamespace(tokens=TOKENS, vision_width=WIDTH, rows=TOKENS - 1, image_tokens=TOKENS - 1),
        recipe=SimpleNamespace(shuffle=False),
        text_config=SimpleNamespace(hidden_size=TEXT),
        segment=lambda *_: Segment(list(blocks), None).eval(),
        exit_map=lambda _: ExitMap([own]).eval(),
        head=lambda: Head(projector, 1).eval(),
    )


def make(folder: Path) -> dict[str, tuple[Path, GraphSpec]]:
    """The quantized graphs by name."""
    whole, made = family(), {}
    traced = {"segment": graphs.segment(whole, 1, 1 + BLOCKS), "map": graphs.exit_map(whole, 1), "head": graphs.head(whole)}
    for name, (proto, spec) in traced.items():
        onnx.save(quantize(proto, SCHEME), folder / f"{name}.onnx")
        made[name] = (folder / f"{name}.onnx", spec)
    return made


def timed(made: dict[str, tuple[Path, GraphSpec]], threads: int, rounds: int) -> dict[str, float]:
    """Milliseconds of each graph, the median of rounds in turns."""
    opened = {name: OrtGraph(str(path), spec, threads) for name, (path, spec) in made.items()}
    feeds = {HIDDEN_STATES: np.random.default_rng(0).standard_normal((1, TOKENS, WIDTH)).astype(np.float32)}
    samples: dict[str, list[float]] = {name: [] for name in opened}
    for number in bar(range(rounds + 1), rounds + 1, "rounds"):
        for name, graph in opened.items():
            began = time.perf_counter()
            graph.run(feeds)
            if number:  # the first one warms up
                samples[name].append(1e3 * (time.perf_counter() - began))
    return {name: round(median(own), 2) for name, own in samples.items()}


def main() -> None:
    """Make, run, print and write; the exit code says whether both limits hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plain = json.loads(FULLSIZE.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        made = make(Path(folder))
        size = {name: path.stat().st_size for name, (path, _) in made.items()}
        ms = timed(made, args.threads, args.rounds)
    bundle, first = plain["plan"]["bundle_bytes"], min(row["ttft_ms"] for row in plain["every_exit"]["rows"])
    maps, folded = DEPTHS - 1, WIDTH * TEXT  # int8: a byte a weight
    found = {
        "bytes": {"map": size["map"], "maps": maps, "bundle": bundle, "ratio": round(1 + maps * size["map"] / bundle, 4)},
        "folded": {"exit": folded, "ratio": round(1 + maps * folded / bundle, 4)},
        "ms": ms,
        "first_token": {"shortest_ms": first, "ratio": round(1 + ms["map"] / first, 4)},
        "tower": {"segment_blocks": BLOCKS, "map_over_block": round(ms["map"] * BLOCKS / ms["segment"], 3)},
    }
    kept = found["bytes"]["ratio"] <= MOST_BYTES and found["first_token"]["ratio"] <= MOST_TIME
    print(table([[name, size[name] / 1e6, ms[name]] for name in made], ["graph", "MB", "ms"]))
    print(json.dumps({key: found[key] for key in ("bytes", "folded", "first_token", "tower")}, indent=1))
    write_result(args.out, {"threads": args.threads, "rounds": args.rounds, **found, "kept": kept})
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
