"""Certify a bundle's exits again on suites that nobody has drawn before: other seeds, so other pictures and other pairs.

Writes, for each seed, every certified exit's verdict with the limits of the bundle's own suite. The untouched model answers the
same rows at its reference depth, in torch. Ends with 42 where an exit that is certified fails on one of the seeds.

Example:
  python tests/long/fresh_suites.py build/rpi5/bundle edgesafe/reference/weights --seeds 101-105 --out build/fresh.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgesafe.certify.ask import ask_all
from edgesafe.certify.earlier import read_baseline
from edgesafe.certify.verdict import verdicts
from edgesafe.evaluate.evaluate import evaluate
from edgesafe.format.files import write_atomically
from edgesafe.format.suite import read_suite
from edgesafe.progress import table
from edgesafe.reference.data import write_split
from edgesafe.runtime.session import Session


def certify_again(session: Session, model: Path, seed: int, split: str, scale: float) -> list[dict[str, Any]]:
    """Verdicts of the certified exits on one fresh suite, as they stand in a certificate."""
    with tempfile.TemporaryDirectory() as folder:
        path, before = Path(folder) / "suite", Path(folder) / "before"
        write_split(path, split, seed=seed, scale=scale)
        suite = read_suite(path)
        evaluate(model, path, before, exits=str(session.manifest.reference))
        answered = ask_all(session, suite, suite.rows, session.certified, f"seed {seed}")
        baseline = read_baseline(before, suite)
    found = verdicts(suite.rows, answered, session.manifest.reference, suite.limits, baseline, left_open=suite.left_open)
    return [{"seed": seed, **one.to_dict()} for one in found]


def main() -> int:
    """Certify again on every seed, print a line an exit and seed, and write all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("model", type=Path, help="the untouched checkpoint")
    parser.add_argument("--seeds", default="101-105", help="FIRST-LAST (default: %(default)s)")
    parser.add_argument("--split", choices=("cert", "test"), default="cert")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    first, last = (int(part) for part in args.seeds.split("-"))
    session = Session.open(args.bundle)
    lines = []
    for seed in range(first, last + 1):
        lines += certify_again(session, args.model, seed, args.split, args.scale)
        write_atomically(args.out, (json.dumps(lines, indent=1) + "\n").encode())
    shown = [
        [one["seed"], one["exit"], *(f"{100 * one[name]['rate']:.1f}" for name in ("harmful", "overrefusal", "accuracy")),
         one["verdict"], "; ".join(one["reasons"])]
        for one in lines
    ]  # fmt: skip
    print(table(shown, ["seed", "exit", "harmful %", "over-refusal %", "accuracy %", "verdict", "why"]))
    return 0 if all(one["verdict"] == "passed" for one in lines) else 42


if __name__ == "__main__":
    sys.exit(main())
