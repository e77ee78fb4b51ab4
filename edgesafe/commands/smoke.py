"""Run the suite's subset for devices on this machine.

Checks that the certified exits give the certified answers on the machine that it runs on, and keeps a record beside the bundle.
With another engine or processor than the certificate's, answers count as certified once it has passed. Exit code 42 where it
fails. `make smoke` takes it to a board.

Example:
  edgesafe smoke build/rpi5/bundle --minutes 10
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edgesafe.commands._shared import add_bundle, add_engine, add_json, engine_option, keep_apart, print_json
from edgesafe.errors import CertificationFailedError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe smoke`."""
    add_bundle(parser)
    text = "run as many rows as fit, at the reference exit and the shallowest first (default: the subset, at all exits)"
    parser.add_argument("--minutes", type=float, metavar="N", help=text)
    parser.add_argument("--junit", type=Path, metavar="FILE", help="also write a JUnit XML report to this file")
    add_engine(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subset and print its report."""
    from edgesafe.certify.smoke import smoke

    if args.junit is not None:
        keep_apart(args.junit, "--junit", BUNDLE=args.bundle)
    report = smoke(args.bundle, minutes=args.minutes, junit=args.junit, engine=engine_option(args))
    if args.json:
        print_json(report.to_json())
    else:
        print(report.text())
    return 0 if report.passed and report.certified else CertificationFailedError.exit_code
