"""The bundle on disk: sealed JSON, the manifest, and a folder of known bytes. See BUNDLE.md."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgesafe.errors import BundleError, EdgesafeError, IntegrityError
from edgesafe.format.files import sha256_file, write_atomically
from edgesafe.format.manifest import Manifest
from edgesafe.format.seal import read_sealed, seal, unseal
from edgesafe.format.specs import FileSpec
from edgesafe.format.targets import check_name
from edgesafe.hub.cache import HUB, is_blob, of_the_hub, snapshot_source

MANIFEST = "manifest.json"
CERTIFICATE = "certificate.json"
LATENCY = "latency.json"
_PACKED = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".7z")
SEALED = (MANIFEST, CERTIFICATE, LATENCY)
# A signature signs a sealed file, the manifest among them, so no manifest can list it.
_UNLISTED = (*SEALED, *(name + ".sig" for name in SEALED))
# A measurement is about the machine that made it, and stays there.
SHIPPED = (MANIFEST, CERTIFICATE, f"{MANIFEST}.sig", f"{CERTIFICATE}.sig")


def signature_path(file: Path) -> Path:
    """Where the signature of a sealed file lies: beside it, so that it goes wherever the bundle is copied."""
    return file.with_name(file.name + ".sig")


def file_specs(root: Path) -> dict[str, FileSpec]:
    """The hash and size of every file of a bundle that is being written, the sealed files and their signatures left out."""
    specs = {}
    for path in sorted(_walk(root)):
        if path not in _UNLISTED:
            specs[path] = FileSpec(sha256_file(root / path), (root / path).stat().st_size)
    return specs


def shipped_files(manifest: Manifest) -> tuple[str, ...]:
    """What of a bundle goes to others: the files that its manifest lists, and ``SHIPPED``, of which not all need be there."""
    return (*SHIPPED, *sorted(manifest.files))


def write_manifest(root: Path, manifest: Manifest) -> str:
    """Seal the manifest into the folder and return its digest, which certificates and measurements name."""
    data = seal(manifest.to_dict())
    write_atomically(root / MANIFEST, data)
    return str(unseal(data, MANIFEST)["digest"])


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
            BundleError: The folder is none or has a name that is not UTF-8, or its manifest is not valid.
            FormatVersionError: A newer edgesafe wrote it.
            IntegrityError: A file is missing, added, linked or changed.
        """
        root = Path(path)
        check_name(root, BundleError)
        if not root.is_dir() or not (root / MANIFEST).exists():
            raise _no_bundle(root)
        obj = read_sealed(root / MANIFEST) or {}
        digest = str(obj.pop("digest"))
        bundle = Bundle(root, Manifest.from_dict(obj, where=str(root / MANIFEST)), digest)
        if verify:
            bundle.verify()
        return bundle

    @property
    def source(self) -> str:
        """``hub:ORG/NAME@COMMIT`` of a snapshot in the hub's cache; empty for any other folder."""
        return snapshot_source(self.root)

    def verify(self) -> None:
        """Check that the folder holds exactly the manifest's files with exactly their bytes.

        What comes from the hub may have its README.md and .gitattributes, and `hf download`'s notes, too; nothing reads them.

        Raises:
            IntegrityError: A file is missing, added, linked or changed.
        """
        present, listed = set(_walk(self.root)), set(self.manifest.files)
        extra = self._extra(present)
        for path in sorted(extra - of_the_hub(self.root, extra)):
            raise _damaged(self.root / path, "the file is not in the manifest", "remove it, or copy the bundle again")
        for path in sorted(listed - present):
            raise _damaged(self.root / path, "the file is missing", "copy the bundle again")
        for path, spec in sorted(self.manifest.files.items()):
            file = self.root / path
            if file.stat().st_size != spec.bytes or sha256_file(file) != spec.sha256:
                raise _damaged(file, "the file's bytes are not those of the manifest", "copy the bundle again")
        for name in SEALED:
            read_sealed(self.root / name)

    def _extra(self, present: set[str]) -> set[str]:
        """The files that don't belong to the bundle."""
        # A partial file is what an interrupted write left; nothing ever reads it.
        return present - set(self.manifest.files) - set(_UNLISTED) - {f"{name}.partial" for name in _UNLISTED}

    def graph_path(self, path: str) -> Path:
        """The path of a graph of the manifest on disk."""
        return self.root / path


def _no_bundle(root: Path) -> BundleError:
    todo = "pass what `edgesafe export` wrote, e.g. build/rpi5/bundle"
    if str(root).startswith(HUB):
        what = "is on the hub, and this changes the bundle"
        todo = f"take a copy of its own: hf download {str(root).removeprefix(HUB).partition('@')[0]} --local-dir DIR"
    elif root.is_dir():
        what = "has no manifest.json"
        inside = next((path.parent for path in sorted(root.glob(f"*/{MANIFEST}"))), None)
        todo = f"pass {inside}" if inside else todo
    elif root.is_file():
        what = "is a file"
        todo = "unpack it and pass the folder" if root.name.lower().endswith(_PACKED) else todo
    else:
        what = "is not a folder"
    return BundleError(f"{root} {what}", expected="the folder of a bundle", todo=todo)


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds a bundle and nothing else, so that a new bundle may replace it."""
    try:
        bundle = Bundle.open(folder, verify=False)
        return not bundle.source and not bundle._extra(set(_walk(folder)))
    except EdgesafeError:
        return False


def _damaged(file: Path, what: str, todo: str) -> IntegrityError:
    if source := snapshot_source(file.parent):
        todo = f"remove it from the cache (hf cache rm) and open {source} again; if it stays so, the repository is damaged"
    return IntegrityError(what, where=str(file), expected="the files and bytes that manifest.json lists", todo=todo)


def _walk(root: Path, prefix: str = "") -> Iterator[str]:
    """The relative paths of all files, refusing links (but for the hub's cache) and anything that isn't a plain file."""
    with os.scandir(root / prefix) as entries:
        for entry in entries:
            path = prefix + entry.name
            linked = entry.is_symlink() and not is_blob(root / path)
            if linked or not (entry.is_file() or entry.is_dir()):
                raise _damaged(root / path, "a link or special file lies in the bundle", "copy the bundle again")
            if entry.is_dir():
                yield from _walk(root, path + "/")
            else:
                yield path
