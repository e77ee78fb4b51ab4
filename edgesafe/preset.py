"""Rows and suite of public sets, as steps of `edgesafe ship --preset public`: made once for all devices."""

from __future__ import annotations

from pathlib import Path

from edgesafe import requests
from edgesafe.format.files import digest_folder, sha256_file
from edgesafe.requests.public import SETS, fetch_public, licences, read_public
from edgesafe.requests.rows import make_rows
from edgesafe.requests.suite import import_suite
from edgesafe.steps import digest_model, digest_world, make_step


def public_steps(model: Path, work: Path, folder: Path | None) -> tuple[Path, Path]:
    """Training rows and a suite of the public sets, in this order.

    Args:
        model: checkpoint folder, which answers the harmless requests.
        work: the folder that holds all steps.
        folder: of the sets; fetched where None.

    Raises:
        InputError: a set is missing, or can't be fetched or read.
        IntegrityError: the requests of one are not those that were pinned.
    """
    if folder is None:
        addresses = [list(one.files.values()) for one in SETS]
        folder = make_step(work, "public", addresses, fetch_public, f"fetch {licences()}")
    recipe = read_public(folder)
    # What an earlier version made of the sets is made again.
    home = Path(requests.__file__).parent
    inputs = [list(recipe.tables), digest_world(home), [sha256_file(path) for path in sorted(home.glob("*.txt"))]]
    title = f"make a suite of {licences()}"
    suite = make_step(work, "suite", inputs, lambda out: import_suite(recipe.suite, out), title)

    def rows(out: Path) -> None:
        make_rows(model, recipe.rows, out, apart_from=suite, drop_shared=True)

    title = "make training rows of them, in the model's own words"
    return make_step(work, "data", [*inputs, digest_model(model), digest_folder(suite)], rows, title), suite
