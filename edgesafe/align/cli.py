"""`edgesafe align` and `edgesafe evaluate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from edgesafe.progress import speaks, step


def add_align_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe align`."""
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--config", type=Path, help="TOML file (default: the shipped l-sft.toml)")
    parser.add_argument("--data", help="folder of training rows (wins over the config's)")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the aligned checkpoint")
    parser.add_argument("--seed", type=int, help="wins over the config's")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of an interrupted run")


def run_align(args: argparse.Namespace) -> int:
    """Run `edgesafe align`; returns the exit code."""
    from edgesafe.align.config import default_config, read_config
    from edgesafe.align.memory import say_need
    from edgesafe.align.train import align

    _quiet()
    config = read_config(args.config or default_config(), data=args.data, seed=args.seed)
    with step(f"align {args.model} ({config.method}, {config.steps} updates)"):
        say_need(args.model, config)
        align(args.model, config, args.out, resume=args.resume)
    if speaks():
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
        "--out", type=Path, required=True, help="new folder for report.json and .html, answers.jsonl, table.txt, plot.png"
    )
    parser.add_argument(
        "--before",
        "--compare",
        type=Path,
        metavar="DIR",
        help="an earlier evaluation's folder, drawn into the same plot and tested against row by row",
    )
    parser.add_argument("--depths", default="all", help="exit depths, e.g. 'all', '1-6', '2,4' (the reference depth is added)")
    parser.add_argument(
        "--second-judge",
        default="auto",
        metavar="JUDGE",
        help="'grammar', 'none', or the folder or hub id of a guard model (default: grammar for the reference world's suites)",
    )
    parser.add_argument("--toxicity", metavar="MODEL", help="folder or hub id of a toxicity classifier")
    parser.add_argument("--reward-config", type=Path, metavar="TOML", help="report the reward of its table [reward] as well")
    parser.add_argument("--controls", action="store_true", help="answer without, with blank, noise and rescaled pictures too")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")


def run_evaluate(args: argparse.Namespace) -> int:
    """Run `edgesafe evaluate`; returns the exit code."""
    from edgesafe.evaluate.evaluate import evaluate
    from edgesafe.evaluate.judges import open_second
    from edgesafe.evaluate.text_report import report_table
    from edgesafe.format.suite import read_suite

    _quiet()
    second = open_second(args.second_judge, read_suite(args.suite, verify=False).name)
    reward = toxicity = None
    if args.reward_config:
        from edgesafe.align.config import read_config
        from edgesafe.align.reward.open import open_reward

        reward = open_reward(read_config(args.reward_config).reward)
    if args.toxicity:
        from edgesafe.evaluate.toxicity import open_toxicity

        toxicity = open_toxicity(args.toxicity)
    options = {"second": second, "reward": reward, "toxicity": toxicity}
    with step(f"evaluate {args.model} on {args.suite}"):
        report = evaluate(
            args.model, args.suite, args.out, before=args.before, depths=args.depths, controls=args.controls, **options
        )
    print(json.dumps(report) if args.json else report_table(report))
    return 0
