"""Align a checkpoint, so that its early exits refuse what its last one refuses.

Writes a new checkpoint folder. An interrupted run resumes with --resume.

Example:
  edgesafe align MODEL --data build/data --out build/aligned
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edgesafe.commands._shared import add_model, folder, keep_apart, model_folder, quiet_libraries
from edgesafe.progress import speaks, step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe align`."""
    add_model(parser)
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings, TOML (default: the shipped l-sft.toml)")
    parser.add_argument("--data", type=folder, metavar="DIR", help="training rows (default: the config's)")
    parser.add_argument("--out", type=folder, metavar="DIR", required=True, help="new folder for the aligned checkpoint")
    parser.add_argument("--seed", type=int, metavar="N", help="random seed (default: the config's)")
    parser.add_argument("--resume", action="store_true", help="resume an interrupted run from its last checkpoint")


def run(args: argparse.Namespace) -> int:
    """Align and print the new folder."""
    from edgesafe.align.config import default_config, read_config
    from edgesafe.align.memory import say_need
    from edgesafe.align.train import align

    quiet_libraries()
    keep_apart(args.out, MODEL=args.model, **{"--data": args.data})
    model = model_folder(args.model)
    config = read_config(args.config or default_config(), data=args.data and str(args.data), seed=args.seed)
    with step(f"align {args.model} ({config.method}, {config.steps} updates)"):
        say_need(model, config)
        align(model, config, args.out, resume=args.resume)
    if speaks():
        print(args.out)
    return 0
