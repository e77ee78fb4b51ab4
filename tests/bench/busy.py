"""A process that competes for a core, over and over until it is ended."""

from __future__ import annotations

import argparse
import json
import os
import time

# Shorter than a frame of anything that is measured beside it, and longer than a scheduler's slice.
PERIOD_S = 0.02


def compete(schedule: list[tuple[float, float]]) -> None:
    """Be busy for a share of every period, each share for so many seconds."""
    while True:
        for share, seconds in schedule:
            end = time.perf_counter() + seconds
            while (start := time.perf_counter()) < end:
                while time.perf_counter() < start + share * PERIOD_S:
                    pass
                # Sleeping for the rest and no longer than until the next share begins.
                time.sleep(max(0.0, min(start + PERIOD_S, end) - time.perf_counter()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("core", type=int, help="the core to stay on, where the system can pin a process")
    parser.add_argument("schedule", type=json.loads, help="JSON: [[share of the time, seconds], ...]")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {options.core})
    compete([(float(share), float(seconds)) for share, seconds in options.schedule])
