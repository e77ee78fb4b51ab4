"""List the device profiles, show one with the sources of its figures, or make one of this machine.

A profile holds estimates; `edgesafe measure` measures a bundle on the device itself.

Example:
  edgesafe devices
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from edgesafe.commands._shared import add_command, add_engine, add_json, engine_option, folder, print_json, utf8
from edgesafe.errors import ConfigError
from edgesafe.progress import table

if TYPE_CHECKING:
    from edgesafe.device import DeviceProfile

_SHOW = """Show one profile, each figure with its source.

A figure that nobody measured is absent, and nothing is predicted with it.

Example:
  edgesafe devices show rpi5
"""
_MEASURE = """Measure this machine's rates, without any bundle, and write them as a profile of its own.

Where no bundle was measured yet, `edgesafe plan` and `edgesafe export` predict from it what a model takes here. The file can be
taken to another machine.

Example:
  edgesafe devices measure board.toml --like rpi5
  edgesafe plan HuggingFaceTB/SmolVLM-256M-Instruct --device board.toml
"""
_LONGEST_S = 600
_HEADERS = ("device", "kind", "threads", "memory MiB", "vision", "text", "budget ms", "title")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe devices`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    show = add_command(actions, "show", _SHOW)
    show.add_argument("name", help="a device's name, or the path of a .toml file")
    measure = add_command(actions, "measure", _MEASURE)
    measure.add_argument("out", type=folder, metavar="OUT.toml", help="the profile to write")
    text = "profile that gives the rest: title, schemes, budget (default: %(default)s)"
    measure.add_argument("--like", type=utf8, default="host", metavar="DEVICE", help=text)
    measure.add_argument("--threads", type=int, metavar="N", help="threads (default: the profile's, or one per core)")
    text = "approximate duration in seconds (default: %(default)g)"
    measure.add_argument("--seconds", type=float, default=10.0, metavar="S", help=text)
    add_engine(measure)
    for action in (show, measure):
        # After the action too; there it must not undo what stands before it.
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON to stdout")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print every profile that ships with edgesafe, or one of them whole, which may be one made here."""
    from edgesafe.device import list_devices, load_device

    if args.action is not None:
        profile = load_device(args.name) if args.action == "show" else _measured(args)
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


def _measured(args: argparse.Namespace) -> DeviceProfile:
    """The profile of this machine, once it is written."""
    from edgesafe.device import load_device, profile_text
    from edgesafe.format.files import write_atomically
    from edgesafe.format.targets import check_writable, shown_path
    from edgesafe.machine import read_heat, slowed
    from edgesafe.runtime.rates import measured_profile

    if not 0 < args.seconds <= _LONGEST_S:
        expected = f"more than 0 and at most {_LONGEST_S}"
        raise ConfigError(f"--seconds is {args.seconds:g}", where="--seconds", expected=expected, todo="change it")
    if args.out.suffix != ".toml":
        what = f"{shown_path(args.out.name)} would not be found as a profile"
        raise ConfigError(what, where="OUT", expected="a name that ends in .toml", todo="change it")
    check_writable(args.out, error=ConfigError)
    base, before = load_device(args.like), read_heat()
    profile = measured_profile(base, engine=engine_option(args), threads=args.threads, seconds=args.seconds)
    write_atomically(args.out, profile_text(profile).encode())
    if why := slowed(before, read_heat()):
        print(f"warning: the rates are of a machine that was slowed down: {'; '.join(why)}", file=sys.stderr)
    return load_device(args.out)


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
