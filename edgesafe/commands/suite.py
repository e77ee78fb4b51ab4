"""Import a public set of requests, or one of your own, as a suite to evaluate on.

Example:
  edgesafe suite import advbench.csv --out build/advbench
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from edgesafe.commands._shared import add_command, folder
from edgesafe.progress import table

_IMPORT = """Turn a set of requests into a suite for `edgesafe evaluate`.

Example:
  edgesafe suite import advbench.csv --out build/advbench --limit 100
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe suite`."""
    from edgesafe.evaluate.import_suite import FORMATS

    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = add_command(actions, "import", _IMPORT).add_argument
    add("path", type=folder, metavar="PATH", help="a CSV or JSONL file, or a folder with one and its pictures")
    text = f"one of {', '.join(FORMATS)}, or auto: detected from its columns (default: %(default)s)"
    add("--format", choices=("auto", *FORMATS), metavar="FORMAT", default="auto", help=text)
    add("--out", type=folder, metavar="DIR", required=True, help="new folder for the suite")
    add("--image", metavar="FILE", help="picture for rows without one (default: blank, a grey square)")
    add("--limit", type=int, metavar="N", help="keep at most N rows, a sample fixed by their ids (default: all)")


def run(args: argparse.Namespace) -> int:
    """Import and print what the suite holds."""
    from edgesafe.evaluate.import_suite import import_suite
    from edgesafe.format.suite import CLASSES

    done = import_suite(args.path, args.out, fmt=args.format, image=args.image, limit=args.limit)
    families = Counter((row.family, row.cls) for row in done.suite.rows)
    print(table([[family, cls, n] for (family, cls), n in families.items()], ["family", "class", "rows"]))
    counts = Counter(row.cls for row in done.suite.rows)
    print(f"{args.out}: {', '.join(f'{counts[cls]} {cls}' for cls in CLASSES)}; split {done.suite.split}; {done.suite.name}")
    if done.left_out:
        print("left out: " + ", ".join(f"{n} {kind}" for kind, n in done.left_out.items()), file=sys.stderr)
    return 0
