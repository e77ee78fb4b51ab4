"""Sealed files: canonical JSON that carries its own digest. See BUNDLE.md."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from edgesafe.errors import IntegrityError
from edgesafe.hub.cache import is_blob


def seal(obj: dict[str, Any]) -> bytes:
    """Canonical JSON with a ``digest`` field, the sha256 of the canonical JSON without that field.

    Any ``digest`` already in ``obj`` is replaced.

    >>> seal({"b": 1, "a": "x"}).decode().splitlines()[1]
    ' "a": "x",'
    """
    body = {key: value for key, value in obj.items() if key != "digest"}
    return _canonical({**body, "digest": hashlib.sha256(_canonical(body)).hexdigest()})


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """The object inside sealed bytes, its ``digest`` included.

    Raises:
        IntegrityError: The bytes are not exactly what ``seal`` writes for this object.
    """
    try:
        obj = json.loads(data.decode("utf-8"))
        fine = isinstance(obj, dict) and isinstance(obj.get("digest"), str) and seal(obj) == data
    except (ValueError, RecursionError):
        fine = False
    if not fine:
        raise IntegrityError(
            "the file is not what was sealed",
            where=where,
            expected="canonical JSON whose digest field is the sha256 of the rest",
            todo="restore the file from the bundle's source, or make it again; it can't be edited by hand",
        )
    return dict(obj)


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The object in a sealed file, or None where there is no such file.

    Raises:
        IntegrityError: The path is a link (but for the hub's cache) or no plain file, or its bytes are not what was sealed.
    """
    if (path.is_symlink() and not is_blob(path)) or (path.exists() and not path.is_file()):
        raise IntegrityError("a bundle holds plain files only", where=str(path), todo="copy the bundle again")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return unseal(data, str(path))


def _canonical(obj: dict[str, Any]) -> bytes:
    text = json.dumps(obj, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")
