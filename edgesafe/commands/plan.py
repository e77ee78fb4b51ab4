"""Predict the size, memory and time of an export, without loading any weights.

Takes seconds even for a model of 14 GB; for a model on the hub, only headers are fetched.

Example:
  edgesafe plan llava-hf/llava-1.5-7b-hf --device rpi5
"""

from __future__ import annotations

import argparse

from edgesafe.commands._shared import add_json, add_model, print_json, utf8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe plan`."""
    add_model(parser)
    parser.add_argument("--device", type=utf8, required=True, help="profile name (`edgesafe devices`), or a TOML file")
    text = "one graph per segment, or one whole graph per exit (default: %(default)s)"
    parser.add_argument("--layout", choices=("chain", "standalone"), default="chain", help=text)
    text = "weights of the vision tower: int8-dynamic or fp32 (default: the device's)"
    parser.add_argument("--vision-scheme", metavar="SCHEME", help=text)
    text = "weights of the text model: auto (the smallest that answers and reads as the checkpoint does), int4-gptq, "
    text += "mixed-gptq, int4-block32, int4-block64, int4-block128, int8-block32 or fp32 (default: the device's)"
    parser.add_argument("--text-scheme", metavar="SCHEME", help=text)
    text = 'exits to export, e.g. "3,6,9", "1-11", "every:2" or "all"; "6-12@9" have 9 visual tokens, where a picture is one '
    text += "square of them (default: all of a small tower, eight of a large one)"
    parser.add_argument("--exits", metavar="EXITS", help=text)
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
