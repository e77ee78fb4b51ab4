"""A process that competes for a core: `python busy.py CORE [[share, seconds], ...]`, over and over until it is ended."""

from __future__ import annotations

import json
import os
import sys
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
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(sys.argv[1])})
    compete([(float(share), float(seconds)) for share, seconds in json.loads(sys.argv[2])])
