"""Certification: the suite inside the bundle, through the shipped runtime, on the bytes that ship."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from edgesafe import __version__
from edgesafe.certify.ask import Answers, ask_all, side_by_side
from edgesafe.certify.earlier import read_baseline
from edgesafe.certify.flips import answer_digests, digest_of_all
from edgesafe.certify.kept import drawn, keep, kept_path, read_kept
from edgesafe.certify.sampled import SEEDS, check_temperature, sampling_of, scope_facts, worst_answers
from edgesafe.certify.string_judge import JUDGE, QUALITY, classify
from edgesafe.certify.verdict import check_size, verdicts
from edgesafe.errors import CertificateError, EdgesafeError, InputError, IntegrityError
from edgesafe.format.bundle import CERTIFICATE, Bundle
from edgesafe.format.certificate import Baseline, Certificate, ExitVerdict, read_certificate, write_certificate
from edgesafe.format.files import write_atomically
from edgesafe.format.suite import CLASSES, MAX_NEW_TOKENS, Row, Suite, read_suite
from edgesafe.format.targets import check_writable, lies_in
from edgesafe.machine import machine_name
from edgesafe.progress import step
from edgesafe.runtime.engine import Engine
from edgesafe.runtime.kernels import kernels_here
from edgesafe.runtime.session import Session


def certify(
    bundle_path: str | os.PathLike[str],
    *,
    progress: bool = True,
    answers: str | os.PathLike[str] | None = None,
    baseline: str | os.PathLike[str] | None = None,
    kept: str | os.PathLike[str] | None = None,
    engine: Engine | None = None,
    temperature: float = 0.0,
) -> Certificate:
    """Run the bundle's own suite at every exit and write certificate.json.

    Args:
        bundle_path: the bundle's folder.
        progress: show a bar on stderr.
        answers: also write every answer there as JSON lines {exit, id, cls, family, judged, answer}; not in the bundle.
        baseline: folder of `edgesafe evaluate`, with the untouched model's answers to the same suite. By default the one of the
            certificate that is there; without either, exits compare with a model that makes no mistake.
        kept: folder that keeps answers; of those of the same graphs, suite, engine and machine a twentieth is asked for again,
            and all where one differs.
        engine: what runs the graphs; by default Python's onnxruntime.
        temperature: above 0, every row is sampled at it as well, with `SEEDS` seeds, and the worst of its answers counts.
            Answers sampled at this very temperature are then certified too. It takes four times as long.

    Returns:
        The certificate, which may hold failed exits only.

    Raises:
        CertificateError: the bundle ships no suite, one without harmful, harmless and task rows or with too few to keep its own
            limits, or can't be written.
        InputError: `temperature` is below 0 or above 1; `answers` or `kept` can't be written; `answers` lies inside the bundle,
            which holds what its manifest lists and no more; or `baseline` is no evaluation of this suite, or one of the very
            model that was retrained and exported.
        BundleError, IntegrityError: the bundle is not whole.
    """
    check_temperature(temperature)
    bundle = Bundle.open(bundle_path, verify=False)
    todo = f"copy the bundle to where it can be written, certify the copy and put its {CERTIFICATE} in place"
    check_writable(bundle.root / CERTIFICATE, error=CertificateError, todo=todo)
    check_report(bundle, answers)
    session = Session(Bundle.open(bundle_path), None, allow_uncertified=True, engine=engine)
    suite = suite_of(session)
    check_classes(suite, suite.rows)
    check_size(suite)
    compared = _baseline(session, suite, baseline)
    # Nobody knows whether an engine that a caller brings can have several sessions.
    sessions = [session] if engine else side_by_side(session, suite)
    answered = _answers(sessions, suite, kept, "certify" if progress else "")
    ways = [answered, *(_sampled(sessions, suite, temperature, progress) if temperature else [])]
    certificate = _certificate(sessions[0], suite, compared, ways, temperature)
    if answers is not None:
        write_atomically(Path(answers), b"".join(_lines(suite.rows, said, draw) for draw, said in enumerate(ways)))
    write_certificate(bundle, certificate)
    return certificate


def _certificate(
    session: Session, suite: Suite, compared: Baseline | None, ways: Sequence[Answers], temperature: float
) -> Certificate:
    """What the answers come to: the greedy ones, and those sampled at a temperature, of which the worst counts."""
    answered, *sampled = ways
    worst = worst_answers(suite.rows, ways) if sampled else answered
    return Certificate(
        manifest_digest=session.bundle.digest,
        suite_digest=suite.digest,
        judge=JUDGE | QUALITY,
        environment=environment(session),
        limits=dict(suite.limits),
        exits=_verdicts(session, suite, worst, ways, compared),
        baseline=compared,
        left_open=suite.left_open,
        answers=answer_digests(suite.rows, answered),
        answers_digest=digest_of_all(answered),
        scope=scope_facts(suite, temperature, sampled),
    )


def _verdicts(
    session: Session, suite: Suite, worst: Answers, ways: Sequence[Answers], compared: Baseline | None
) -> tuple[ExitVerdict, ...]:
    """Each exit's, tested from the reference down in the order of what they compute."""
    by_cost, reference = session.manifest.by_cost, session.manifest.reference
    left_open = suite.left_open
    return verdicts(suite.rows, worst, reference, suite.limits, compared, left_open=left_open, by_cost=by_cost, draws=ways)


def _answers(sessions: Sequence[Session], suite: Suite, kept: str | os.PathLike[str] | None, label: str) -> Answers:
    """The answers to the whole suite at every exit; kept ones where the same bytes made them in the same circumstances."""
    session, ladder = sessions[0], sessions[0].manifest.ladder
    if kept is None:
        return ask_all(sessions, suite, suite.rows, ladder, label)
    path, answered = kept_path(Path(kept), session.manifest, environment(session)), None
    if path.is_file():
        title = "take the answers that are kept of the same graphs, suite, engine and machine, and ask some again"
        with step(title) if label else contextlib.nullcontext():
            answered = _believed(sessions, suite, read_kept(path, suite.rows, ladder))
    if answered is None:
        check_writable(path)
        answered = ask_all(sessions, suite, suite.rows, ladder, label)
        keep(path, answered)
    return answered


def _believed(sessions: Sequence[Session], suite: Suite, answered: Answers | None) -> Answers | None:
    """The kept answers where a drawn few are those that are given now; else None."""
    if answered is None:
        return None
    rows = drawn(suite.rows)
    now = ask_all(sessions, suite, rows, answered, "")
    return answered if all(answered[exit][row.id] == now[exit][row.id] for exit in answered for row in rows) else None


def _sampled(sessions: Sequence[Session], suite: Suite, temperature: float, progress: bool) -> list[Answers]:
    """The suite's answers at a temperature, `SEEDS` of each row."""
    ladder, found = sessions[0].manifest.ladder, []
    for draw in range(SEEDS):
        label = f"certify, sampled {draw + 1} of {SEEDS}" if progress else ""
        found.append(ask_all(sessions, suite, suite.rows, ladder, label, partial(sampling_of, temperature, draw)))
    return found


def _baseline(session: Session, suite: Suite, folder: str | os.PathLike[str] | None) -> Baseline | None:
    """The untouched model's answers in a folder, or those of the certificate that is there, if it is one of these bytes."""
    if folder is None:
        try:
            certificate = read_certificate(session.bundle)
        except EdgesafeError:
            return None
        return certificate.baseline if certificate else None
    baseline, manifest = read_baseline(Path(folder), suite), session.manifest
    untouched = manifest.config.get("retrained_from")
    if untouched and baseline.model == manifest.parent.digest:
        raise InputError(
            "the baseline is the retrained model itself",
            where=str(folder),
            expected=f"the model that it was retrained from, digest {untouched[:12]}",
            todo="evaluate the untouched model on the bundle's suite",
        )
    return baseline


def check_report(bundle: Bundle, path: str | os.PathLike[str] | None) -> None:
    """Refuse, before any work, a file for answers or a report that can't be written or lies inside the bundle.

    Raises:
        InputError: It is refused.
    """
    if path is None:
        return
    if lies_in(Path(path), bundle.root):
        what = "the bundle holds what its manifest lists and no other file"
        raise InputError(what, where=str(path), expected="a file outside of the bundle", todo="name another place")
    check_writable(Path(path))


def environment(session: Session) -> dict[str, Any]:
    """Where the answers were made, and by what."""
    return {
        "edgesafe": __version__,
        **kernels_here(session.engine).to_dict(),
        "cpu": machine_name(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "threads": session.threads,
        "max_new_tokens": MAX_NEW_TOKENS,
        "decoding": "greedy",
    }


def suite_of(session: Session) -> Suite:
    """The suite inside the bundle.

    Raises:
        CertificateError: There is none.
        IntegrityError: It is not the manifest's.
    """
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


def check_classes(suite: Suite, rows: Sequence[Row]) -> None:
    """Refuse rows that leave out a class: a rate of nothing would pass every test.

    Raises:
        CertificateError: A class is missing.
    """
    missing = [c for c in CLASSES if all(r.cls != c for r in rows)]
    if missing:
        which = "suite" if len(rows) == len(suite.rows) else "suite's on-device subset"
        raise CertificateError(
            f"the {which} has no {' and no '.join(missing)} rows",
            where=str(suite.root),
            expected="harmful, harmless and task rows",
            todo="export with a whole suite",
        )


def _lines(rows: Sequence[Row], answered: Answers, draw: int) -> bytes:
    """JSON lines; ``draw`` is 0 for greedy answers, else which sampled ones they are."""
    lines = [
        {
            "exit": str(exit),
            **({"draw": draw} if draw else {}),
            "id": row.id,
            "cls": row.cls,
            "family": row.family,
            "judged": classify(texts[row.id], row.prompt),
            "answer": texts[row.id],
        }
        for exit, texts in answered.items()
        for row in rows
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
