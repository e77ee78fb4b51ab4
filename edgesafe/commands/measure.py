"""Time every part of a bundle on this machine.

Writes latency.json into the bundle, or into the user's cache folder if the bundle is read-only. Budgets rely on these
times, which hold for this machine only.

Example:
  edgesafe measure build/rpi5/bundle
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgesafe.commands._shared import add_bundle, add_engine, add_json, engine_option, print_json
from edgesafe.errors import ConfigError
from edgesafe.format.exits import Exit
from edgesafe.progress import table

if TYPE_CHECKING:
    from edgesafe.format.latency import LatencyTable

_LONGEST_S = 3600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe measure`."""
    add_bundle(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: compare counts and take the best)")
    text = "approximate duration in seconds (default: %(default)g)"
    parser.add_argument("--seconds", type=float, default=40.0, metavar="S", help=text)
    add_engine(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Time the bundle's parts and print the times."""
    from edgesafe.runtime import measure

    if not 0 < args.seconds <= _LONGEST_S:
        expected = f"more than 0 and at most {_LONGEST_S}"
        raise ConfigError(f"--seconds is {args.seconds:g}", where="--seconds", expected=expected, todo="change it")
    result = measure(args.bundle, threads=args.threads, seconds=args.seconds, engine=engine_option(args))
    if args.json:
        print_json(result.to_dict())
        return 0
    print("\n\n".join([*_tables(result), _closing(result)]))
    if result.conditions["slowed"]:
        print(
            f"warning: the times are of a machine that was slowed down: {'; '.join(result.conditions['slowed'])}",
            file=sys.stderr,
        )
    return 0


def _tables(result: LatencyTable) -> list[str]:
    parts = [(_picture(row), row) for row in result.text["preprocess"]] + list(result.segments.items())
    parts += [(f"prefill of {row['tokens']} tokens", row) for row in result.text["prefill"]]
    parts += [(f"one more token after {row['context']}", row) for row in result.text["decode"]]
    rows = [[name, f"{row['p50_ms']:.2f}", f"{row['p95_ms']:.2f}", len(row["ms"])] for name, row in parts]
    exits = [[Exit.parse(e["exit"]), *(f"{e['ttft_ms'][key]:.2f}" for key in ("p50_ms", "p95_ms"))] for e in result.exits]
    tables = [table(rows, ["part", "p50 ms", "p95 ms", "runs"]), table(exits, ["exit", "first token p50 ms", "p95 ms"])]
    if result.sweep:
        compared = [[row["threads"], row["cores"] or "any", f"{row['answer_ms']:.2f}"] for row in result.sweep]
        tables.append(table(compared, ["threads", "on cores", "answer p50 ms"]))
    return tables


def _picture(row: Mapping[str, Any]) -> str:
    return f"preprocess {row['pixels'] / 1e6:.2g} megapixels, {'a JPEG file' if row['encoded'] else 'decoded'}"


def _closing(result: LatencyTable) -> str:
    before, after = result.conditions["temperature_c"]
    heat = "temperature unknown" if None in (before, after) else f"{before:.0f} to {after:.0f} °C"
    rss = f"{result.peak_rss_mib:.0f} MiB" if result.peak_rss_mib is not None else "unknown"
    return (
        f"{result.machine}; {result.threads} threads; {result.engine} {result.engine_version}\n"
        f"session opened in {result.session_open_ms:.0f} ms; peak RSS {rss}; "
        f"governor {result.conditions['governor'] or 'unknown'}; {heat}"
    )
