"""Sign a bundle, and verify one: that its bytes are those that were sealed, and with a public key, by whom."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgesafe.assurance.signatures import load_signer, load_verifier
from edgesafe.errors import CertificateError, IntegrityError, SignatureError
from edgesafe.format.bundle import CERTIFICATE, MANIFEST, SEALED, Bundle, signature_path
from edgesafe.format.certificate import PASSED, Certificate, ExitVerdict, certified_exits, read_certificate, statement
from edgesafe.format.exits import Exit
from edgesafe.format.files import write_atomically
from edgesafe.format.seal import read_sealed
from edgesafe.format.targets import check_writable, shown_path
from edgesafe.hub.fetch import bundle_folder

_TRUE = "whether the certificate's measurements are true: edgesafe certify repeats them"
_HERE = "whether this machine gives the answers that were certified: edgesafe smoke finds out"


@dataclass(frozen=True)
class Verified:
    """What was found right about a bundle.

    ``files`` counts those that the manifest seals. ``certified`` are the exits with a passed verdict, ``statement`` is the
    certificate's sentence. ``signed`` names the files whose signatures hold; none without a key. ``not_checked`` says what
    this leaves open. ``source`` is ``hub:ORG/NAME@COMMIT`` of a snapshot from the hub, else empty.
    """

    digest: str
    files: int
    certified: tuple[Exit, ...]
    statement: str
    signed: tuple[str, ...]
    not_checked: tuple[str, ...]
    source: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "certified": [str(exit) for exit in self.certified]}


def verify(path: str | os.PathLike[str], public_key: str | os.PathLike[str] | None = None) -> Verified:
    """Check all that a bundle's own bytes can show and, with a public key, who vouches for them.

    Without a key: every file has the bytes that the manifest seals, nothing was added, and certificate, suite and records
    belong to these bytes. Whoever makes a whole new bundle passes that. With a key each sealed file needs a signature of that
    key too, and there has to be a certificate.

    Args:
        path: The bundle's folder, or ``hub:ORG/NAME@REVISION``.
        public_key: A PEM file with the public key of whoever signed; needs the ``sign`` extra.

    Raises:
        BundleError: The folder is not a bundle, or its manifest is not valid.
        IntegrityError: A file is missing, added, linked, changed, or another bundle's.
        CertificateError: The certificate is not valid; as CertificateMismatchError, it is another bundle's.
        SignatureError: A signature is missing, or is not this key's for these bytes.
        ConfigError: The key can't be used.
    """
    check = load_verifier(Path(public_key)) if public_key is not None else None
    bundle = Bundle.open(bundle_folder(path))
    certificate = read_certificate(bundle)
    _check_verdicts(certificate, bundle.root / CERTIFICATE)
    _check_suite(bundle)
    _check_leftovers(bundle)
    present = _sealed_files(bundle)
    if check is not None:
        if CERTIFICATE not in present:
            raise _removed(bundle.root / CERTIFICATE)
        for file in present.values():
            check(file)
    return Verified(
        digest=bundle.digest,
        files=len(bundle.manifest.files),
        certified=certified_exits(certificate),
        statement=statement(certificate),
        signed=tuple(present) if check else (),
        not_checked=(*(() if check else (_nobody(present),)), _TRUE, _HERE),
        source=bundle.source,
    )


def sign(path: str | os.PathLike[str], key: str | os.PathLike[str], *, password: str | None = None) -> tuple[Path, ...]:
    """Sign a bundle's manifest, its certificate and each record in it.

    The manifest holds every other file's digest, so its signature covers them all. Signatures lie beside what they sign.
    An earlier signature is replaced.

    Args:
        path: The bundle's folder; it has to have a certificate and to be as ``verify`` wants it.
        key: A PEM file with a private key on the curve P-256, P-384 or P-521; needs the ``sign`` extra.
        password: The key's, where it is encrypted.

    Returns:
        The signatures' paths.

    Raises:
        BundleError, CertificateError: As by ``verify``, or the bundle has no certificate.
        ConfigError: The key can't be used.
        InputError: The bundle can't be written.
    """
    write_signature = load_signer(Path(key), password)
    bundle = Bundle.open(path, verify=False)
    verify(path)
    files = _sealed_files(bundle)
    if CERTIFICATE not in files:
        raise CertificateError(
            "a bundle without a certificate is not signed",
            where=shown_path(bundle.root),
            expected=f"a bundle with {CERTIFICATE}, so that one which lost it can be told by its signatures",
            todo=f"certify it first: edgesafe certify {shown_path(bundle.root)}",
        )
    targets = {file: signature_path(file) for file in files.values()}
    for target in targets.values():
        check_writable(target, todo="sign a copy that can be written")
    with tempfile.TemporaryDirectory() as folder:
        made = {file: Path(folder) / target.name for file, target in targets.items()}
        for file, signature in made.items():
            write_signature(file, signature)
        for file, signature in made.items():
            write_atomically(targets[file], signature.read_bytes())
    return tuple(targets.values())


def _sealed_files(bundle: Bundle) -> dict[str, Path]:
    """The sealed files that are there, by name; refuses a record of another bundle, and a signature of a file that is gone."""
    present = {}
    for name in SEALED:
        file = bundle.root / name
        record = read_sealed(file)
        if record is None:
            if signature_path(file).exists():
                raise _removed(file)
            continue
        if name not in (MANIFEST, CERTIFICATE):
            _check_record(record, file, bundle)
        present[name] = file
    return present


def _check_record(record: Mapping[str, Any], file: Path, bundle: Bundle) -> None:
    got = str(record.get("bundle_digest"))
    if got != bundle.digest:
        raise IntegrityError(
            f"the record is of another bundle ({got[:12]})",
            where=shown_path(file),
            expected=f"bundle_digest {bundle.digest[:12]}",
            todo=f"remove {file.name} and its signature; measured again, it is written anew",
        )


def _check_verdicts(certificate: Certificate | None, file: Path) -> None:
    """No exit is passed against a check of its own."""
    for one in certificate.exits if certificate else ():
        check_verdict(one, f"exit {one.exit}", file, f"measure these bytes: edgesafe certify {shown_path(file.parent)}")


def check_verdict(verdict: ExitVerdict, of: str, file: Path, todo: str) -> None:
    """Refuse a verdict that is passed against a check of its own.

    Raises:
        CertificateError: It is; the check is named.
    """
    broken = [check.reason() for check in verdict.checks if not check.kept]
    if verdict.verdict == PASSED and broken:
        what, expected = f"{of} is called passed, but: {broken[0]}", "a verdict that its own checks support"
        raise CertificateError(what, where=shown_path(file), expected=expected, todo=todo)


def _check_suite(bundle: Bundle) -> None:
    """The digest by which manifest and certificate name the suite is that of the suite inside."""
    if bundle.manifest.suite is None:
        return
    file = bundle.root / bundle.manifest.suite.path / "suite.json"
    got = str((read_sealed(file) or {}).get("digest"))
    if got != bundle.manifest.suite.digest:
        raise IntegrityError(
            f"the suite inside is another ({got[:12]}) than the manifest names",
            where=shown_path(file),
            expected=f"the suite digest {bundle.manifest.suite.digest[:12]}",
            todo="get the bundle from its source again, or export it again",
        )


def _check_leftovers(bundle: Bundle) -> None:
    """Nothing reads what an interrupted write left, so bundles open with it; but nobody vouches for it."""
    for file in sorted(bundle.root.glob("*.partial")):
        if file.name not in bundle.manifest.files:
            what, todo = "an interrupted write left the file", f"remove it: rm {shown_path(file)}"
            raise IntegrityError(what, where=shown_path(file), expected="the bundle's own files and nothing else", todo=todo)


def _removed(file: Path) -> SignatureError:
    return SignatureError(
        f"{file.name} is missing from a signed bundle",
        where=shown_path(file),
        expected="the file that was signed",
        todo=f"get the bundle from its source again; if {file.name} was removed on purpose, remove {file.name}.sig too",
    )


def _nobody(present: Mapping[str, Path]) -> str:
    signatures = [signature_path(file).name for file in present.values() if signature_path(file).exists()]
    unread = f"; {', '.join(signatures)} were not read" if signatures else "; nothing here is signed"
    return f"who made the bundle and its certificate: a public key shows it{unread}"
