"""Train a reward model for PPO on preference pairs.

Writes a new checkpoint folder, which a config can name under [reward] model. An interrupted run resumes with --resume.

Example:
  edgesafe reward-model gpt2 --data pairs.jsonl --out build/reward
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from edgesafe.commands._shared import add_json, folder, keep_apart, print_json, quiet_libraries, utf8
from edgesafe.progress import step

_OPTIONS = (
    ("epochs", int, "passes over the training pairs"),
    ("lr", float, "highest learning rate"),
    ("batch-size", int, "pairs per update"),
    ("max-length", int, "longest dialogue in tokens; a longer one is refused"),
    ("val-share", float, "share of the prompts kept for validation; 0 keeps none"),
    ("seed", int, "seed of the head, the order and the dropout"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe reward-model`."""
    from edgesafe.align.reward.settings import RewardTraining

    add, default = parser.add_argument, RewardTraining()
    text = "folder or hub id of a causal or classification checkpoint to start from, e.g. a GPT-2"
    add("base", type=utf8, metavar="BASE", help=text)
    text = 'JSON lines {"prompt", "chosen", "rejected"}, or those of HH-RLHF; may end in .gz'
    add("--data", type=Path, metavar="FILE", required=True, help=text)
    add("--out", type=folder, metavar="DIR", required=True, help="new folder for the reward model")
    for name, kind, text in _OPTIONS:
        value = getattr(default, name.replace("-", "_"))
        add(f"--{name}", type=kind, default=value, metavar="N", help=f"{text} (default: %(default)s)")
    add("--skip-bad", action="store_true", help="leave out lines that can't be used, and say how many")
    add("--resume", action="store_true", help="resume an interrupted run from its last checkpoint")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Train and print the record, or a summary of it."""
    from edgesafe.align.reward.settings import RewardTraining
    from edgesafe.align.reward.train import train_reward_model

    quiet_libraries()
    keep_apart(args.out, BASE=args.base, **{"--data": args.data})
    config = RewardTraining(**{field.name: getattr(args, field.name) for field in fields(RewardTraining)})
    with step(f"train a reward model from {args.base} on {args.data}"):
        record = train_reward_model(args.base, args.data, config, args.out, resume=args.resume)
    if args.json:
        print_json(record)
    else:
        print(_summary(record, args.out))
    return 0


def _summary(record: dict[str, Any], out: Path) -> str:
    pairs, val = record["pairs"], record.get("val")
    lines = [f"{pairs['train']} pairs trained, {pairs['val']} validated, {pairs['skipped']} lines left out", str(out)]
    if val:
        low, high = 100 * val["lower_95"], 100 * val["upper_95"]
        accuracy = f"validation accuracy {100 * val['accuracy']:.1f} % [{low:.1f}, {high:.1f}]"
        lines.insert(1, f"{accuracy}, loss {val['loss']:.4f}, after update {val['update']} of {record['updates']}")
    return "\n".join(lines)
