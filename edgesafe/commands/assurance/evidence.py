"""Write a certified bundle's evidence in the formats that assessors and their tools read.

in-toto statements (test-result, SLSA provenance), a CycloneDX bill of materials with metrics, a model card, a safety case, and
the test record as CSV. All of it comes from what the bundle records; what it doesn't record is said to be unknown.

The folder of `edgesafe certify --endpoint` has evidence too, whose subject is the answers: the model's bytes were not seen.

Example:
  edgesafe evidence build/rpi5/bundle --out build/rpi5/evidence
  edgesafe evidence build/q4 --suite build/advbench --out build/q4-evidence
"""

from __future__ import annotations

import argparse

from edgesafe.commands._shared import add_bundle, folder, keep_apart
from edgesafe.errors import ConfigError
from edgesafe.format.targets import shown_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe evidence`."""
    add_bundle(parser)
    text = "folder of the evidence; an older one is replaced when the new one is complete"
    parser.add_argument("--out", type=folder, metavar="DIR", required=True, help=text)
    text = "the checkpoint that the bundle was made from, whose training record then goes into the evidence"
    parser.add_argument("--checkpoint", type=folder, metavar="DIR", help=text)
    text = "of an endpoint's certification: the suite that it asked"
    parser.add_argument("--suite", type=folder, metavar="DIR", help=text)


def run(args: argparse.Namespace) -> int:
    """Write the evidence and print its files."""
    from edgesafe.assurance.evidence import write_evidence
    from edgesafe.endpoint.evidence import write_endpoint_evidence
    from edgesafe.endpoint.kept import is_run
    from edgesafe.format.suite import read_suite

    keep_apart(args.out, BUNDLE=args.bundle, **{"--checkpoint": args.checkpoint, "--suite": args.suite})
    endpoint = is_run(args.bundle)
    if endpoint != (args.suite is not None) or (endpoint and args.checkpoint is not None):
        expected = "DIR of `edgesafe certify --endpoint` with --suite, or BUNDLE with or without --checkpoint"
        raise ConfigError("these don't go together", where=shown_path(args.bundle), expected=expected)
    if endpoint:
        names = write_endpoint_evidence(args.bundle, read_suite(args.suite), args.out)
    else:
        names = write_evidence(args.bundle, args.out, args.checkpoint)
    for name in names:
        print(args.out / name)
    return 0
