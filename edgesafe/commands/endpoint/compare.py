"""Show what changed between two sets of answers to one suite.

Before and after a change of weights, engine, prompt or provider: which requests are refused no more, which are refused newly,
by class and family, and whether chance explains it (paired by request, McNemar's exact test). A set is the folder of
`edgesafe certify --endpoint`, that of `edgesafe evaluate`, or the file of `edgesafe certify --answers`.

Example:
  edgesafe compare build/full build/q4 --suite build/advbench
"""

from __future__ import annotations

import argparse

from edgesafe.commands._shared import add_json, folder, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe compare`."""
    parser.add_argument("before", type=folder, metavar="BEFORE", help="the earlier answers")
    parser.add_argument("after", type=folder, metavar="AFTER", help="the later answers, to the same rows")
    parser.add_argument("--suite", type=folder, metavar="DIR", required=True, help="the suite that both answer")
    text = "of a bundle's or checkpoint's answers: which exit's (default: the only one)"
    parser.add_argument("--exit", metavar="EXIT", help=text)
    text = "the exit of AFTER, where it is another one (default: that of --exit)"
    parser.add_argument("--exit-after", metavar="EXIT", help=text)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Compare and print."""
    from edgesafe.endpoint.compare import compare, comparison_text, read_set
    from edgesafe.format.suite import read_suite

    suite = read_suite(args.suite, verify=False)
    before = read_set(args.before, suite, args.exit)
    found = compare(suite, before, read_set(args.after, suite, args.exit_after or args.exit))
    if args.json:
        print_json(found)
    else:
        print(comparison_text(found))
    return 0
