"""Turn a checkpoint into a bundle for a device.

Every graph is checked against what transformers computes before anything is written.

Example:
  edgesafe export build/aligned --device rpi5 --suite build/suite --out build/bundle
"""

from __future__ import annotations

import argparse

from edgesafe.commands._shared import add_export, add_model, folder, keep_apart, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe export`: those of `edgesafe plan` and where the bundle goes."""
    add_model(parser)
    text = "folder of the bundle; an older one is replaced when the new one is complete"
    parser.add_argument("--out", type=folder, metavar="DIR", required=True, help=text)
    add_export(parser)


def run(args: argparse.Namespace) -> int:
    """Export and print what came out."""
    from edgesafe.device import load_device
    from edgesafe_export.export import export_bundle

    keep_apart(args.out, MODEL=args.model, **{"--suite": args.suite})
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
        accept_damage=args.accept_damage,
    )
    manifest = bundle.manifest
    exits = [str(exit) for exit in manifest.ladder]
    report = {
        "bundle": str(args.out),
        "digest": bundle.digest,
        "exits": exits,
        "quantization": manifest.quantization,
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "parity": manifest.parity,
    }
    if args.json:
        print_json(report)
    else:
        shown = {**report, "exits": f"[{', '.join(exits)}]"}
        print("\n".join(f"{key}: {value}" for key, value in shown.items()))
    return 0
