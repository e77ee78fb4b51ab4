"""What takes `smol`'s adapter to a certified bundle: a suite, and rows for alignment, out of makers' pictures and wordings."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgesafe.format.files import replacing
from edgesafe.format.targets import NEW, check_target


def make_data(out: Path, archives: Path, scale: float = 1.0, seed: int = 0) -> str:
    """Write OUT/suite and OUT/rows.

    Args:
        out: New folder.
        archives: Folder of the makers' archives; missing ones are fetched into it.
        scale: Of the rows of both.
        seed: Of all choices.

    Returns:
        What the suite shares with training, in a sentence each.

    Raises:
        InputError: `out` exists, this is no clone, or an archive can't be fetched or read.
    """
    from edgesafe.certify.overlap import overlap, say_overlap
    from edgesafe.reference.smol.ship.suite import make_suite, shared_with_training
    from edgesafe.reference.smol.ship.training import make_training

    check_target(out)
    with replacing(out) as work:
        shutil.rmtree(work / NEW, ignore_errors=True)
        (work / NEW).mkdir()
        rows = make_training(work / NEW / "rows", archives, scale=scale, seed=seed)
        suite = make_suite(work / NEW / "suite", archives, scale=scale, seed=seed)
    shared = shared_with_training(suite.rows)
    return (
        f"{len(suite.rows)} rows of the suite, {len(rows.rows)} for alignment\n{say_overlap(overlap(suite, rows))}\n"
        f"and with all requests that the adapter's training can draw: {shared['requests']} of {shared['n']} requests, "
        f"{shared['runs']} runs of seven words"
    )
