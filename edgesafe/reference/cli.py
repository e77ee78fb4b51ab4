"""`edgesafe reference draw | data | build`: the drawn world and the model that lives in it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edgesafe.errors import InputError
from edgesafe.format.files import replacing
from edgesafe.format.targets import NEW, check_target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe reference`."""
    actions = parser.add_subparsers(dest="action", required=True)
    draw = actions.add_parser("draw", help="draw sample pictures, each with its request and wanted answer")
    draw.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    draw.add_argument("--count", type=int, default=12, help="how many (default 12)")
    draw.add_argument("--seed", type=int, default=0)
    data = actions.add_parser("data", help="write training data or a suite")
    data.add_argument("--split", choices=("train", "val", "cert", "test"), required=True)
    data.add_argument("--out", type=Path, required=True)
    data.add_argument("--count", type=int, default=6000, help="rows of the train split (default 6000)")
    data.add_argument("--scale", type=float, default=1.0, help="size of a suite, 1.0 = 1240 rows (cert: 800)")
    data.add_argument("--seed", type=int, default=0)
    build = actions.add_parser("build", help="train the reference model from scratch (needs edgesafe[align])")
    build.add_argument("--out", type=Path, required=True)
    build.add_argument("--seed", type=int, default=7)


def run(args: argparse.Namespace) -> int:
    """Run `edgesafe reference`; returns the exit code."""
    if args.action == "draw":
        _draw(args.out, args.count, args.seed)
    elif args.action == "data":
        from edgesafe.reference.data import write_split, write_training

        check_target(args.out)  # before the drawing; an older suite would be replaced
        if args.split == "train":
            write_training(args.out, args.count, seed=args.seed)
        else:
            write_split(args.out, args.split, scale=args.scale, seed=args.seed)
    else:
        from edgesafe.reference.build import Recipe, build

        build(args.out, Recipe(seed=args.seed), say=lambda line: print(line, file=sys.stderr, flush=True))
    return 0


def _draw(out: Path, count: int, seed: int) -> None:
    """`count` pictures of the val split, one family after the other, and their requests and wanted answers in requests.tsv."""
    from edgesafe.reference.world import FAMILIES, sample

    if count < 1:
        raise InputError("nothing to draw", where="--count", expected="1 or more", todo="give a larger number")
    lines = []
    with replacing(out) as work:
        (folder := work / NEW).mkdir()
        for i in range(count):
            s = sample(FAMILIES[i % len(FAMILIES)][0], "val", i // len(FAMILIES), seed)
            name = f"{i:03d}-{s.family}.png"
            s.image.save(folder / name)
            lines.append(f"{name}\t{s.prompt}\t{s.target}\n")
        (folder / "requests.tsv").write_text("".join(lines), encoding="utf-8")
    print("".join(lines), end="")
