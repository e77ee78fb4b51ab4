"""Certification and smoke: the suite inside the bundle, through the shipped runtime, on the bytes that ship."""

from __future__ import annotations

import json
import os
import platform
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgesafe import __version__
from edgesafe.certify.string_judge import JUDGE, classify
from edgesafe.certify.tally import families, smoke_verdict, tally, verdict
from edgesafe.errors import CertificateError, InputError, IntegrityError, UncertifiedExitError
from edgesafe.format.certificate import PASSED, Certificate, ExitVerdict, write_certificate
from edgesafe.format.files import write_atomically
from edgesafe.format.suite import CLASSES, Row, Suite, read_suite
from edgesafe.format.tiles import ALONE
from edgesafe.machine import machine_name
from edgesafe.progress import bar, table
from edgesafe.runtime.options import MAX_NEW_TOKENS
from edgesafe.runtime.session import Session

Said = dict[int, dict[str, str]]


def certify(
    bundle_path: str | os.PathLike[str], *, progress: bool = True, answers: str | os.PathLike[str] | None = None
) -> Certificate:
    """Run the bundle's own suite at every exit and write certificate.json.

    Args:
        bundle_path: the bundle's folder.
        progress: show a bar on stderr.
        answers: also write every answer there as JSON lines {exit_depth, id, cls, family, judged, answer}; not in the bundle.

    Returns:
        The certificate, which may hold failed exits only.

    Raises:
        CertificateError: the bundle ships no suite, or one without harmful, harmless and task rows.
        InputError: `answers` lies inside the bundle, which may hold nothing that its manifest does not list.
        BundleError, IntegrityError: the bundle is not whole.
    """
    if answers is not None and Path(answers).resolve().is_relative_to(Path(bundle_path).resolve()):
        raise InputError("the answers can't be written into the bundle", where=str(answers), expected="a file outside it")
    session = Session.open(bundle_path, allow_uncertified=True)
    suite = _suite(session)
    _whole(suite, suite.rows)
    said = ask_all(session, suite, suite.rows, session.manifest.depths, "certify" if progress else "")
    rates = {d: tally(suite.rows, said[d]) for d in said}
    reference = rates[session.manifest.reference_depth]
    certificate = Certificate(
        manifest_digest=session.bundle.digest,
        suite_digest=suite.digest,
        judge=dict(JUDGE),
        environment=environment(session),
        limits=dict(suite.limits),
        exits=tuple(
            replace(verdict(d, rates[d], reference, suite.limits), families=families(suite.rows, said[d])) for d in rates
        ),
    )
    if answers is not None:
        write_atomically(Path(answers), _lines(suite.rows, said))
    write_certificate(session.bundle, certificate)
    return certificate


def ask_all(session: Session, suite: Suite, rows: Sequence[Row], depths: Iterable[int], label: str) -> Said:
    """Greedy answers {exit depth: {row id: text}}, as long as `ask` gives by default; shared segments run once a picture."""
    depths = tuple(depths)
    said: Said = {d: {} for d in depths}
    shown, features, cut = None, {}, ALONE
    for row in bar(rows, len(rows), label) if label else rows:
        # Rows of one picture stand next to each other where a suite asks several things about it.
        if row.image != shown:
            path = suite.image_path(row)
            features, cut, shown = session.vision_states(path, depths), session.cut(path), row.image
        for d in depths:
            said[d][row.id] = session.answer_features(features[d], row.prompt, MAX_NEW_TOKENS, cut)
    return said


def environment(session: Session) -> dict[str, Any]:
    """Where the answers were made."""
    return {
        "edgesafe": __version__,
        session.engine.name: session.engine.version,
        "cpu": machine_name(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "threads": session.threads,
        "max_new_tokens": MAX_NEW_TOKENS,
        "decoding": "greedy",
    }


def _suite(session: Session) -> Suite:
    ref = session.manifest.suite
    if ref is None:
        raise CertificateError(
            "the bundle ships no suite",
            where=str(session.bundle.root),
            expected="a suite inside the bundle",
            todo="export it with --suite",
        )
    suite = read_suite(session.bundle.root / ref.path, verify=False)  # opening the bundle has hashed every picture
    if suite.digest != ref.digest:
        raise IntegrityError("the suite is not the one of the manifest", where=str(suite.root), expected=f"digest {ref.digest}")
    return suite


def _whole(suite: Suite, rows: Sequence[Row]) -> None:
    """Refuse rows that leave out a class: a rate of nothing would pass every test."""
    missing = [c for c in CLASSES if all(r.cls != c for r in rows)]
    if missing:
        which = "suite" if len(rows) == len(suite.rows) else "suite's on-device subset"
        raise CertificateError(
            f"the {which} has no {' and no '.join(missing)} rows",
            where=str(suite.root),
            expected="harmful, harmless and task rows",
            todo="export with a whole suite",
        )


def _lines(rows: Sequence[Row], said: Said) -> bytes:
    lines = [
        {
            "exit_depth": depth,
            "id": row.id,
            "cls": row.cls,
            "family": row.family,
            "judged": classify(texts[row.id], row.prompt),
            "answer": texts[row.id],
        }
        for depth, texts in said.items()
        for row in rows
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


@dataclass(frozen=True)
class SmokeReport:
    """What `edgesafe smoke` found; an exit's `reasons` are empty where it agrees with its certificate.

    `--json` prints these fields, with `passed` before them and rates as in a certificate.
    """

    manifest_digest: str
    suite_digest: str
    judge: dict[str, str]
    environment: dict[str, Any]
    rows: int
    exits: tuple[ExitVerdict, ...]

    @property
    def passed(self) -> bool:
        """Whether every certified exit agrees with its certificate."""
        return all(e.verdict == PASSED for e in self.exits)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"passed": self.passed, **asdict(self)}

    def table(self) -> str:
        """One exit a line."""
        lines = [
            [
                e.exit_depth,
                *(f"{r.k}/{r.n}" for r in (e.harmful, e.overrefusal, e.incoherent, e.accuracy)),
                e.verdict,
                "; ".join(e.reasons),
            ]
            for e in self.exits
        ]
        return table(lines, ["exit", "harmful", "over-refusal", "incoherent", "accuracy", "verdict", "reasons"])


def smoke(bundle_path: str | os.PathLike[str], *, junit: str | os.PathLike[str] | None = None) -> SmokeReport:
    """Run the suite's on-device subset at every certified exit.

    Args:
        bundle_path: the bundle's folder.
        junit: also write a JUnit XML report there.

    Raises:
        UncertifiedExitError: no exit is certified, so there is nothing to stand by.
        BundleError, IntegrityError, CertificateMismatchError: the bundle is not what was certified.
    """
    session = Session.open(bundle_path)
    if session.certificate is None or not session.certified:
        raise UncertifiedExitError(
            "no exit of this bundle has a passed verdict",
            where=str(session.bundle.root),
            expected="certificate.json with a passed exit",
            todo=f"edgesafe certify {session.bundle.root}",
        )
    suite = _suite(session)
    rows = suite.smoke_rows()
    _whole(suite, rows)
    said = ask_all(session, suite, rows, session.certified, "smoke")
    verdicts = {e.exit_depth: e for e in session.certificate.exits}
    exits = tuple(smoke_verdict(tally(rows, said[d]), verdicts[d], suite.limits) for d in session.certified)
    report = SmokeReport(session.bundle.digest, suite.digest, dict(JUDGE), environment(session), len(rows), exits)
    if junit is not None:
        write_atomically(Path(junit), junit_xml(report))
    return report


def junit_xml(report: SmokeReport) -> bytes:
    """The report as JUnit XML: one test case an exit."""
    failures = sum(e.verdict != PASSED for e in report.exits)
    suite = ElementTree.Element("testsuite", name="edgesafe smoke", tests=str(len(report.exits)), failures=str(failures))
    for e in report.exits:
        case = ElementTree.SubElement(suite, "testcase", classname="edgesafe.smoke", name=f"exit {e.exit_depth}")
        if e.reasons:
            ElementTree.SubElement(case, "failure", message="; ".join(e.reasons))
    return bytes(ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))
