"""The folder of one run: what was asked of whom (run.json), and every answer as it came (answers.jsonl).

The two are enough to continue with: a run that was stopped anywhere asks for what is missing and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgesafe.certify.earlier import ANSWERS
from edgesafe.errors import InputError
from edgesafe.format.bundle import MANIFEST, is_bundle
from edgesafe.format.fields import Fields
from edgesafe.format.files import held, write_atomically
from edgesafe.format.targets import check_writable, shown_path

RUN, CERTIFICATE = "run.json", "endpoint.json"
GUARD = "guard-"  # how a guard's folder in a run's begins
KIND = "edgesafe endpoint run"
RUN_VERSION = 1


@dataclass(frozen=True)
class Kept:
    """One answer: the row's id, the text, and what the server said of it; see `edgesafe.endpoint.reply.Said`.

    ``at`` is when it came, in UTC; ``seconds`` is how long it took, with all tries.
    """

    id: str
    answer: str
    finish: str
    model: str
    fingerprint: str
    prompt_tokens: int | None
    completion_tokens: int | None
    at: str
    seconds: float


@dataclass(frozen=True)
class Run:
    """A run's folder: what run.json holds, and the answers that are there, by row id."""

    folder: Path
    head: dict[str, Any]
    kept: dict[str, Kept]

    def add(self, one: Kept) -> None:
        """Keep one more answer, on the disk before anything else is asked."""
        with (self.folder / ANSWERS).open("ab") as file:
            file.write(json.dumps(asdict(one)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.kept[one.id] = one


def longest(request: Mapping[str, Any]) -> Any:
    """The most tokens that answers may have by a run's `request`, under either of the API's names for it; None where open."""
    fields = request.get("fields", {})
    return fields.get("max_tokens") or fields.get("max_completion_tokens")


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / RUN).is_file()


def check_out(folder: Path) -> None:
    """Refuse, before anything is asked, a folder that can't hold a run.

    Raises:
        InputError: Something else is in it, it lies in a bundle, or it can't be written.
    """
    if any((above / MANIFEST).is_file() and is_bundle(above) for above in (folder, *folder.absolute().parents)):
        what = "the bundle holds what its manifest lists and no other file"
        raise InputError(what, where=shown_path(folder), expected="a folder outside of the bundle", todo="name another --out")
    if folder.is_dir() and not is_run(folder) and any(not one.name.startswith(GUARD) for one in folder.iterdir()):
        what = "the folder holds something other than a run"
        raise InputError(what, where=shown_path(folder), expected="a new folder, or a run's", todo="name another --out")
    if folder.is_dir():
        check_writable(folder / RUN, todo="name another --out")


@contextmanager
def running(folder: Path, head: Mapping[str, Any]) -> Iterator[Run]:
    """The run in a folder, begun there or continued; no other process writes to it meanwhile.

    Args:
        folder: The folder.
        head: What run.json holds, or must hold if it is there: who is asked, and what.

    Raises:
        InputError: The folder's run asks someone else or something else; what differs is named. Or it can't be written or read.
    """
    check_out(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"the folder can't be written: {error.strerror}"
        raise InputError(what, where=shown_path(folder), expected="a place that can be written to") from error
    with held(folder):
        if is_run(folder):
            run = read_run(folder, mend=True)
            if not run.kept:
                write_atomically(folder / RUN, _run_json(head))
                run = Run(folder, dict(head), {})
            if changes := differences(run.head, head):
                raise InputError(
                    f"the run that is there differs in {', '.join(changes)}",
                    where=shown_path(folder),
                    expected="the same endpoint, request and suite, so that its answers count",
                    todo="name another --out, or give the same options again",
                )
            yield run
        else:
            write_atomically(folder / RUN, _run_json(head))
            yield Run(folder, dict(head), {})


def _run_json(head: Mapping[str, Any]) -> bytes:
    return (json.dumps(head, indent=1) + "\n").encode()


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The names at which two nested tables differ.

    >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3, "d": 4}})
    ['b.c', 'b.d']
    """
    found: list[str] = []
    for name in sorted({*one, *other}):
        first, second = one.get(name), other.get(name)
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            found += differences(first, second, f"{prefix}{name}.")
        elif first != second:
            found.append(prefix + name)
    return found


def read_run(folder: Path, *, mend: bool = False) -> Run:
    """A run's folder.

    Args:
        folder: The folder.
        mend: Cut off a last line that a killed process left half-written. Without it such a line is only left out.

    Raises:
        InputError: It is not a run of this format, or its answers are not what a run writes.
    """
    path = folder / RUN
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("the run can't be read", where=shown_path(path), expected=f"what a run wrote as {RUN}") from error
    if not isinstance(head, dict) or (head.get("kind"), head.get("format_version")) != (KIND, RUN_VERSION):
        what = "the file is not a run's, or one of another format"
        raise InputError(what, where=shown_path(path), expected=f"kind {KIND!r}, format {RUN_VERSION}")
    return Run(folder, head, _read_answers(folder / ANSWERS, mend))


def _read_answers(path: Path, mend: bool) -> dict[str, Kept]:
    data = path.read_bytes() if path.exists() else b""
    whole, _, torn = data.rpartition(b"\n")
    if torn and mend:
        write_atomically(path, whole + b"\n" if whole else b"")
    kept: dict[str, Kept] = {}
    for number, line in enumerate(whole.split(b"\n") if whole else (), start=1):
        where = f"{shown_path(path)}:{number}"
        try:
            obj = json.loads(line)
        except (ValueError, RecursionError):
            todo = "restore the file, or begin again in another folder"
            raise InputError("the line is not JSON", where=where, expected="a line that a run wrote", todo=todo) from None
        one = _read_kept(Fields(obj, where, InputError))
        if one.id in kept:
            raise InputError(f"the row {one.id!r} has two answers", where=where, expected="one answer a row")
        kept[one.id] = one
    return kept


def _read_kept(fields: Fields) -> Kept:
    one = Kept(
        id=fields.text("id"),
        answer=fields.text("answer"),
        finish=fields.text("finish"),
        model=fields.text("model"),
        fingerprint=fields.text("fingerprint"),
        prompt_tokens=fields.integer("prompt_tokens") if fields.has("prompt_tokens") else None,
        completion_tokens=fields.integer("completion_tokens") if fields.has("completion_tokens") else None,
        at=fields.text("at"),
        seconds=fields.number("seconds", 0.0),
    )
    fields.done()
    return one
