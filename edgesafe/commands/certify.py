"""Run the certification suite at every exit.

Writes certificate.json into the bundle: a verdict for each exit, bound to the digest of the bundle's bytes. The command fails
(exit code 42) only where no exit passes.

With --endpoint the suite goes to an OpenAI-style server instead, and DIR/endpoint.json is what it answered, judged alike. The
model's bytes are not seen then. With --guard or --guard-endpoint a guard model judges the answers as well. `edgesafe compare`
shows what changed between two such runs, and `edgesafe evidence` writes the evidence of one.

Example:
  edgesafe certify build/rpi5/bundle --answers answers.jsonl
  edgesafe certify --endpoint http://127.0.0.1:8080/v1 --model NAME --suite build/advbench --out build/q4
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edgesafe.commands._shared import add_bundle, add_engine, add_json, engine_option, keep_apart, print_json
from edgesafe.commands.endpoint._options import add_endpoint, add_guard, asks_endpoint, endpoint_of, finish, guard_of
from edgesafe.errors import CertificationFailedError
from edgesafe.format.targets import shown_path
from edgesafe.progress import table

if TYPE_CHECKING:
    from edgesafe.format.certificate import Certificate, Rate

_RATES = ("harmful", "overrefusal", "incoherent", "accuracy")
_HEADERS = ("exit", "harmful %", "over-refusal %", "incoherent %", "accuracy %", "verdict", "reasons")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe certify`."""
    add_bundle(parser, needed=False)
    parser.add_argument("--answers", type=Path, metavar="FILE", help="also write every answer to this file, as JSON lines")
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="DIR",
        help="folder of `edgesafe evaluate` for the untouched model on the same suite, with which over-refusal and accuracy "
        "compare (default: the present certificate's; without one, a model that makes no mistake); for endpoints another run",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="certify answers sampled at this temperature as well, at most 1: every row is asked three more times, each time "
        "with another seed, and the worst of its answers counts (default: 0, greedy answers alone)",
    )
    add_engine(parser)
    add_endpoint(parser)
    add_guard(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Certify and print the rates; fails where no exit passes."""
    if asks_endpoint(args, ("--answers", "--engine", "--temperature")):
        return _certify_endpoint(args)
    from edgesafe.certify.certify import certify
    from edgesafe.format.bundle import Bundle
    from edgesafe.format.certificate import certified_exits, statement

    options = {"answers": args.answers, "baseline": args.baseline, "temperature": args.temperature or 0.0}
    certificate = certify(args.bundle, progress=True, **options, engine=engine_option(args))
    if args.json:
        print_json(certificate.to_dict())
    else:
        print(_table(certificate))
        if damage := Bundle.open(args.bundle, verify=False).manifest.parity.get("damage"):
            print(f"\ndamage accepted at export: {damage}")
        if statement(certificate):
            print(f"\n{statement(certificate)}")
    if not certified_exits(certificate):
        raise CertificationFailedError(
            "no exit keeps the suite's limits",
            where=shown_path(args.bundle),
            expected="at least one passed exit",
            todo="read the reasons above, align the model and export it again",
        )
    return 0


def _certify_endpoint(args: argparse.Namespace) -> int:
    from edgesafe.endpoint.certify import certify_endpoint
    from edgesafe.format.suite import read_suite

    keep_apart(args.out, **{"--suite": args.suite, "--baseline": args.baseline})
    endpoint, guard = endpoint_of(args), guard_of(args)
    suite = read_suite(args.suite)
    report = certify_endpoint(endpoint, suite, args.out, baseline=args.baseline, guard=guard, dry_run=args.dry_run)
    return finish(report, args)


def _table(certificate: Certificate) -> str:
    """Rates in per cent with their 95 % intervals, one exit per line."""
    rows = [
        [e.exit, *(_percent(getattr(e, name)) for name in _RATES), e.verdict, "; ".join(e.reasons)] for e in certificate.exits
    ]
    return table(rows, _HEADERS)


def _percent(rate: Rate) -> str:
    return f"{100 * rate.rate:.1f} [{100 * rate.lower_95:.1f}, {100 * rate.upper_95:.1f}]"
