"""Where a bundle is put: whole or not at all, and never over something that is no bundle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgesafe.bundle import MANIFEST
from edgesafe.errors import ConfigError
from edgesafe.exchange import exchange


def check_target(out: Path) -> None:
    """Refuse a target whose replacement would destroy something else.

    Raises:
        ConfigError: a file, or a folder with other contents than a bundle.
    """
    if not out.exists() or (out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))):
        return
    raise ConfigError(
        f"{out} is there and is no bundle",
        where="--out",
        expected="a new folder, an empty one, or an older bundle to replace",
        todo="name another folder",
    )


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A work folder `OUT.partial`; if all goes well its `bundle` becomes OUT, else OUT stays as it was.

    The exchange is one step where the system has one. Elsewhere it is two renames: a power cut between them leaves the older
    bundle at `OUT.old`, from where the next export puts it back before it starts.
    """
    old, work = out.with_name(out.name + ".old"), out.with_name(out.name + ".partial")
    check_target(out)
    if old.is_dir() and not out.exists():
        os.replace(old, out)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        _swap(work / "bundle", out, old)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _swap(new: Path, out: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    if out.exists() and exchange(new, out):
        return  # the older bundle is in the work folder now, and goes with it
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(new, out)
    except BaseException:
        if old.exists():
            os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
