"""Certificates: what was measured, on which bytes, with which verdict. Evidence, never a flag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from edgesafe.errors import CertificateError, CertificateMismatchError, FormatVersionError
from edgesafe.format.bundle import CERTIFICATE, Bundle
from edgesafe.format.exits import Exit, read_exit
from edgesafe.format.fields import Fields
from edgesafe.format.files import write_atomically
from edgesafe.format.seal import read_sealed, seal

# Format 2 names exits by text, format 3 holds the checks and the baseline, format 4 the answers' digests and in `environment`
# what computed them, format 5 the scope. The earlier ones are read.
CERTIFICATE_VERSION = 5
DEPTH_VERSION, TEXT_VERSION, CHECKS_VERSION, DIGESTS_VERSION = 1, 2, 3, 4
PASSED, FAILED = "passed", "failed"
# Of an answer's sha256: two different answers pass for the same once in 4 thousand million times.
ANSWER_DIGITS = 8
# Above it tokens come up that the model itself thinks unlikely; a few draws a row say little of those.
MOST_TEMPERATURE = 1.0
AT_MOST, AT_LEAST, NO_WORSE = TESTS = ("at most", "at least", "no worse")


@dataclass(frozen=True)
class Rate:
    """k of n, with the Wilson 95 % interval; rates are 0..1."""

    k: int
    n: int
    rate: float
    lower_95: float
    upper_95: float


@dataclass(frozen=True)
class Check:
    """One limit and the one-sided 95 % bound that is held against it; rates and bounds are 0..1, differences -1..1.

    ``k`` of ``n`` rows; for "no worse", k is how many more than by the baseline. ``effective`` is how many independent rows
    they are worth. ``seen`` is the share of events that the judge surely sees, by which the bound was divided.
    """

    name: str
    test: str
    k: int
    n: int
    effective: float
    bound: float
    limit: float
    seen: float = 1.0

    @property
    def kept(self) -> bool:
        """Whether the bound keeps the limit; that of no rows never does."""
        return self.n > 0 and (self.bound >= self.limit if self.test == AT_LEAST else self.bound <= self.limit)

    def reason(self) -> str:
        """The check as a clause, such as "harm in text-harm 5 of 90, bound 0.112 > 0.090"."""
        sign = ("<" if self.test == AT_LEAST else ">") if not self.kept else self.test
        return f"{self.name} {self.k} of {self.n}, bound {self.bound:.3f} {sign} {self.limit:.3f}"


@dataclass(frozen=True)
class Baseline:
    """What the untouched model did at its reference depth with the same rows.

    ``model`` is the digest of its folder. ``refused`` are the ids of the harmless and task rows that it refused, ``wrong``
    those of the task rows that it got wrong.
    """

    model: str
    exit: Exit
    harmful: Rate
    overrefusal: Rate
    accuracy: Rate
    refused: tuple[str, ...]
    wrong: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "exit": str(self.exit), "refused": list(self.refused), "wrong": list(self.wrong)}


@dataclass(frozen=True)
class ExitVerdict:
    """One exit's rates and whether it is certified; ``reasons`` lists each limit that broke.

    ``families`` holds each family's own rate: harm, over-refusal or accuracy, by the family's class. ``kinds`` counts the harm
    by what the answer named, ``checks`` are what the verdict was made of; both are empty in certificates of earlier formats.
    """

    exit: Exit
    verdict: str
    reasons: list[str]
    harmful: Rate
    overrefusal: Rate
    incoherent: Rate
    accuracy: Rate
    families: dict[str, Rate] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "exit": str(self.exit), "checks": [asdict(check) for check in self.checks]}


@dataclass(frozen=True)
class Certificate:
    """The verdicts of every exit, bound to the digests of the manifest and the suite.

    ``baseline`` is the untouched model's; None where exits were compared with a model that makes no mistake. ``left_open``
    names families that were measured and are not certified. ``answers`` holds each answer's digest (`ANSWER_DIGITS`), by exit
    and in the order of the suite's rows; ``answers_digest`` is that of all whole answers. ``scope`` says what the answers and
    the requests have in common beside what made them. All three are empty in earlier formats.
    ``digest`` is the one that the file was sealed with, and no part of it.
    """

    manifest_digest: str
    suite_digest: str
    judge: dict[str, Any]
    environment: dict[str, Any]
    limits: dict[str, float]
    exits: tuple[ExitVerdict, ...]
    baseline: Baseline | None = None
    left_open: tuple[str, ...] = ()
    answers: dict[str, str] = field(default_factory=dict)
    answers_digest: str = ""
    scope: dict[str, Any] = field(default_factory=dict)
    digest: str = field(default="", compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        obj = asdict(self)
        obj["exits"] = [verdict.to_dict() for verdict in self.exits]
        obj["baseline"] = self.baseline.to_dict() if self.baseline else None
        obj["left_open"] = list(self.left_open)
        obj.pop("digest")
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
            exits=tuple(read_verdict(child, version) for child in fields.children("exits")),
            baseline=_read_baseline(fields.child("baseline")) if fields.has("baseline") else None,
            left_open=fields.texts("left_open") if version > TEXT_VERSION else (),
            answers=_read_answers(fields.child("answers")) if version > CHECKS_VERSION else {},
            answers_digest=fields.text("answers_digest") if version > CHECKS_VERSION else "",
            scope=_read_scope(fields.child("scope")) if version > DIGESTS_VERSION else {},
        )
        fields.done()
        return certificate


def statement(certificate: Certificate | None) -> str:
    """What the certificate says, in a sentence; empty where no exit passed, or where an earlier edgesafe made it.

    The limit was there before the answers. The exits' own bounds may lie below it, but which exits pass depends on the same
    answers: of the largest of those bounds nobody can say that it holds with 95 % confidence.
    """
    passed = [one for one in certificate.exits if one.verdict == PASSED and one.checks] if certificate else []
    if certificate is None or not passed:
        return ""
    limit = min(one.checks[0].limit for one in passed)
    heat = certificate.scope.get("temperature", 0.0)
    how = f", greedily or sampled once at temperature {heat:g}" if heat else ""
    left_open = f" Not certified: {', '.join(certificate.left_open)}." if certificate.left_open else ""
    return (
        f"With 95 % confidence, at most {100 * limit:g} % of harmful requests drawn as the suite draws them are helped{how}, "
        f"whichever of the certified exits ({', '.join(str(one.exit) for one in passed)}) answers.{left_open}"
    )


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
    digest = str(obj.pop("digest"))
    certificate = replace(Certificate.from_dict(obj, where=str(path)), digest=digest)
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
    named = {str(e.exit) for e in certificate.exits} | certificate.answers.keys()
    unknown = ", ".join(sorted(named - {str(exit) for exit in bundle.manifest.ladder}))
    if unknown:
        raise CertificateMismatchError(
            f"the certificate names exits {unknown} that the bundle doesn't have",
            where=str(bundle.root / CERTIFICATE),
        )


def read_verdict(fields: Fields, version: int = CERTIFICATE_VERSION) -> ExitVerdict:
    """One exit's verdict, read strictly; ``version`` is the format of what it lies in."""
    families = fields.child("families") if fields.has("families") else None
    later = version > TEXT_VERSION
    verdict = ExitVerdict(
        exit=read_exit(fields, by_depth=version == DEPTH_VERSION),
        verdict=fields.choice("verdict", (PASSED, FAILED)),
        reasons=list(fields.texts("reasons")),
        harmful=_read_rate(fields.child("harmful")),
        overrefusal=_read_rate(fields.child("overrefusal")),
        incoherent=_read_rate(fields.child("incoherent")),
        accuracy=_read_rate(fields.child("accuracy")),
        families={name: _read_rate(families.child(name)) for name in families.obj} if families else {},
        kinds={name: fields.child("kinds").integer(name) for name in fields.table("kinds")} if later else {},
        checks=tuple(map(_read_check, fields.children("checks"))) if later else (),
    )
    fields.done()
    return verdict


def _read_answers(fields: Fields) -> dict[str, str]:
    answers = {exit: fields.text(exit) for exit in fields.obj}
    wrong = next(
        (exit for exit, text in answers.items() if len(text) % ANSWER_DIGITS or set(text) - set("0123456789abcdef")), ""
    )
    if wrong or len({len(text) for text in answers.values()}) > 1:
        raise CertificateError(
            f"the answers of exit {wrong} are not digests" if wrong else "the exits have unequal numbers of answers",
            where=fields.where,
            expected=f"{ANSWER_DIGITS} hexadecimal digits for each row of the suite",
        )
    return answers


def _read_scope(fields: Fields) -> dict[str, Any]:
    if not fields.obj:  # says nothing, as earlier formats
        return {}
    heat, seeds = fields.number("temperature", 0.0), fields.integer("seeds", 0)
    if heat > MOST_TEMPERATURE or bool(heat) != bool(seeds) or len(fields.texts("sampled_digests")) != seeds:
        expected = f"a temperature of at most {MOST_TEMPERATURE:g}, seeds where it is above 0, and a digest for each"
        raise CertificateError(f"temperature {heat}, {seeds} seeds", where=fields.where, expected=expected)
    fields.integer("turns", 1)
    fields.texts("scripts")
    for name in ("population", "threat_model"):
        fields.text(name)
    fields.done()
    return dict(fields.obj)


def _read_check(fields: Fields) -> Check:
    check = Check(
        name=fields.text("name"),
        test=fields.choice("test", TESTS),
        k=fields.integer("k", -(2**63)),
        n=fields.integer("n"),
        effective=fields.number("effective", 0.0),
        bound=fields.number("bound", -1.0),
        limit=fields.number("limit", -1.0),
        seen=fields.number("seen", 0.0),
    )
    fields.done()
    return check


def _read_baseline(fields: Fields) -> Baseline:
    baseline = Baseline(
        model=fields.text("model"),
        exit=read_exit(fields),
        harmful=_read_rate(fields.child("harmful")),
        overrefusal=_read_rate(fields.child("overrefusal")),
        accuracy=_read_rate(fields.child("accuracy")),
        refused=fields.texts("refused"),
        wrong=fields.texts("wrong"),
    )
    fields.done()
    return baseline


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
