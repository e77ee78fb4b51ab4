"""Files and folders written whole or not at all, and digests: the one place for both."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from edgesafe.errors import BundleError, EdgesafeError
from edgesafe.format.targets import KEY, NEW, OLDER, check_target, is_special, refused, work_folder

try:
    import fcntl
except ImportError:  # not a POSIX system: there, two runs in one folder are not kept apart
    fcntl = None  # type: ignore[assignment]  # a module or its absence

_CHUNK = 1 << 20
_HERE = -100  # AT_FDCWD: relative paths start at the working folder
_SWAP = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the file and rename, so that the earlier file stays whole whatever happens.

    A link is followed: the file that it names is replaced, not the link. A device or a pipe is written to as it is.
    """
    if is_special(path):
        path.write_bytes(data)
        return
    path = Path(os.path.realpath(path))
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


@contextmanager
def replacing(
    out: Path,
    kind: str = "",
    replaces: Callable[[Path], bool] | None = None,
    *,
    key: str = "",
    model: str | Path | None = None,
) -> Iterator[Path]:
    """A work folder ``OUT.partial``; if all goes well its ``new`` becomes OUT, else OUT stays as it was.

    With a `key`, what a stopped run of the same key left in the work folder is there again. It goes when an error of ours
    says that the work was in vain.

    The exchange is one step where the system has one. Elsewhere it is two renames: a power cut between them leaves the older
    folder in the work folder, from where the next run puts it back before it starts.

    Args:
        out: The folder; this and the next two as for `check_target`.
        kind: What may be replaced.
        replaces: Whether an existing folder is one.
        key: Digest of what the work is made of.
        model: A checkpoint that is read meanwhile, as for `check_target`.

    Raises:
        ConfigError, InputError: As `check_target`, or another run works on the same OUT.
    """
    out = check_target(out, kind, replaces, model=model)
    work = work_folder(out)
    with held(work):
        if (work / OLDER).exists() and not out.exists():
            os.replace(work / OLDER, out)
        if not key or _key_of(work) != key:
            clear(work)
        write_atomically(work / KEY, key.encode())
        kept = bool(key)
        try:
            yield work
            put(work / NEW, out, work / OLDER)
            kept = False
        except EdgesafeError:
            kept = False
            raise
        finally:
            if not kept:
                with contextlib.suppress(OSError):  # what can't be deleted now, the next run deletes
                    clear(work)
                    work.rmdir()


def put(new: Path, out: Path, aside: Path) -> None:
    """Give a folder the name `out`. What had it is at `new` or at `aside` afterwards, for the caller to delete."""
    if not out.exists():
        os.replace(new, out)
        return
    if exchange(new, out):
        return
    os.replace(out, aside)
    try:
        os.replace(new, out)
    except BaseException:
        os.replace(aside, out)
        raise


def clear(folder: Path) -> None:
    """Delete what is in a folder; the folder itself stays, and whoever holds it keeps it."""
    # The mark goes last: a run that is killed here leaves a folder that the next one knows.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == KEY):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def held(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """This run alone works in a folder, which is made where it is not there; the end of a process lets go of it.

    Args:
        folder: The folder.
        wait: Whether to wait for another run that holds it.

    Raises:
        InputError: Another run holds it.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield
            return
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # whoever held it has just deleted it
            continue
        try:
            _lock(handle, folder, wait)
            # Whoever held it may have deleted it while this run waited: then the lock is one on a folder without a name.
            if folder.exists() and os.path.samestat(folder.stat(), os.fstat(handle)):
                yield
                return
        finally:
            os.close(handle)


def _lock(handle: int, folder: Path, wait: bool) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise refused(
            "another run is writing here", folder, "one run at a time", "wait for it, or name another --out"
        ) from None
    except OSError:  # a file system without locks
        return


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
        # surrogateescape gives a name that is not UTF-8 its own bytes.
        line = f"{path}\0{known.get(root / path) or sha256_file(root / path)}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _key_of(work: Path) -> str:
    try:
        return (work / KEY).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
