"""Run the suite's on-device subset.

Checks on the device itself that the certified exits still answer within the suite's limits; exit code 42 where one does not.

Example:
  edgesafe smoke build/rpi5/bundle --junit smoke.xml
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edgesafe.commands._shared import add_bundle, add_engine, add_json, engine_option, keep_apart, print_json
from edgesafe.errors import CertificationFailedError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe smoke`."""
    add_bundle(parser)
    parser.add_argument("--junit", type=Path, metavar="FILE", help="also write a JUnit XML report to this file")
    add_engine(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subset and print its report."""
    from edgesafe.certify.smoke import smoke

    if args.junit is not None:
        keep_apart(args.junit, "--junit", BUNDLE=args.bundle)
    report = smoke(args.bundle, junit=args.junit, engine=engine_option(args))
    if args.json:
        print_json(report.to_json())
    else:
        print(report.table())
    return 0 if report.passed else CertificationFailedError.exit_code
