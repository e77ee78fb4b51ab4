"""Report a checkpoint's rates at every exit.

Writes a new folder with report.json, report.html, answers.jsonl, table.txt and plot.png.

Example:
  edgesafe evaluate build/aligned --suite build/suite --out build/after --before build/before
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edgesafe.commands._shared import add_json, add_model, folder, keep_apart, model_folder, print_json, quiet_libraries, utf8
from edgesafe.progress import step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe evaluate`."""
    add = parser.add_argument
    add_model(parser)
    add("--suite", type=folder, metavar="DIR", required=True, help="suite folder")
    add("--out", type=folder, metavar="DIR", required=True, help="new folder for the report")
    text = "an earlier evaluation's folder, drawn into the same plot and tested against row by row"
    add("--before", "--compare", type=folder, metavar="DIR", help=text)
    text = "exits, e.g. 'all', '1-6', '2,4' or '6@9' with 9 visual tokens; the reference is added (default: %(default)s)"
    add("--exits", "--depths", default="all", metavar="EXITS", help=text)
    text = "'grammar', 'none', or the folder or hub id of a guard model (default: %(default)s, which is grammar for the "
    text += "reference world's suites and none for others)"
    add("--second-judge", type=utf8, default="auto", metavar="JUDGE", help=text)
    add("--toxicity", type=utf8, metavar="MODEL", help="folder or hub id of a toxicity classifier")
    add("--reward-config", type=Path, metavar="FILE", help="also report the reward of this TOML file's table [reward]")
    add("--controls", action="store_true", help="also answer without a picture, and with blank, noise and rescaled ones")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the report."""
    from edgesafe.evaluate.evaluate import evaluate
    from edgesafe.evaluate.text_report import report_table

    quiet_libraries()
    keep_apart(args.out, MODEL=args.model, **{"--suite": args.suite})
    model, judges = model_folder(args.model), _judges(args)
    with step(f"evaluate {args.model} on {args.suite}"):
        report = evaluate(model, args.suite, args.out, before=args.before, exits=args.exits, controls=args.controls, **judges)
    if args.json:
        print_json(report)
    else:
        print(report_table(report))
    return 0


def _judges(args: argparse.Namespace) -> dict[str, Any]:
    """The second judge, the reward and the toxicity classifier that were asked for."""
    from edgesafe.evaluate.judges import open_second
    from edgesafe.format.suite import read_suite

    second = open_second(args.second_judge, read_suite(args.suite, verify=False).name)
    reward = toxicity = None
    if args.reward_config:
        from edgesafe.align.config import read_config
        from edgesafe.align.reward.open import open_reward

        reward = open_reward(read_config(args.reward_config).reward)
    if args.toxicity:
        from edgesafe.evaluate.toxicity import open_toxicity

        toxicity = open_toxicity(args.toxicity)
    return {"second": second, "reward": reward, "toxicity": toxicity}
