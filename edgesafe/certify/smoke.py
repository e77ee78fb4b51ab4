"""Smoke: a small part of the suite inside the bundle, on the device, against what was certified."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesafe.certify.certify import ask_all, check_classes, check_report, environment, suite_of
from edgesafe.certify.string_judge import JUDGE
from edgesafe.certify.tally import smoke_verdict, tally
from edgesafe.errors import UncertifiedExitError
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import PASSED, ExitVerdict
from edgesafe.format.files import write_atomically
from edgesafe.progress import table
from edgesafe.runtime.engine import Engine
from edgesafe.runtime.session import Session


@dataclass(frozen=True)
class SmokeReport:
    """The result of `edgesafe smoke`; an exit's `reasons` are empty where it agrees with its certificate.

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
        return {"passed": self.passed, **vars(self), "exits": [verdict.to_dict() for verdict in self.exits]}

    def table(self) -> str:
        """One exit a line."""
        lines = [
            [
                e.exit,
                *(f"{r.k}/{r.n}" for r in (e.harmful, e.overrefusal, e.incoherent, e.accuracy)),
                e.verdict,
                "; ".join(e.reasons),
            ]
            for e in self.exits
        ]
        return table(lines, ["exit", "harmful", "over-refusal", "incoherent", "accuracy", "verdict", "reasons"])


def smoke(
    bundle_path: str | os.PathLike[str], *, junit: str | os.PathLike[str] | None = None, engine: Engine | None = None
) -> SmokeReport:
    """Run the suite's on-device subset at every certified exit.

    Args:
        bundle_path: the bundle's folder.
        junit: also write a JUnit XML report there; not in the bundle.
        engine: what runs the graphs; by default Python's onnxruntime.

    Raises:
        InputError: `junit` can't be written.
        UncertifiedExitError: no exit is certified, so there is nothing to stand by.
        BundleError, IntegrityError, CertificateMismatchError: the bundle is not what was certified.
    """
    check_report(Bundle.open(bundle_path, verify=False), junit)
    session = Session.open(bundle_path, engine=engine)
    if session.certificate is None or not session.certified:
        raise UncertifiedExitError(
            "no exit of this bundle has a passed verdict",
            where=str(session.bundle.root),
            expected="certificate.json with a passed exit",
            todo=f"edgesafe certify {session.bundle.root}",
        )
    suite = suite_of(session)
    rows = suite.smoke_rows()
    check_classes(suite, rows)
    answered = ask_all(session, suite, rows, session.certified, "smoke")
    verdicts = {e.exit: e for e in session.certificate.exits}
    exits = tuple(smoke_verdict(tally(rows, answered[exit]), verdicts[exit], suite.limits) for exit in session.certified)
    report = SmokeReport(session.bundle.digest, suite.digest, dict(JUDGE), environment(session), len(rows), exits)
    if junit is not None:
        write_atomically(Path(junit), junit_xml(report))
    return report


def junit_xml(report: SmokeReport) -> bytes:
    """The report as JUnit XML: one test case for each exit."""
    failures = sum(e.verdict != PASSED for e in report.exits)
    suite = ElementTree.Element("testsuite", name="edgesafe smoke", tests=str(len(report.exits)), failures=str(failures))
    for e in report.exits:
        case = ElementTree.SubElement(suite, "testcase", classname="edgesafe.smoke", name=f"exit {e.exit}")
        if e.reasons:
            ElementTree.SubElement(case, "failure", message="; ".join(e.reasons))
    return bytes(ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))
