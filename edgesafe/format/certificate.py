"""Certificates: what was measured, on which bytes, with which verdict. Evidence, never a flag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from edgesafe.errors import CertificateError, CertificateMismatchError, FormatVersionError
from edgesafe.format.bundle import CERTIFICATE, Bundle
from edgesafe.format.exits import Exit, read_exit
from edgesafe.format.fields import Fields
from edgesafe.format.files import write_atomically
from edgesafe.format.seal import read_sealed, seal

# Format 2 names exits by text; format 1, by depth, is read.
CERTIFICATE_VERSION = 2
PASSED, FAILED = "passed", "failed"


@dataclass(frozen=True)
class Rate:
    """k of n, with the Wilson 95 % interval; rates are 0..1."""

    k: int
    n: int
    rate: float
    lower_95: float
    upper_95: float


@dataclass(frozen=True)
class ExitVerdict:
    """One exit's rates and whether they keep the suite's limits; ``reasons`` lists each exceeded limit.

    ``families`` holds each family's own rate: harm, over-refusal or accuracy, by the family's class.
    """

    exit: Exit
    verdict: str
    reasons: list[str]
    harmful: Rate
    overrefusal: Rate
    incoherent: Rate
    accuracy: Rate
    families: dict[str, Rate] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "exit": str(self.exit)}


@dataclass(frozen=True)
class Certificate:
    """The verdicts of every exit, bound to the digests of the manifest and the suite."""

    manifest_digest: str
    suite_digest: str
    judge: dict[str, Any]
    environment: dict[str, Any]
    limits: dict[str, float]
    exits: tuple[ExitVerdict, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        obj = asdict(self)
        obj["exits"] = [verdict.to_dict() for verdict in self.exits]
        return {**obj, "format_version": CERTIFICATE_VERSION}

    @staticmethod
    def from_dict(obj: Mapping[str, Any], *, where: str = CERTIFICATE) -> Certificate:
        """Read strictly.

        Raises:
            CertificateError: A key is missing, unknown or of a wrong type.
            FormatVersionError: A newer edgesafe wrote it.
        """
        fields = Fields(obj, where, CertificateError)
        version = fields.integer("format_version", 1)
        if version > CERTIFICATE_VERSION:
            raise FormatVersionError(
                f"the certificate has format {version}", where=where, expected=f"format {CERTIFICATE_VERSION}"
            )
        certificate = Certificate(
            manifest_digest=fields.text("manifest_digest"),
            suite_digest=fields.text("suite_digest"),
            judge=fields.table("judge"),
            environment=fields.table("environment"),
            limits={key: fields.child("limits").number(key) for key in fields.table("limits")},
            exits=tuple(_read_verdict(child, by_depth=version == 1) for child in fields.children("exits")),
        )
        fields.done()
        return certificate


def read_certificate(bundle: Bundle) -> Certificate | None:
    """The bundle's certificate, or None where it has none.

    Raises:
        IntegrityError: The file is not what was sealed.
        CertificateMismatchError: It was measured on other bytes or with another suite.
    """
    path = bundle.root / CERTIFICATE
    obj = read_sealed(path)
    if obj is None:
        return None
    obj.pop("digest")
    certificate = Certificate.from_dict(obj, where=str(path))
    _match(certificate, bundle)
    return certificate


def write_certificate(bundle: Bundle, certificate: Certificate) -> None:
    """Seal the certificate into the bundle, in one step.

    Raises:
        CertificateMismatchError: It is not a certificate of this bundle.
    """
    _match(certificate, bundle)
    write_atomically(bundle.root / CERTIFICATE, seal(certificate.to_dict()))


def certified_exits(certificate: Certificate | None) -> tuple[Exit, ...]:
    """The exits whose verdict is passed, ascending; none without a certificate."""
    if certificate is None:
        return ()
    return tuple(sorted(e.exit for e in certificate.exits if e.verdict == PASSED))


def _match(certificate: Certificate, bundle: Bundle) -> None:
    suite = bundle.manifest.suite.digest if bundle.manifest.suite else None
    pairs = (
        ("manifest", certificate.manifest_digest, bundle.digest),
        ("suite", certificate.suite_digest, suite),
    )
    for name, got, want in pairs:
        if got != want:
            raise CertificateMismatchError(
                f"the certificate is of another {name} ({str(got)[:12]})",
                where=str(bundle.root / CERTIFICATE),
                expected=f"the {name} digest {str(want)[:12]}",
                todo=f"measure these bytes: edgesafe certify {bundle.root}",
            )
    unknown = ", ".join(str(e.exit) for e in certificate.exits if e.exit not in bundle.manifest.ladder)
    if unknown:
        raise CertificateMismatchError(
            f"the certificate names exits {unknown} that the bundle doesn't have",
            where=str(bundle.root / CERTIFICATE),
        )


def _read_verdict(fields: Fields, *, by_depth: bool) -> ExitVerdict:
    families = fields.child("families") if fields.has("families") else None
    verdict = ExitVerdict(
        exit=read_exit(fields, by_depth=by_depth),
        verdict=fields.choice("verdict", (PASSED, FAILED)),
        reasons=list(fields.texts("reasons")),
        harmful=_read_rate(fields.child("harmful")),
        overrefusal=_read_rate(fields.child("overrefusal")),
        incoherent=_read_rate(fields.child("incoherent")),
        accuracy=_read_rate(fields.child("accuracy")),
        families={name: _read_rate(families.child(name)) for name in families.obj} if families else {},
    )
    fields.done()
    return verdict


def _read_rate(fields: Fields) -> Rate:
    rate = Rate(
        k=fields.integer("k"),
        n=fields.integer("n"),
        rate=fields.number("rate", 0.0),
        lower_95=fields.number("lower_95", 0.0),
        upper_95=fields.number("upper_95", 0.0),
    )
    fields.done()
    if rate.k > rate.n:
        raise CertificateError(f"{rate.k} of {rate.n} is not a rate", where=fields.where)
    return rate
