"""Predict the size, memory and time of an export, without loading any weights.

Takes seconds even for a model of 14 GB; for a model on the hub, only headers are fetched. `edgesafe ship --plan`
says it of the whole way, from rows to certificate.

Example:
  edgesafe plan llava-hf/llava-1.5-7b-hf --device rpi5
"""

from __future__ import annotations

import argparse

from edgesafe.commands._shared import add_json, add_model, add_schemes, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe plan`."""
    add_model(parser)
    add_schemes(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from edgesafe.checkpoint.hub import resolve_outline
    from edgesafe.device import load_device
    from edgesafe_export.plan import choose_ladder, describe, make_plan
    from edgesafe_export.quantize import check_schemes
    from edgesafe_export.skeleton import open_sketch

    device = load_device(args.device)
    schemes = {"vision": args.vision_scheme or device.vision_scheme, "text": args.text_scheme or device.text_scheme}
    check_schemes(schemes["vision"], schemes["text"])
    folder, name, header = resolve_outline(args.model)
    sketch = open_sketch(folder, header)
    plan = make_plan(sketch, folder, name, device, choose_ladder(sketch, args.exits), args.layout, schemes)
    if args.json:
        print_json(plan.to_dict())
    else:
        print(describe(plan))
    return 0
