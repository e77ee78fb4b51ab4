"""Smoke: a small part of the suite inside the bundle, on the machine that it runs on, against what was certified."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgesafe import __version__
from edgesafe.certify.ask import Answers, ask_all
from edgesafe.certify.certify import check_classes, check_report, environment, suite_of
from edgesafe.certify.flips import change_reasons, changed, what_rows_show
from edgesafe.certify.smoke_rows import LEAST_ROWS, ask_in_time
from edgesafe.certify.string_judge import COMPLY, JUDGE, classify
from edgesafe.certify.tally import smoke_verdict, tally
from edgesafe.errors import CertificateError, InputError, UncertifiedExitError
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import FAILED, PASSED, Certificate, ExitVerdict, certified_exits
from edgesafe.format.exits import Exit
from edgesafe.format.files import write_atomically
from edgesafe.format.suite import CLASSES, Row, Suite
from edgesafe.hub.fetch import bundle_folder
from edgesafe.machine import conditions, read_heat
from edgesafe.progress import table
from edgesafe.runtime.engine import Engine
from edgesafe.runtime.kernels import kernels_here
from edgesafe.runtime.session import Session
from edgesafe.runtime.smoke_record import Ran, SmokeRecord, record_place, write_record
from edgesafe.runtime.standing import standing


@dataclass(frozen=True)
class SmokeReport:
    """The result of `edgesafe smoke`; an exit's `reasons` are empty where it agrees with its certificate.

    Of `answers` so many as `identical` are the certificate's own; None where it keeps none. `shows` says what `rows` rows
    can show and what not, in sentences. `certified` are the exits that are certified on this machine after the run, `why` says
    why others that passed are not, and `record` is the file of the record that counts.

    `--json` prints these fields, with `passed` before them and rates as in a certificate.
    """

    manifest_digest: str
    suite_digest: str
    judge: dict[str, str]
    environment: dict[str, Any]
    rows: int
    exits: tuple[ExitVerdict, ...]
    answers: int
    identical: int | None
    shows: tuple[str, ...]
    certified: tuple[str, ...]
    why: str
    record: str

    @property
    def passed(self) -> bool:
        """Whether every exit that was run agrees with its certificate."""
        return all(e.verdict == PASSED for e in self.exits)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        lists = {name: list(getattr(self, name)) for name in ("shows", "certified")}
        return {"passed": self.passed, **vars(self), **lists, "exits": [verdict.to_dict() for verdict in self.exits]}

    def text(self) -> str:
        """The machine that answered, the table, how many answers are identical, what they show, and what is certified here."""
        if self.identical is None:
            same = f"{self.answers} answers, and a certificate of an earlier format, which keeps none to compare with"
        else:
            same = f"identical answers on {self.identical} of {self.answers}"
        now = f"certified on this machine: {', '.join(self.certified) or 'no exit'}" + (f"; {self.why}" if self.why else "")
        answered = f"answered by: {self.environment['cpu']}"
        return "\n".join([answered, self.table(), "", f"{same} ({self.rows} rows)", *self.shows, now, f"record: {self.record}"])

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
    bundle_path: str | os.PathLike[str],
    *,
    minutes: float | None = None,
    junit: str | os.PathLike[str] | None = None,
    engine: Engine | None = None,
) -> SmokeReport:
    """Run the suite's on-device subset at every certified exit, and keep a record of it for this machine.

    Args:
        bundle_path: the bundle's folder, or ``hub:ORG/NAME@REVISION``.
        minutes: run as many rows as fit instead, at the reference exit and the shallowest first.
        junit: also write a JUnit XML report there; not in the bundle.
        engine: what runs the graphs; by default Python's onnxruntime.

    Raises:
        InputError: `junit` can't be written, or `minutes` is not a time.
        DeviceError: the record can't be written, neither beside the bundle nor among the user's state.
        UncertifiedExitError: no exit is certified, so there is nothing to stand by.
        CertificateError: so few rows fit into the time that they would show nothing.
        BundleError, IntegrityError, CertificateMismatchError: the bundle is not what was certified.
    """
    if minutes is not None and not 0 < minutes < float("inf"):
        raise InputError(f"{minutes} is not a time", where="--minutes", expected="minutes above 0")
    bundle_path = bundle_folder(bundle_path)
    check_report(Bundle.open(bundle_path, verify=False), junit)
    with Session.open(bundle_path, engine=engine) as session:
        certificate, passed = session.certificate, certified_exits(session.certificate)
        if certificate is None or not passed:
            raise UncertifiedExitError(
                "no exit of this bundle has a passed verdict",
                where=str(session.bundle.root),
                expected="certificate.json with a passed exit",
                todo=f"edgesafe certify {session.bundle.root}",
            )
        ran = Ran(session.bundle.digest, certificate.digest, kernels_here(session.engine))
        place = record_place(session.bundle, ran)
        suite = suite_of(session)
        subset, before = suite.smoke_rows(), read_heat()
        check_classes(suite, subset)
        if minutes is None:
            answered = ask_all(session, suite, subset, passed, "smoke")
        else:
            answered = ask_in_time(session, suite, subset, passed, minutes)
        found = _compare(certificate, suite, answered, least=min(LEAST_ROWS, len(subset)))
        report = _recorded(session, certificate, suite, found, ran, place, conditions(before, read_heat()))
    if junit is not None:
        write_atomically(Path(junit), junit_xml(report))
    return report


@dataclass(frozen=True)
class _Found:
    """An exit's verdict, its rows, and the ids of those whose answer changed and of those that were helped with harm."""

    verdict: ExitVerdict
    rows: tuple[Row, ...]
    turned: frozenset[str]
    helped: frozenset[str]


def _compare(certificate: Certificate, suite: Suite, answered: Answers, least: int) -> list[_Found]:
    """What was found at each exit, ascending, without those of fewer rows than `least` that found nothing wrong.

    Raises:
        CertificateError: None is left: so few rows show nothing.
    """
    found = [_at_exit(certificate, suite, exit, answered[exit]) for exit in sorted(answered) if answered[exit]]
    # A rate of nothing passes, so every class has to be there.
    enough = [f for f in found if f.verdict.reasons or (len(f.rows) >= least and {r.cls for r in f.rows} == set(CLASSES))]
    if not enough:
        raise CertificateError(
            f"the time was enough for {max(len(f.rows) for f in found)} rows at an exit",
            where=str(suite.root),
            expected=f"at least {least} rows, some of each class",
            todo="allow more --minutes",
        )
    return enough


def _at_exit(certificate: Certificate, suite: Suite, exit: Exit, texts: Mapping[str, str]) -> _Found:
    rows = tuple(row for row in suite.rows if row.id in texts)
    verdict = smoke_verdict(tally(rows, texts), next(e for e in certificate.exits if e.exit == exit), suite.limits)
    turned = changed(suite.rows, texts, certificate.answers.get(str(exit), "")) if certificate.answers else set[str]()
    helped = {row.id for row in rows if row.cls == "harmful" and classify(texts[row.id], row.prompt) == COMPLY}
    reasons = [*change_reasons(len(rows), turned, helped), *verdict.reasons]
    verdict = replace(verdict, reasons=reasons, verdict=FAILED if reasons else PASSED)
    return _Found(verdict, rows, frozenset(turned), frozenset(helped))


def _recorded(
    session: Session,
    certificate: Certificate,
    suite: Suite,
    found: Sequence[_Found],
    ran: Ran,
    place: Path,
    held: Mapping[str, Any],
) -> SmokeReport:
    """The report, once the record is written that it makes."""
    exits, asked = tuple(one.verdict for one in found), {row.id for one in found for row in one.rows}
    answers = sum(len(one.rows) for one in found)
    identical = answers - sum(len(one.turned) for one in found) if certificate.answers else None
    reasons = tuple(f"exit {e.exit}: {reason}" for e in exits for reason in e.reasons)
    ran_exits = tuple(e.exit for e in exits)
    record = SmokeRecord(ran, not reasons, reasons, ran_exits, len(asked), answers, identical, __version__, held)
    record = write_record(session.bundle, record, place)
    now = standing(session.bundle, certificate, session.engine)
    turned, helped = frozenset[str]().union(*(f.turned for f in found)), frozenset[str]().union(*(f.helped for f in found))
    return SmokeReport(
        manifest_digest=session.bundle.digest,
        suite_digest=suite.digest,
        judge=dict(JUDGE),
        environment=environment(session),
        rows=len(asked),
        exits=exits,
        answers=answers,
        identical=identical,
        shows=what_rows_show([row for row in suite.rows if row.id in asked], turned, helped, suite.rows),
        certified=tuple(map(str, now.exits)),
        why=now.why,
        record=str(record.path),
    )


def junit_xml(report: SmokeReport) -> bytes:
    """The report as JUnit XML: one test case for each exit."""
    failures = sum(e.verdict != PASSED for e in report.exits)
    suite = ElementTree.Element("testsuite", name="edgesafe smoke", tests=str(len(report.exits)), failures=str(failures))
    for e in report.exits:
        case = ElementTree.SubElement(suite, "testcase", classname="edgesafe.smoke", name=f"exit {e.exit}")
        if e.reasons:
            ElementTree.SubElement(case, "failure", message="; ".join(e.reasons))
    return bytes(ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))
