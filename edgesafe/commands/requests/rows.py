"""Make training rows of lists of requests: refusals to harmful ones, the model's own answers to all others.

The model answers at its reference depth, so that it keeps its way of speaking. A run that was stopped continues where it was.

Example:
  edgesafe rows MODEL advbench instructions.csv --words 60 --apart-from build/suite --out build/rows
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from edgesafe.commands._shared import add_json, add_model, folder, keep_apart, model_folder, print_json, quiet_libraries
from edgesafe.commands.requests._sources import add_sources, inputs_of, read_sources
from edgesafe.errors import ConfigError
from edgesafe.progress import step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe rows`."""
    from edgesafe.format.suite import MAX_NEW_TOKENS
    from edgesafe.requests.rows import BATCH

    add_model(parser)
    add_sources(parser, "a suite")
    add = parser.add_argument
    add("--out", type=folder, metavar="DIR", required=True, help="new folder for the rows")
    text = "a text file with one refusal per line (default: sixteen wordings of our own)"
    add("--refusals", type=Path, metavar="FILE", help=text)
    text = "most tokens of an answer; what is cut off ends with its last whole sentence (default: %(default)s)"
    add("--max-new-tokens", type=int, metavar="N", default=MAX_NEW_TOKENS, help=text)
    add("--batch", type=int, metavar="N", default=BATCH, help="requests that are answered together (default: %(default)s)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Make the rows and print what they hold."""
    from edgesafe.format.suite import CLASSES
    from edgesafe.requests.rows import REFUSALS, Settings, make_rows

    quiet_libraries()
    keep_apart(args.out, MODEL=args.model, **{"--refusals": args.refusals}, **inputs_of(args))
    for name in ("max_new_tokens", "batch"):
        if getattr(args, name) < 1:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} is {getattr(args, name)}", expected="1 or more", todo="give a larger number")
    plan = read_sources(args)
    settings = Settings(args.refusals or REFUSALS, args.max_new_tokens, args.batch)
    options = {"apart_from": args.apart_from, "drop_shared": args.drop_shared}
    with step(f"make training rows with {args.model}"):
        done = make_rows(model_folder(args.model), plan, args.out, settings, **options)
    counts = Counter(row.cls for row in done.suite.rows)
    if args.json:
        sums = {cls: counts[cls] for cls in CLASSES}
        print_json({"rows": str(args.out), "digest": done.suite.digest, **sums, "left_out": dict(done.left_out)})
        return 0
    said = ", ".join(f"{counts[cls]} {cls}" for cls in CLASSES)
    print(f"{args.out}: {said}; split {done.suite.split}; {done.suite.name}")
    if done.left_out:
        print("left out: " + ", ".join(f"{n} {kind}" for kind, n in done.left_out.items()), file=sys.stderr)
    return 0
