"""The bundle on disk: sealed JSON, the manifest, and a folder of known bytes. See BUNDLE.md."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesafe.errors import BundleError, IntegrityError
from edgesafe.format.manifest import (
    FORMAT_VERSION,
    ChatSpec,
    ExitSpec,
    FileSpec,
    GraphSpec,
    ImageSpec,
    Manifest,
    ParentSpec,
    SuiteRef,
    TextSpec,
)

__all__ = [
    "CERTIFICATE",
    "FORMAT_VERSION",
    "LATENCY",
    "MANIFEST",
    "Bundle",
    "ChatSpec",
    "ExitSpec",
    "FileSpec",
    "GraphSpec",
    "ImageSpec",
    "Manifest",
    "ParentSpec",
    "SuiteRef",
    "TextSpec",
    "digest_folder",
    "file_specs",
    "read_sealed",
    "seal",
    "sha256_file",
    "unseal",
    "write_atomically",
    "write_manifest",
]

MANIFEST = "manifest.json"
CERTIFICATE = "certificate.json"
LATENCY = "latency.json"
_SEALED = (MANIFEST, CERTIFICATE, LATENCY)
_CHUNK = 1 << 20


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


def _canonical(obj: dict[str, Any]) -> bytes:
    text = json.dumps(obj, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


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


def file_specs(root: Path) -> dict[str, FileSpec]:
    """The hash and size of every file of a bundle that is being written, the three sealed files left out."""
    specs = {}
    for path in sorted(_walk(root)):
        if path not in _SEALED:
            specs[path] = FileSpec(sha256_file(root / path), (root / path).stat().st_size)
    return specs


def write_manifest(root: Path, manifest: Manifest) -> str:
    """Seal the manifest into the folder and return its digest, which certificates and measurements name."""
    data = seal(manifest.to_dict())
    write_atomically(root / MANIFEST, data)
    return str(unseal(data, MANIFEST)["digest"])


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


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The object in a sealed file, or None where there is no such file.

    Raises:
        IntegrityError: The path is a link or no plain file, or its bytes are not what was sealed.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise IntegrityError("a bundle holds plain files only", where=str(path), todo="copy the bundle again")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return unseal(data, str(path))


@dataclass(frozen=True)
class Bundle:
    """A folder whose manifest was read; ``digest`` is the manifest's and covers every other file."""

    root: Path
    manifest: Manifest
    digest: str

    @staticmethod
    def open(path: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
        """Read a bundle, by default hashing every file first.

        Args:
            path: The bundle's folder.
            verify: Hash every file. Turn it off only where this process verified the same bytes before.

        Raises:
            BundleError: The folder is none, or its manifest is not valid.
            FormatVersionError: A newer edgesafe wrote it.
            IntegrityError: A file is missing, added, linked or changed.
        """
        root = Path(path)
        if not root.is_dir() or not (root / MANIFEST).exists():
            what = "has no manifest.json" if root.is_dir() else "is not a folder"
            raise BundleError(
                f"{root} {what}",
                expected="the folder of a bundle",
                todo="pass what `edgesafe export` wrote, e.g. build/rpi5/bundle",
            )
        obj = read_sealed(root / MANIFEST) or {}
        digest = str(obj.pop("digest"))
        bundle = Bundle(root, Manifest.from_dict(obj, where=str(root / MANIFEST)), digest)
        if verify:
            bundle.verify()
        return bundle

    def verify(self) -> None:
        """Check that the folder holds exactly the manifest's files with exactly their bytes.

        Raises:
            IntegrityError: A file is missing, added, linked or changed.
        """
        present = set(_walk(self.root))
        listed = set(self.manifest.files)
        # A partial file is what an interrupted write left; nothing ever reads it.
        extra = present - listed - set(_SEALED) - {f"{name}.partial" for name in _SEALED}
        for path in sorted(extra):
            raise _damaged(self.root / path, "the file is not in the manifest", "remove it, or copy the bundle again")
        for path in sorted(listed - present):
            raise _damaged(self.root / path, "the file is missing", "copy the bundle again")
        for path, spec in sorted(self.manifest.files.items()):
            file = self.root / path
            if file.stat().st_size != spec.bytes or sha256_file(file) != spec.sha256:
                raise _damaged(file, "the file's bytes are not those of the manifest", "copy the bundle again")
        for name in (CERTIFICATE, LATENCY):
            read_sealed(self.root / name)

    def graph_path(self, path: str) -> Path:
        """Where a graph of the manifest lies on disk."""
        return self.root / path


def _damaged(file: Path, what: str, todo: str) -> IntegrityError:
    return IntegrityError(what, where=str(file), expected="the files and bytes that manifest.json lists", todo=todo)


def _walk(root: Path, prefix: str = "") -> Iterator[str]:
    """The relative paths of all files, refusing links and anything that is no plain file."""
    with os.scandir(root / prefix) as entries:
        for entry in entries:
            path = prefix + entry.name
            if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                raise _damaged(root / path, "a link or special file lies in the bundle", "copy the bundle again")
            if entry.is_dir():
                yield from _walk(root, path + "/")
            else:
                yield path
