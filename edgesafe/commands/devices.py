"""List the device profiles.

A profile holds estimates; `edgesafe measure` measures the device itself.

Example:
  edgesafe devices
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from edgesafe.commands._shared import add_json, print_json
from edgesafe.progress import table

_HEADERS = ("device", "kind", "threads", "memory MiB", "vision", "text", "budget ms", "title")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe devices`."""
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print every profile that ships with edgesafe."""
    from edgesafe.device import list_devices

    profiles = list_devices()
    if args.json:
        print_json([asdict(profile) for profile in profiles])
        return 0
    rows = [
        [p.name, p.kind, p.threads, p.memory_mib, p.vision_scheme, p.text_scheme, f"{p.ttft_budget_ms:g}", p.title]
        for p in profiles
    ]
    print(table(rows, _HEADERS))
    return 0
