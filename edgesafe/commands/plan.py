"""Predict the size, memory and time of an export, without loading any weights.

Takes seconds even for a model of 14 GB; for a model on the hub, only headers are fetched. `edgesafe ship --plan`
says it of the whole way, from rows to certificate.

With --evaluation the exits of an evaluation on a validation suite are planned, and those named that no faster one equals.

Example:
  edgesafe plan llava-hf/llava-1.5-7b-hf --device rpi5
  edgesafe plan ALIGNED --device rpi5 --evaluation build/val
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edgesafe.commands._shared import add_json, add_model, add_schemes, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe plan`."""
    add_model(parser)
    add_schemes(parser)
    text = "what `edgesafe evaluate` wrote: plan its exits, and say which of them are worth exporting"
    parser.add_argument("--evaluation", type=Path, metavar="DIR", help=text)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from edgesafe.checkpoint.hub import resolve_outline
    from edgesafe.device import load_device
    from edgesafe.format.exits import MOST_RUNGS
    from edgesafe_export.front import front, read_accuracy
    from edgesafe_export.plan import choose_ladder, describe, make_plan
    from edgesafe_export.quantize import check_schemes
    from edgesafe_export.skeleton import open_sketch

    device = load_device(args.device)
    schemes = {"vision": args.vision_scheme or device.vision_scheme, "text": args.text_scheme or device.text_scheme}
    check_schemes(schemes["vision"], schemes["text"])
    accuracy = read_accuracy(args.evaluation) if args.evaluation else {}
    folder, name, header = resolve_outline(args.model)
    sketch = open_sketch(folder, header)
    exits = args.exits or ",".join(map(str, accuracy)) or None
    ladder = choose_ladder(sketch, exits, None if accuracy else MOST_RUNGS)
    plan = make_plan(sketch, folder, name, device, ladder, args.layout, schemes)
    best = ",".join(map(str, front(plan, accuracy))) if accuracy else ""
    if args.json:
        print_json({**plan.to_dict(), **({"front": best} if best else {})})
    else:
        print(describe(plan) + (f"\nno faster exit answers as well as one of these: --exits {best}" if best else ""))
    return 0
