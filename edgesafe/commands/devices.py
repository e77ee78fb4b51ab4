"""List the device profiles, or show one with the sources of its figures.

A profile holds estimates; `edgesafe measure` measures the device itself.

Example:
  edgesafe devices
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from edgesafe.commands._shared import add_command, add_json, print_json
from edgesafe.progress import table

if TYPE_CHECKING:
    from edgesafe.device import DeviceProfile

_SHOW = """Show one profile, each figure with its source.

A figure that nobody measured is absent, and nothing is predicted with it.

Example:
  edgesafe devices show rpi5
"""
_HEADERS = ("device", "kind", "threads", "memory MiB", "vision", "text", "budget ms", "title")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe devices`."""
    show = add_command(parser.add_subparsers(dest="action", metavar="ACTION"), "show", _SHOW)
    show.add_argument("name", help="a device's name, or the path of a .toml file")
    # After `show` too; there it must not undo what stands before it.
    show.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON to stdout")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print every profile that ships with edgesafe, or one of them whole."""
    from edgesafe.device import list_devices, load_device

    if args.action == "show":
        profile = load_device(args.name)
        print_json(asdict(profile)) if args.json else print(_whole(profile))
        return 0
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


def _whole(profile: DeviceProfile) -> str:
    """A profile's figures, a line each, with where they come from."""
    from edgesafe.device import FIGURES

    known = {**asdict(profile), **profile.estimates}
    rows = [
        [name, "-", "absent"] if known.get(name) is None else [name, f"{known[name]:g}", profile.sources.get(name, "-")]
        for name in FIGURES
    ]
    head = f"{profile.name}: {profile.title} ({profile.kind}); {profile.vision_scheme} vision, {profile.text_scheme} text"
    return f"{head}\n\n{table(rows, ['figure', 'value', 'source'])}"
