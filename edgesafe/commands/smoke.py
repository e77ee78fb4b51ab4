"""Run the suite's subset for devices on this machine.

Checks that the certified exits give the certified answers on the machine that it runs on, and keeps a record beside the bundle.
With another engine or processor than the certificate's, answers count as certified once it has passed. Exit code 42 where it
fails. `make smoke` takes it to a board.

With --endpoint the rows go to an OpenAI-style server instead: does it still answer as it was certified (--certified), or within
the suite's limits?

Example:
  edgesafe smoke build/rpi5/bundle --minutes 10
  edgesafe smoke --endpoint http://127.0.0.1:8080/v1 --model NAME --suite build/advbench --out build/again --certified build/q4
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edgesafe.commands._shared import add_bundle, add_engine, add_json, engine_option, folder, keep_apart, print_json
from edgesafe.commands.endpoint._options import add_endpoint, asks_endpoint, endpoint_of, finish
from edgesafe.errors import CertificationFailedError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe smoke`."""
    add_bundle(parser, needed=False)
    text = "run as many rows as fit, at the reference exit and the shallowest first (default: the subset, at all exits)"
    parser.add_argument("--minutes", type=float, metavar="N", help=text)
    parser.add_argument("--junit", type=Path, metavar="FILE", help="also write a JUnit XML report to this file")
    add_engine(parser)
    text = "of an endpoint: the folder of its certification, whose answers and rates must still hold"
    parser.add_argument("--certified", type=folder, metavar="DIR", help=text)
    add_endpoint(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subset and print its report."""
    if asks_endpoint(args, ("--minutes", "--junit", "--engine")):
        return _smoke_endpoint(args)
    from edgesafe.certify.smoke import smoke

    if args.junit is not None:
        keep_apart(args.junit, "--junit", BUNDLE=args.bundle)
    report = smoke(args.bundle, minutes=args.minutes, junit=args.junit, engine=engine_option(args))
    if args.json:
        print_json(report.to_json())
    else:
        print(report.text())
    return 0 if report.passed and report.certified else CertificationFailedError.exit_code


def _smoke_endpoint(args: argparse.Namespace) -> int:
    from edgesafe.endpoint.certify import smoke_endpoint
    from edgesafe.format.suite import read_suite

    keep_apart(args.out, **{"--suite": args.suite, "--certified": args.certified})
    endpoint = endpoint_of(args)
    suite = read_suite(args.suite)
    return finish(smoke_endpoint(endpoint, suite, args.out, certified=args.certified, dry_run=args.dry_run), args)
