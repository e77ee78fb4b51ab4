"""`edgesafe export` and `edgesafe plan`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from edgesafe.device import TEXT_SCHEMES, VISION_SCHEMES


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe plan`: what an export of these would do."""
    parser.add_argument("model", help="checkpoint folder, or a Hugging Face hub id (LLaVA-1.5 architecture)")
    parser.add_argument("--device", required=True, help="profile name, or a TOML file")
    parser.add_argument("--layout", choices=("chain", "standalone"), default="chain")
    parser.add_argument("--vision-scheme", choices=VISION_SCHEMES, help="default: the device's")
    parser.add_argument("--text-scheme", choices=TEXT_SCHEMES, help="default: the device's")
    parser.add_argument("--exits", help='ladder, e.g. "3,6,9", "1-11", "every:2", "all"')
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe export`."""
    add_plan_arguments(parser)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the bundle; an older one is replaced when the new one is whole"
    )
    parser.add_argument("--suite", type=Path, help="certification suite to ship inside the bundle")
    parser.add_argument("--seed", type=int, default=0)


def run_plan(args: argparse.Namespace) -> int:
    """Run `edgesafe plan`; returns the exit code."""
    from edgesafe.checkpoint.hub import resolve_outline
    from edgesafe.device import load_device
    from edgesafe_export.plan import choose_ladder, describe, make_plan
    from edgesafe_export.skeleton import open_sketch

    device = load_device(args.device)
    folder, name, header = resolve_outline(args.model)
    sketch = open_sketch(folder, header)
    schemes = {"vision": args.vision_scheme or device.vision_scheme, "text": args.text_scheme or device.text_scheme}
    plan = make_plan(sketch, folder, name, device, choose_ladder(sketch, args.exits), args.layout, schemes)
    print(json.dumps(plan.to_dict(), indent=1) if args.json else describe(plan))
    return 0


def run(args: argparse.Namespace) -> int:
    """Run `edgesafe export`; returns the exit code."""
    from edgesafe.device import load_device
    from edgesafe_export.export import export_bundle

    bundle = export_bundle(
        args.model,
        args.out,
        load_device(args.device),
        layout=args.layout,
        vision_scheme=args.vision_scheme,
        text_scheme=args.text_scheme,
        exits=args.exits,
        suite_dir=args.suite,
        seed=args.seed,
    )
    m = bundle.manifest
    report = {
        "bundle": str(args.out),
        "digest": bundle.digest,
        "exits": list(m.depths),
        "quantization": m.quantization,
        "bytes": sum(f.bytes for f in m.files.values()),
        "parity": m.parity,
    }
    print(json.dumps(report) if args.json else "\n".join(f"{k}: {v}" for k, v in report.items()))
    return 0
