"""Files and folders written whole or not at all, the checks of where they go, and digests: the one place for all three."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from edgesafe.errors import BundleError, ConfigError, EdgesafeError, InputError

try:
    import fcntl
except ImportError:  # not a POSIX system: there, two runs in one folder are not kept apart
    fcntl = None  # type: ignore[assignment]  # a module or its absence

_CHUNK = 1 << 20
_HERE = -100  # AT_FDCWD: relative paths start at the working folder
_SWAP = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS
_PARTIAL = ".partial"
_TRIES = 20
KEY = "made-of"  # in a work folder: what its pieces were made of, and the mark that it is ours
NEW, OLDER = "new", "older"  # in a work folder: what will be OUT, and what was OUT between two renames
_OURS = (KEY, KEY + _PARTIAL, NEW, OLDER)


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the file and rename, so that the earlier file stays whole whatever happens.

    A link is followed: the file that it names is replaced, not the link. A device or a pipe is written to as it is.
    """
    if _is_special(path):
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


def check_writable(path: Path, *, error: type[EdgesafeError] = InputError, todo: str = "name another place") -> None:
    """Refuse a file that ``write_atomically`` could not write, before the work whose result goes there.

    It tries: an empty file is made beside it and removed, because root writes where permissions forbid it and a mount that is
    read-only looks like any other.

    Args:
        path: The file that is to be written.
        error: The class of the refusal.
        todo: What its reader can do.

    Raises:
        EdgesafeError: Of that class; a folder is missing, something else is in the way, or the system refuses.
    """
    if _is_special(path):
        return

    def refused(what: str, expected: str = "a file in a folder that can be written") -> EdgesafeError:
        return error(what, where=str(path), expected=expected, todo=todo)

    try:
        place = Path(os.path.realpath(path))
        if place.is_dir():
            raise refused("a folder is where the file is to be written")
        if not place.parent.is_dir():
            what = "is not a folder" if place.parent.exists() else "doesn't exist"
            raise refused(f"{place.parent} {what}")
        if _is_mount(place):
            raise refused("the file is a mount point", "a file that can be replaced")
        partial = place.with_name(place.name + _PARTIAL)
        partial.unlink(missing_ok=True)
        partial.open("xb").close()
        partial.unlink()
    except (OSError, ValueError) as system:  # ValueError: a name that no file can have
        raise refused(f"the file can't be written: {getattr(system, 'strerror', None) or system}") from system


def check_name(path: str | os.PathLike[str], error: type[EdgesafeError] = InputError) -> None:
    r"""Refuse a path that is not UTF-8: JSON can't hold it, and onnxruntime and safetensors can't open it.

    Raises:
        EdgesafeError: Of the class `error`.

    >>> check_name("caf\udce9")
    Traceback (most recent call last):
    edgesafe.errors.InputError: the path is not UTF-8 text (caf\xe9). Expected: a name in UTF-8. To do: rename it.
    """
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(name).decode("utf-8", "backslashreplace")
        raise error("the path is not UTF-8 text", where=shown, expected="a name in UTF-8", todo="rename it") from None


def shown_name(name: str) -> str:
    r"""A file's name as text that JSON can hold: bytes that are not UTF-8 become a mark.

    >>> shown_name("caf\udce9.csv")
    'caf\ufffd.csv'
    """
    return os.fsencode(name).decode("utf-8", "replace")


def check_target(
    out: Path,
    kind: str = "",
    replaces: Callable[[Path], bool] | None = None,
    *,
    model: str | Path | None = None,
    known: Collection[str] = (),
) -> Path:
    """Refuse, before any work, a folder that could not be put in place or whose replacement would destroy something else.

    Args:
        out: The folder that will be written.
        kind: What may be replaced, e.g. ``bundle``.
        replaces: Whether an existing folder is one. None: the folder has to be new.
        model: A checkpoint that is read meanwhile, by libraries that need names in UTF-8.
        known: Names of which a work folder of an earlier run has one, besides those that `replacing` writes.

    Returns:
        Where the folder will lie: `out` with all links followed.

    Raises:
        ConfigError: Something other than a `kind` is there.
        InputError: It exists and has to be new, or can't be written, or it and the model lie in each other.
    """
    try:
        place = Path(os.path.realpath(out))
        _check_place(out, place)
        _check_contents(out, place, kind, replaces)
        if model is not None:
            check_name(place)
            if Path(model).exists():
                check_name(os.path.realpath(model))
                _check_apart(place, Path(model))
        _check_work(work_folder(place), known)
        _check_makeable(work_folder(place))
    except OSError as error:
        what = f"the folder can't be written: {error.strerror}"
        raise _refused(what, out, "a place that can be written to", "name another --out") from error
    return place


def work_folder(out: Path) -> Path:
    """Where a folder is made before it gets its name: on the same disk, beside it."""
    return out.with_name(out.name + _PARTIAL)


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that a folder lies on, or will lie on."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


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
        out, kind, replaces, model: As for `check_target`.
        key: Digest of what the work is made of.

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
    """Delete what is in a folder; the folder itself stays, and who holds it goes on holding it."""
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
        raise _refused(
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


def _refused(what: str, path: Path, expected: str, todo: str) -> InputError:
    return InputError(what, where=str(path), expected=expected, todo=todo)


def _is_special(path: Path) -> bool:
    """Whether a device, a pipe or a socket is there: nothing that a rename may replace."""
    try:
        return path.exists() and not path.is_file() and not path.is_dir()
    except OSError:  # a name that the system refuses is nothing special
        return False


def _is_mount(path: Path) -> bool:
    """Whether something is mounted at a path, which then can't be renamed."""
    if os.path.ismount(path):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    # A folder bound to another of the same disk looks like any other; only the kernel's list names it, in octal escapes.
    points = (re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), line.split()[4]) for line in lines)
    return os.fsencode(path) in points


def _check_place(out: Path, place: Path) -> None:
    """Refuse names that no rename can give to a folder."""
    if place.is_symlink():
        raise _refused("the link leads to itself", out, "a folder, or a link to one", "remove the link, or name another --out")
    inside = f"name a folder inside it: --out {out / 'new'}"
    if place in (here := Path(os.path.realpath(Path.cwd())), *here.parents):
        raise _refused("the working folder lies there and can't be replaced", out, "another folder", inside)
    if _is_mount(place):
        raise _refused("a mount point can't be replaced in one step", out, "a folder on the mounted disk", inside)
    if place.name.endswith(_PARTIAL):
        raise _refused(f"names in {_PARTIAL} are those of work folders", out, "another name", "name another --out")


def _check_contents(out: Path, place: Path, kind: str, replaces: Callable[[Path], bool] | None) -> None:
    """Refuse to write over what is no older folder of the same kind."""
    if not place.exists():
        return
    if replaces is None:
        raise _refused("the output exists already", out, "a new folder", "name another --out")
    if not (place.is_dir() and (not any(place.iterdir()) or replaces(place))):
        raise ConfigError(
            f"{out} is there and is no {kind}",
            where="--out",
            expected=f"a new folder, an empty one, or an older {kind} to replace",
            todo="name another folder",
        )


def _check_apart(place: Path, model: Path) -> None:
    """Refuse to write into a checkpoint that is read, or to replace a folder that holds it."""
    for folder in (place, work_folder(place)):
        if lies_in(folder, model) or lies_in(model, folder):
            todo = "name another --out"
            raise _refused("the output and the model lie in each other", folder, f"a folder apart from {model}", todo)


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or inside it, by what the file system says: names may differ in case, or be bound."""
    path = Path(os.path.realpath(path))
    return folder.exists() and any(one.exists() and one.samefile(folder) for one in (path, *path.parents))


def _check_work(work: Path, known: Collection[str]) -> None:
    """Refuse a work folder that no run of ours left: it would be deleted."""
    if not (work.exists() or work.is_symlink()):
        return
    ours = work.is_dir() and not work.is_symlink() and not _is_mount(work)
    names = [path.name for path in work.iterdir()] if ours else []
    if not ours or (names and not {*_OURS, *known}.intersection(names)):
        todo = "move it away, or name another --out"
        raise _refused("the work folder's name is taken by something else", work, "a free name, or what a run left", todo)


def _check_makeable(work: Path) -> None:
    """Make the work folder and remove it again, because no other question has the file system's own answer."""
    for left in reversed(range(_TRIES)):
        made: list[Path] = []
        try:
            for folder in reversed([path for path in (work, *work.parents) if not path.exists()]):
                folder.mkdir()
                made.append(folder)
            probe = work / (KEY + _PARTIAL)
            probe.touch()
            probe.unlink(missing_ok=True)
            return
        except (FileExistsError, FileNotFoundError):  # another process of the same run asks at the same time
            if not left:
                raise
        finally:
            for folder in reversed(made):
                with contextlib.suppress(OSError):  # or has begun in it
                    folder.rmdir()


def _key_of(work: Path) -> str:
    try:
        return (work / KEY).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
