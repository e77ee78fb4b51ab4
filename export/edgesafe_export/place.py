"""Where a bundle is put: whole or not at all, and never over something that is no bundle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgesafe.errors import ConfigError, EdgesafeError
from edgesafe.format.bundle import MANIFEST
from edgesafe.format.files import exchange, write_atomically

KEY = "made-of"  # in the work folder: what its pieces were made of


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
def replacing(out: Path, key: str = "") -> Iterator[Path]:
    """A work folder `OUT.partial`; if all goes well its `bundle` becomes OUT, else OUT stays as it was.

    With a `key`, what a stopped run of the same key left in the work folder is there again; it goes when an error of ours says
    that the work was in vain.

    The exchange is one step where the system has one. Elsewhere it is two renames: a power cut between them leaves the older
    bundle at `OUT.old`, from where the next export puts it back before it starts.
    """
    old, work = out.with_name(out.name + ".old"), out.with_name(out.name + ".partial")
    check_target(out)
    if old.is_dir() and not out.exists():
        os.replace(old, out)
    if not key or _key_of(work) != key:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    if key:
        write_atomically(work / KEY, key.encode())
    kept = bool(key)
    try:
        yield work
        _swap(work / "bundle", out, old)
        kept = False
    except EdgesafeError:
        kept = False
        raise
    finally:
        if not kept:
            shutil.rmtree(work, ignore_errors=True)


def _key_of(work: Path) -> str:
    try:
        return (work / KEY).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""


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
