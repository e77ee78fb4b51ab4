"""`edgesafe align` and `edgesafe evaluate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from edgesafe.progress import step


def add_align_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe align`."""
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--config", type=Path, help="TOML file (default: the shipped self-distill.toml)")
    parser.add_argument("--data", help="folder of training rows (wins over the config's)")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the aligned checkpoint")
    parser.add_argument("--seed", type=int, help="wins over the config's")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of an interrupted run")


def run_align(args: argparse.Namespace) -> int:
    """Run `edgesafe align`; returns the exit code."""
    from edgesafe.align.config import default_config, read_config
    from edgesafe.align.train import align

    _quiet()
    config = read_config(args.config or default_config(), data=args.data, seed=args.seed)
    with step(f"align {args.model} ({config.method}, {config.steps} updates)"):
        align(args.model, config, args.out, resume=args.resume)
    print(args.out)
    return 0


def _quiet() -> None:
    """Leave out the libraries' own bars and notices, which say nothing that a person can act on."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe evaluate`."""
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--suite", type=Path, required=True, help="suite folder")
    parser.add_argument(
        "--out", type=Path, required=True, help="new folder for report.json, answers.jsonl, table.txt, plot.png"
    )
    parser.add_argument(
        "--before", "--compare", type=Path, metavar="DIR", help="an earlier evaluation's folder, drawn into the same plot"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")


def run_evaluate(args: argparse.Namespace) -> int:
    """Run `edgesafe evaluate`; returns the exit code."""
    from edgesafe.align.evaluate import evaluate, report_table

    _quiet()
    with step(f"evaluate {args.model} on {args.suite}"):
        report = evaluate(args.model, args.suite, args.out, before=args.before)
    print(json.dumps(report) if args.json else report_table(report))
    return 0
