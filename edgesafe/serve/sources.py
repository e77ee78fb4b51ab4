"""The picture that an ``image_url`` names: in the request itself, or a file in a folder that was allowed by name.

Nothing is ever fetched. A file is opened from its allowed folder downwards, name by name, and no name may be a link: neither
``..``, nor a link, nor one that is put there meanwhile leads out of the folder.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from edgesafe.errors import ConfigError, InputError

MAX_PICTURE = 16 << 20
_LIMIT = f"at most {MAX_PICTURE >> 20} MiB"
_ALLOWED = "a data URI such as data:image/png;base64,..."


def check_folders(folders: Sequence[Path]) -> tuple[Path, ...]:
    """The folders that pictures may be read from, as real paths.

    Raises:
        ConfigError: One is not a folder, or this system can't open files below a folder safely.
    """
    if folders and not (os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")):
        raise ConfigError("this system can't keep file names within a folder", where="--files", todo="send data URIs instead")
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError("there is no such folder", where=f"--files {folder}", expected="a folder of pictures")
    return tuple(Path(os.path.realpath(folder)) for folder in folders)


def read_picture(url: str, where: str, folders: Sequence[Path]) -> bytes:
    """The bytes of a picture's file.

    Args:
        url: A data URI, or ``file:///PATH`` within one of the folders.
        where: The place in the request, for messages.
        folders: Real paths.

    Raises:
        InputError: The URL is of another kind, or names no picture that may be read.
    """
    scheme = url[:5].lower()
    if scheme == "data:":
        return _decoded(url, where)
    if scheme == "file:" and folders:
        return _read_file(url, where, folders)
    what = "pictures are never fetched from the network"
    if scheme == "file:":
        what = "no folder was allowed to read pictures from"
    elif not url.lower().startswith(("http:", "https:")):
        what = "the URL is neither a data URI nor a file of an allowed folder"
    expected = _ALLOWED + (", or file:///PATH within an allowed folder" if folders else "")
    raise InputError(what, where=where, expected=expected, todo="send the picture itself, in base64")


def _decoded(url: str, where: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InputError("the data URI is not base64", where=where, expected=_ALLOWED)
    if len(data) > MAX_PICTURE * 4 // 3 + 4:
        raise InputError("the picture is too large", where=where, expected=_LIMIT)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("the picture is not base64", where=where, expected=_ALLOWED) from error


def _read_file(url: str, where: str, folders: Sequence[Path]) -> bytes:
    # One message, whatever lies outside: a client can't find out which files exist there.
    missing = InputError("there is no such picture in the allowed folders", where=where, expected="file:///FOLDER/NAME.png")
    parts = _parts(url)
    for folder in folders:
        above = folder.parts
        if parts[: len(above)] == above and len(parts) > len(above):
            return _read_below(folder, parts[len(above) :], where, missing)
    raise missing


def _parts(url: str) -> tuple[str, ...]:
    """The path's names, its root first; none where the URL is not of a plain absolute path.

    >>> _parts("file:///a/b%20c.png"), _parts("file:///a/%2e%2e/b"), _parts("file://host/a"), _parts("file:///a?b")
    (('/', 'a', 'b c.png'), (), (), ())
    """
    try:
        split = urlsplit(url)
        path = unquote(split.path, errors="strict")
    except ValueError:
        return ()
    names = path.split("/")[1:]
    plain = path.startswith("/") and all(name not in ("", ".", "..") and "\0" not in name for name in names)
    if not plain or split.netloc not in ("", "localhost") or "?" in url or "#" in url:
        return ()
    return PurePosixPath(path).parts


def _read_below(folder: Path, names: Sequence[str], where: str, missing: InputError) -> bytes:
    with contextlib.ExitStack() as opened:
        try:
            at = opened.enter_context(_descriptor(str(folder), os.O_DIRECTORY, None))
            for name in names[:-1]:
                at = opened.enter_context(_descriptor(name, os.O_DIRECTORY, at))
            # A pipe would hang: it is opened without waiting for its other end, and is no plain file then.
            at = opened.enter_context(_descriptor(names[-1], os.O_NONBLOCK, at))
            status = os.fstat(at)
            if not stat.S_ISREG(status.st_mode):
                raise missing
            with open(at, "rb", closefd=False) as file:
                data = file.read(MAX_PICTURE + 1)
        except (OSError, ValueError) as error:
            raise missing from error
    if len(data) > MAX_PICTURE:
        raise InputError("the picture is too large", where=where, expected=_LIMIT)
    return data


@contextlib.contextmanager
def _descriptor(name: str, flags: int, below: int | None) -> Iterator[int]:
    number = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=below)
    try:
        yield number
    finally:
        os.close(number)
