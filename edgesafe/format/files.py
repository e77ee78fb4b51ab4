"""Files written whole or not at all, folders exchanged in one step, and digests: the one place for all three."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from edgesafe.errors import BundleError, EdgesafeError, InputError

_CHUNK = 1 << 20
_HERE = -100  # AT_FDCWD: relative paths start at the working folder
_SWAP = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS


def check_writable(path: Path, *, error: type[EdgesafeError] = InputError, todo: str = "name another place") -> None:
    """Refuse a place where ``write_atomically`` could not write, before the work whose result goes there.

    It tries: an empty file is made beside it and removed, because root writes where permissions forbid it and a mount that is
    read-only looks like any other.

    Args:
        path: The file that is to be written.
        error: The class of the refusal.
        todo: What its reader can do.

    Raises:
        EdgesafeError: Of that class; a folder is missing, something else is in the way, or the system refuses.
    """
    where, expected = str(path), "a file in a folder that can be written"
    try:
        if path.is_dir():
            raise error("a folder is where the file is to be written", where=where, expected=expected, todo=todo)
        if not path.parent.is_dir():
            what = "is not a folder" if path.parent.exists() else "doesn't exist"
            raise error(f"{path.parent} {what}", where=where, expected=expected, todo=todo)
        partial = path.with_name(path.name + ".partial")  # as write_atomically names it
        partial.unlink(missing_ok=True)
        partial.open("xb").close()
        partial.unlink()
    except (OSError, ValueError) as refused:  # ValueError: a name that no file can have
        why = refused.strerror if isinstance(refused, OSError) else refused
        raise error(f"the file can't be written: {why}", where=where, expected=expected, todo=todo) from refused


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the file and rename, so that the earlier file stays whole whatever happens."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def exchange(a: Path, b: Path) -> bool:
    """Each gets the other's name; False where the system or the file system can't, and then nothing has changed.

    Source: renameat2(2) of Linux, renamex_np(2) of macOS.
    """
    first, second = os.fsencode(a), os.fsencode(b)
    try:
        libc = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return bool(libc.renamex_np(first, second, _SWAP) == 0)
        return bool(libc.renameat2(_HERE, first, _HERE, second, _SWAP) == 0)
    except (AttributeError, OSError, TypeError):  # no such function in this C library, or no C library to ask
        return False


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_folder(root: Path, known: Mapping[Path, str] | None = None) -> str:
    """The sha256 over the sorted relative paths and hashes of a folder's files.

    Args:
        root: The folder.
        known: Hashes of files that were just read for another reason.
    """
    known = known or {}
    if not root.is_dir():
        raise BundleError(f"{root} is not a folder", expected="a folder to take the digest of")
    paths = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path}\0{known.get(root / path) or sha256_file(root / path)}\n".encode())
    return digest.hexdigest()
