"""Import public sets of requests, or your own, as a suite to certify or evaluate on.

Example:
  edgesafe suite import harmbench xstest questions.csv --words 60 --out build/suite
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from edgesafe.commands._shared import add_command, add_json, folder, keep_apart, print_json
from edgesafe.commands.requests._sources import add_sources, read_sources
from edgesafe.progress import table

_IMPORT = """Make one suite of several sets of requests.

A suite to certify with needs harmful and harmless requests and tasks, and enough of each for its limits: fewer are refused
at once, with the number needed. Its rows are never trained on.

Example:
  edgesafe suite import harmbench xstest questions.csv --words 60 --out build/suite
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe suite`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    command = add_command(actions, "import", _IMPORT)
    add_sources(command, "training rows")
    add = command.add_argument
    add("--out", type=folder, metavar="DIR", required=True, help="new folder for the suite")
    text = "limits of the verdict, e.g. harmful_upper_95=0.03 (default: those of edgesafe.format.suite)"
    add("--limits", nargs="+", metavar="NAME=RATE", default=[], help=text)
    text = "a suite for `edgesafe evaluate` alone: of any size, without the checks of a suite to certify with"
    add("--report-only", action="store_true", help=text)
    add_json(command)


def run(args: argparse.Namespace) -> int:
    """Import and print what the suite holds."""
    from edgesafe.format.suite import CLASSES
    from edgesafe.requests.sources import limits_from
    from edgesafe.requests.suite import import_suite

    keep_apart(
        args.out,
        **{f"PATH {path}": path for path in args.paths},
        **{"--pictures": args.pictures, "--apart-from": args.apart_from},
    )
    plan = read_sources(args, limits_from(args.limits) if args.limits else None)
    options = {"report_only": args.report_only, "apart_from": args.apart_from, "drop_shared": args.drop_shared}
    done = import_suite(plan, args.out, **options)
    rows = done.suite.rows
    families = Counter((row.family, row.cls) for row in rows)
    counts, smoke = Counter(row.cls for row in rows), len(done.suite.smoke_rows())
    if args.json:
        listed = [{"family": family, "class": cls, "rows": n} for (family, cls), n in families.items()]
        sums = {cls: counts[cls] for cls in CLASSES}
        report = {"suite": str(args.out), "digest": done.suite.digest, **sums, "smoke": smoke, "families": listed}
        print_json({**report, "left_out": dict(done.left_out), "joined": dict(done.joined), "limits": dict(done.suite.limits)})
        return 0
    print(table([[family, cls, n] for (family, cls), n in families.items()], ["family", "class", "rows"]))
    said = ", ".join(f"{counts[cls]} {cls}" for cls in CLASSES)
    print(f"{args.out}: {said}; {smoke} smoke rows; split {done.suite.split}; {done.suite.name}")
    for new, number in done.joined.items():
        print(f"{new}: {number} categories, too small to be certified one by one", file=sys.stderr)
    if done.left_out:
        print("left out: " + ", ".join(f"{n} {kind}" for kind, n in done.left_out.items()), file=sys.stderr)
    return 0
