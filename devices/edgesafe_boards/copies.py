"""Folders copied to a board: only what is not there yet, checked there, and put in place whole."""

from __future__ import annotations

import shlex
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from edgesafe.errors import DeviceError
from edgesafe.format.files import sha256_file
from edgesafe.progress import bar
from edgesafe_boards.facts import FOLDER
from edgesafe_boards.shell import FULL, Shell


def send(shell: Shell, files: Mapping[str, Path], name: str, digests: Mapping[str, str] | None = None) -> None:
    """Make ``name`` on the board a folder of these files.

    What an interrupted copy left there is not sent again. A copy that the board can't keep is removed again.

    Args:
        shell: The board.
        files: Files here by their paths in the folder.
        name: The folder's name on the board, in edgesafe's own.
        digests: sha256 of files that are known; of the others it is taken.

    Raises:
        DeviceError: The board can't be reached, or can't write them.
    """
    known = digests or {}
    wanted = {path: known.get(path) or sha256_file(file) for path, file in files.items()}
    target, partial = f"{FOLDER}/{name}", f"{FOLDER}/{name}.partial"
    there = _there(shell, partial)
    if stale := [path for path in there if path not in wanted]:
        _remove(shell, partial, stale)
    missing = {path: files[path] for path in files if there.get(path) != wanted[path]}
    if missing:
        _stream(shell, missing, partial, name)
    if _there(shell, partial) != wanted:
        shell.run(f"rm -rf {partial}", "removing a damaged copy")
        raise DeviceError(
            f"what arrived of the {name} is not what was sent",
            where=shell.name,
            expected="every file with its sha256",
            todo="run it again; where it happens again, the board's disk or memory is broken",
        )
    shell.run(f"rm -rf {target} && mv {partial} {target}", f"putting the {name} in place")


def fetch(shell: Shell, path: str) -> bytes:
    """A file of the board, by its path in edgesafe's folder there."""
    return shell.run(f"cat {shlex.quote(f'{FOLDER}/{path}')}", f"fetching {path}").out


def _there(shell: Shell, partial: str) -> dict[str, str]:
    """sha256 by path of what lies in the folder, which is made where it is not there."""
    script = f"mkdir -p {partial} && cd {partial} && find . -type f -exec sha256sum {{}} +"
    lines = shell.run(script, "looking at what is there already").text.splitlines()
    return {line[64:].strip().removeprefix("*").removeprefix("./"): line[:64] for line in lines}


def _remove(shell: Shell, partial: str, paths: list[str]) -> None:
    def names(stdin: IO[bytes]) -> None:
        stdin.write("".join(f"{path}\0" for path in paths).encode())

    shell.run(f"cd {partial} && xargs -0 rm -f --", "removing older files", feed=names)


def _stream(shell: Shell, files: Mapping[str, Path], partial: str, name: str) -> None:
    def archive(stdin: IO[bytes]) -> None:
        with tarfile.open(fileobj=stdin, mode="w|", bufsize=1 << 16) as tar:
            sizes = [file.stat().st_size for file in files.values()]
            for path, file in bar(files.items(), len(files), f"copying the {name}", sizes=sizes):
                tar.add(file, path, recursive=False, filter=_plain)

    script = f"cd {partial} && tar -xf - --no-same-owner"
    try:
        shell.run(script, f"copying the {name}", feed=archive)
    except DeviceError as error:
        if FULL in error.what:  # where the connection breaks, what arrived stays for the next run
            shell.run(f"rm -rf {partial}", "removing a copy that has no room")
        raise


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nothing of this machine's users."""
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mode = 0o644
    return info
