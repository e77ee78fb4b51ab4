"""Where a result may go: refused before any work where it could not be put in place or would destroy something else."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from edgesafe.errors import ConfigError, EdgesafeError, InputError
from edgesafe.hub.cache import snapshot_source

_PARTIAL = ".partial"
_TRIES = 20
_TRIAL = bytes(1 << 12)  # an empty file finds room on a disk that is full
_PLAIN = "rename it, or make a link to it that has a plain name: ln -s FOLDER LINK"
KEY = "made-of"  # in a work folder: what its pieces were made of, and the mark that it is ours
NEW, OLDER = "new", "older"  # in a work folder: what will be OUT, and what was OUT between two renames
_OURS = (KEY, KEY + _PARTIAL, NEW, OLDER)


def work_folder(out: Path) -> Path:
    """Where a folder is made before it gets its name: on the same disk, beside it."""
    return out.with_name(out.name + _PARTIAL)


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that a folder lies on, or will lie on."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


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
            check_name(place, todo="rename it")
            if Path(model).exists():
                check_name(os.path.realpath(model), todo="rename it")  # the bundle is called after it
                _check_apart(place, Path(model))
        _check_work(work_folder(place), known)
        _check_makeable(work_folder(place))
    except (OSError, ValueError) as error:  # ValueError: a name that no folder can have
        what = f"the folder can't be written: {getattr(error, 'strerror', None) or error}"
        raise refused(what, out, "a place that can be written to", "name another --out") from error
    return place


def check_writable(path: Path, *, error: type[EdgesafeError] = InputError, todo: str = "name another place") -> None:
    """Refuse a file that ``write_atomically`` could not write, before the work whose result goes there.

    It tries: a small file is made beside it and removed, because root writes where permissions forbid it, and a mount that is
    read-only or full looks like any other.

    Args:
        path: The file that is to be written.
        error: The class of the refusal.
        todo: What its reader can do.

    Raises:
        EdgesafeError: Of that class; a folder is missing, something else is in the way, or the system refuses.
    """

    def refusal(what: str, expected: str = "a file in a folder that can be written") -> EdgesafeError:
        return error(what, where=str(path), expected=expected, todo=todo)

    try:
        if is_special(path):
            if path.is_socket() or not os.access(path, os.W_OK):
                raise refusal("it is no file, and nothing can be written to it")
            return
        if snapshot_source(path.parent):
            raise refusal("it lies in the hub's cache, whose snapshots are never changed", "a folder of your own")
        place = Path(os.path.realpath(path))
        if place.is_symlink():
            raise refusal("the link leads to itself", "a file, or a link to one")
        if place.is_dir():
            raise refusal("a folder is where the file is to be written")
        if not place.parent.is_dir():
            what = "is not a folder" if place.parent.exists() else "doesn't exist"
            raise refusal(f"{place.parent} {what}")
        if is_mount(place):
            raise refusal("the file is a mount point", "a file that can be replaced")
        _try_file(place.with_name(place.name + _PARTIAL))
    except (OSError, ValueError) as system:  # ValueError: a name that no file can have
        raise refusal(f"the file can't be written: {getattr(system, 'strerror', None) or system}") from system


def check_name(path: str | os.PathLike[str], error: type[EdgesafeError] = InputError, *, todo: str = _PLAIN) -> None:
    r"""Refuse a path that is not UTF-8, as a Latin-1 name from an older disk is.

    Args:
        path: The path.
        error: The class of the refusal.
        todo: What its reader can do.

    Raises:
        EdgesafeError: Of that class.

    >>> check_name("caf\udce9", todo="rename it")
    Traceback (most recent call last):
    edgesafe.errors.InputError: the path is not UTF-8 (caf\xe9). Expected: a name in UTF-8: ... To do: rename it.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        expected = "a name in UTF-8: JSON can hold no other, and onnxruntime, tokenizers and safetensors open no other"
        raise error("the path is not UTF-8", where=shown_path(path), expected=expected, todo=todo) from None


def user_folder(variable: str, default: str) -> Path | None:
    """This user's own folder for edgesafe, by the XDG Base Directory Specification; None where there is no home folder.

    Args:
        variable: What names the folder above it, such as ``XDG_CACHE_HOME``; ignored where it is not an absolute path.
        default: That folder by default, below the home folder.
    """
    named = Path(os.environ.get(variable, ""))
    try:
        return (named if named.is_absolute() else Path.home() / default) / "edgesafe"
    except RuntimeError:
        return None


def shown_path(path: str | os.PathLike[str]) -> str:
    r"""A path as terminals can show it and JSON can hold it: bytes that are not UTF-8 as escapes.

    >>> print(shown_path("caf\udce9.csv"), shown_path("café.csv"))
    caf\xe9.csv café.csv
    """
    return os.fsencode(path).decode(errors="backslashreplace")


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or inside it, by what the file system says: names may differ in case, or be bound."""
    path = Path(os.path.realpath(path))
    return folder.exists() and any(one.exists() and one.samefile(folder) for one in (path, *path.parents))


def _check_place(out: Path, place: Path) -> None:
    """Refuse names that no rename can give to a folder."""
    if place.is_symlink():
        raise refused("the link leads to itself", out, "a folder, or a link to one", "remove the link, or name another --out")
    inside = f"name a folder inside it: --out {out / 'new'}"
    if place in (here := Path(os.path.realpath(Path.cwd())), *here.parents):
        raise refused("the working folder lies there and can't be replaced", out, "another folder", inside)
    if is_mount(place):
        raise refused("a mount point can't be replaced in one step", out, "a folder on the mounted disk", inside)
    if place.name.endswith(_PARTIAL):
        raise refused(f"names in {_PARTIAL} are those of work folders", out, "another name", "name another --out")


def _check_contents(out: Path, place: Path, kind: str, replaces: Callable[[Path], bool] | None) -> None:
    """Refuse to write over anything but an older folder of the same kind."""
    if not place.exists():
        return
    if replaces is None:
        raise refused("the output exists already", out, "a new folder", "name another --out")
    if not (place.is_dir() and (not any(place.iterdir()) or replaces(place))):
        raise ConfigError(
            f"{out} exists and isn't a {kind}",
            where="--out",
            expected=f"a new folder, an empty one, or an older {kind} to replace",
            todo="name another folder",
        )


def _check_apart(place: Path, model: Path) -> None:
    """Refuse to write into a checkpoint that is read, or to replace a folder that holds it."""
    for folder in (place, work_folder(place)):
        if lies_in(folder, model) or lies_in(model, folder):
            todo = "name another --out"
            raise refused("the output and the model lie in each other", folder, f"a folder apart from {model}", todo)


def _check_work(work: Path, known: Collection[str]) -> None:
    """Refuse a work folder that no run of ours left: it would be deleted."""
    if not (work.exists() or work.is_symlink()):
        return
    ours = work.is_dir() and not work.is_symlink() and not is_mount(work)
    names = [path.name for path in work.iterdir()] if ours else []
    if not ours or (names and not {*_OURS, *known}.intersection(names)):
        todo = "move it away, or name another --out"
        raise refused("the work folder's name is taken by something else", work, "a free name, or what a run left", todo)


def _check_makeable(work: Path) -> None:
    """Make the work folder and remove it again, because no other question has the file system's own answer."""
    for left in reversed(range(_TRIES)):
        made: list[Path] = []
        try:
            for folder in reversed([path for path in (work, *work.parents) if not path.exists()]):
                folder.mkdir()
                made.append(folder)
            _try_file(work / (KEY + _PARTIAL))
            return
        except (FileExistsError, FileNotFoundError):  # another process of the same run asks at the same time
            if not left:
                raise
        finally:
            for folder in reversed(made):
                with contextlib.suppress(OSError):  # or has begun in it
                    folder.rmdir()


def _try_file(path: Path) -> None:
    """Write a small file and remove it again; what a killed run left there goes too."""
    path.unlink(missing_ok=True)
    try:
        path.write_bytes(_TRIAL)
    finally:
        path.unlink(missing_ok=True)


def is_special(path: Path) -> bool:
    """Whether a device, a pipe or a socket is there: nothing that a rename may replace."""
    try:
        return path.exists() and not path.is_file() and not path.is_dir()
    except OSError:  # a name that the system refuses is nothing special
        return False


def is_mount(path: Path) -> bool:
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


def refused(what: str, path: Path, expected: str, todo: str) -> InputError:
    """The error of a place that can't be written to."""
    return InputError(what, where=str(path), expected=expected, todo=todo)
