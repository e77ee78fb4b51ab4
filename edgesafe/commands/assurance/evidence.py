"""Write a certified bundle's evidence in the formats that assessors and their tools read.

in-toto statements (test-result, SLSA provenance), a CycloneDX bill of materials with metrics, a model card, a safety case, and
the test record as CSV. All of it comes from what the bundle records; what it doesn't record is said to be unknown.

Example:
  edgesafe evidence build/rpi5/bundle --out build/rpi5/evidence
"""

from __future__ import annotations

import argparse

from edgesafe.commands._shared import add_bundle, folder, keep_apart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe evidence`."""
    add_bundle(parser)
    text = "folder of the evidence; an older one is replaced when the new one is complete"
    parser.add_argument("--out", type=folder, metavar="DIR", required=True, help=text)
    text = "the checkpoint that the bundle was made from, whose training record then goes into the evidence"
    parser.add_argument("--checkpoint", type=folder, metavar="DIR", help=text)


def run(args: argparse.Namespace) -> int:
    """Write the evidence and print its files."""
    from edgesafe.assurance.evidence import write_evidence

    keep_apart(args.out, BUNDLE=args.bundle, **{"--checkpoint": args.checkpoint})
    for name in write_evidence(args.bundle, args.out, args.checkpoint):
        print(args.out / name)
    return 0
