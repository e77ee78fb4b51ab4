"""Smoke records: what a run of `edgesafe smoke` found on one machine, beside the bundle or among the user's state."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from edgesafe.errors import CertificateError, DeviceError, EdgesafeError, FormatVersionError
from edgesafe.format.bundle import MANIFEST, Bundle
from edgesafe.format.exits import Exit
from edgesafe.format.fields import Fields
from edgesafe.format.files import write_atomically
from edgesafe.format.seal import read_sealed, seal
from edgesafe.format.targets import check_writable, user_folder
from edgesafe.machine import machine_kind
from edgesafe.runtime.kernels import Kernels, read_kernels

RECORD_VERSION = 2  # the first has no conditions, and is still read


@dataclass(frozen=True)
class Ran:
    """What a record is of: a bundle, its certificate, what computed the answers and on which kind of machine."""

    bundle: str
    certificate: str
    kernels: Kernels
    machine: str = field(default_factory=machine_kind)

    @property
    def name(self) -> str:
        """The file that holds it, one for each."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.bundle[:12]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


@dataclass(frozen=True)
class SmokeRecord:
    """What a run found. ``identical`` of ``answers`` were the certificate's own; None where it keeps none.

    ``exits`` are those that were run and agree with the certificate where it ``passed``; ``reasons`` say why it did not.
    ``conditions`` are what `edgesafe.machine.conditions` says of the run. ``path`` is the file, and no part of it.
    """

    ran: Ran
    passed: bool
    reasons: tuple[str, ...]
    exits: tuple[Exit, ...]
    rows: int
    answers: int
    identical: int | None
    edgesafe: str
    conditions: Mapping[str, Any] = field(default_factory=dict)
    made: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    path: Path | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        own = {name: value for name, value in vars(self).items() if name not in ("ran", "path")}
        own |= {"reasons": list(self.reasons), "exits": list(map(str, self.exits)), "format_version": RECORD_VERSION}
        return {**asdict(self.ran), "kernels": self.ran.kernels.to_dict(), **own}

    @staticmethod
    def from_dict(obj: Mapping[str, Any], *, where: str) -> SmokeRecord:
        """Read strictly.

        Raises:
            CertificateError: A key is missing, unknown or of a wrong type, or the numbers contradict each other.
            FormatVersionError: Another edgesafe wrote it.
        """
        fields = Fields(obj, where, CertificateError)
        if (version := fields.integer("format_version", 1)) > RECORD_VERSION:
            raise FormatVersionError(f"the smoke record has format {version}", where=where, expected=f"format {RECORD_VERSION}")
        kernels = fields.child("kernels")
        record = SmokeRecord(
            ran=Ran(fields.text("bundle"), fields.text("certificate"), read_kernels(kernels), fields.text("machine")),
            passed=fields.flag("passed"),
            reasons=fields.texts("reasons"),
            exits=tuple(map(Exit.parse, fields.texts("exits"))),
            rows=fields.integer("rows", 1),
            answers=fields.integer("answers", 1),
            identical=fields.integer("identical") if fields.has("identical") else None,
            edgesafe=fields.text("edgesafe"),
            conditions=fields.table("conditions") if version > 1 else {},
            made=fields.text("made"),
        )
        kernels.done()
        fields.done()
        if record.passed == bool(record.reasons) or not record.exits or (record.identical or 0) > record.answers:
            raise CertificateError("the smoke record contradicts itself", where=where)
        return record


def places(bundle: Bundle) -> list[Path]:
    """The folders that may hold a bundle's records: ``NAME.smoke`` beside it, and the user's state where there is a home."""
    root = Path(os.path.realpath(bundle.root))
    state = user_folder("XDG_STATE_HOME", ".local/state")
    return [root.with_name(f"{root.name}.smoke"), *([state / "smoke"] if state else [])]


def read_records(bundle: Bundle, ran: Ran) -> list[SmokeRecord]:
    """The records of such a run, at most one in each place.

    Raises:
        EdgesafeError: One is torn, forged or of another run. It may have told of a failure, so it isn't passed over.
    """
    return [record for folder in places(bundle) if (record := _read(folder / ran.name, ran)) is not None]


def record_place(bundle: Bundle, ran: Ran) -> Path:
    """Where a record can be written: beside the bundle, or in the user's state where the bundle or its folder is read-only.

    Raises:
        DeviceError: Neither can be written.
    """
    todo = "make one of them writable, or name another place: XDG_STATE_HOME=FOLDER edgesafe smoke"
    beside, *state = places(bundle)
    refused: Exception | None = None
    for folder in (beside, *state):
        try:
            if folder == beside:
                check_writable(bundle.root / MANIFEST, error=DeviceError, todo=todo)
            folder.parent.mkdir(parents=True, exist_ok=True)
            check_writable(folder / ran.name if folder.is_dir() else folder, error=DeviceError, todo=todo)
            return folder / ran.name
        except (OSError, DeviceError) as error:
            refused = error
    what = "the run's record can be written neither beside the bundle nor among the user's state"
    raise DeviceError(what, where=str(bundle.root), todo=todo) from refused


def write_record(bundle: Bundle, record: SmokeRecord, path: Path) -> SmokeRecord:
    """Seal a record into the file that ``record_place`` named and remove the one that it replaces; the record that counts.

    A success replaces no longer run, whatever that found: a few rows don't make up for a failure. Then the earlier one is
    what comes back.
    """
    for earlier in _readable(bundle, record.ran):
        if record.passed and earlier.answers > record.answers:
            return earlier
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, seal(record.to_dict()))
    for folder in places(bundle):
        if folder != path.parent:
            with contextlib.suppress(OSError):  # what can't be removed is still read, and a failure there still counts
                (folder / record.ran.name).unlink(missing_ok=True)
    return replace(record, path=path)


def _readable(bundle: Bundle, ran: Ran) -> Iterator[SmokeRecord]:
    for folder in places(bundle):
        with contextlib.suppress(EdgesafeError):  # what is torn is written anew
            if (record := _read(folder / ran.name, ran)) is not None:
                yield record


def _read(path: Path, ran: Ran) -> SmokeRecord | None:
    try:
        obj = read_sealed(path)
    except OSError as error:
        raise CertificateError(f"the smoke record can't be read: {error.strerror}", where=str(path)) from error
    if obj is None:
        return None
    obj.pop("digest")
    record = replace(SmokeRecord.from_dict(obj, where=str(path)), path=path)
    if record.ran != ran:
        raise CertificateError("the smoke record is of another bundle, certificate, engine or machine", where=str(path))
    return record
