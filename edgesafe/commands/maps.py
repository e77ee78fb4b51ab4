"""Fit a linear map per exit from unlabelled pictures, before any retraining.

An early exit's state is not poor, it lies elsewhere than the one that the projector was trained on. A map per exit, solved in
closed form, brings it there: most of the sight and of the refusals come back. Writes the checkpoint with its maps to a new
folder; align, evaluate and export use them. A stopped run continues when it is started again.

Example:
  edgesafe maps MODEL --pictures photos --out build/mapped
"""

from __future__ import annotations

import argparse

from edgesafe.commands._shared import add_json, add_model, folder, keep_apart, model_folder, print_json, quiet_libraries
from edgesafe.maps import PICTURES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe maps`."""
    add_model(parser)
    text = "a few hundred pictures such as the model will see, in any folders below DIR; no labels are needed"
    parser.add_argument("--pictures", type=folder, metavar="DIR", required=True, help=text)
    parser.add_argument("--out", type=folder, metavar="DIR", required=True, help="new folder for the checkpoint with its maps")
    text = "use at most N pictures (default: %(default)s; more change little)"
    parser.add_argument("--limit", type=_count, metavar="N", default=PICTURES, help=text)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Fit, write and print how much of the reference exit's state each exit now reaches."""
    from edgesafe.maps.fit import describe, write_mapped

    quiet_libraries()
    keep_apart(args.out, MODEL=args.model, **{"--pictures": args.pictures})
    record = write_mapped(model_folder(args.model), args.pictures, args.out, limit=args.limit)
    if args.json:
        print_json({"checkpoint": str(args.out), **record})
    else:
        print(f"{describe(record)}\n{args.out}")
    return 0


def _count(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError("at least 2")
    return number
