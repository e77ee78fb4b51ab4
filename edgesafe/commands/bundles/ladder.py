"""Show a bundle's exits: time to the first token, verdict and rates of each.

In the order of certification: from the exit that computes the most to the one that computes the least. Times are predicted at
the 95 % quantile for this machine, from `edgesafe measure` where it has run here, else from the device's profile.

Example:
  edgesafe ladder build/rpi5/bundle
"""

from __future__ import annotations

import argparse

from edgesafe.commands._shared import add_bundle, add_engine, add_json, engine_option, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe ladder`."""
    add_bundle(parser)
    add_engine(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the exits."""
    from edgesafe.certify.ladder import read_ladder

    ladder = read_ladder(args.bundle, engine_option(args))
    if args.json:
        print_json(ladder.to_dict())
        return 0
    print(ladder.text())
    return 0
