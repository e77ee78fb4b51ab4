"""The evidence of an endpoint's certificate, in the same formats and with the same numbers as a bundle's.

Its subject is what the endpoint answered: the statement names the digest of all answers, since there are no bytes of a model to
name. The bill of materials calls the model external and unseen, and gives no hash of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesafe.assurance import bom
from edgesafe.assurance.documents import percent, record_csv, table
from edgesafe.assurance.evidence import CASE, as_json, digests, write_documents
from edgesafe.assurance.facts import POOLED, by_family, over_all
from edgesafe.assurance.safety_case import DATA_CLAUSE, UNSOURCED, Claim, judge_claim, left_open, to_json, to_markdown, worst
from edgesafe.assurance.signing import check_verdict
from edgesafe.assurance.statements import test_result, tests
from edgesafe.certify.earlier import ANSWERS
from edgesafe.endpoint.certify import ONLY, read_certified
from edgesafe.endpoint.guard import check_replies
from edgesafe.endpoint.kept import CERTIFICATE
from edgesafe.endpoint.labelled import shares
from edgesafe.endpoint.local_guard import LOCAL
from edgesafe.endpoint.report import UNSEEN
from edgesafe.errors import InputError
from edgesafe.format.certificate import AT_MOST, PASSED, ExitVerdict, read_verdict
from edgesafe.format.fields import Fields
from edgesafe.format.files import sha256_file
from edgesafe.format.seal import read_sealed
from edgesafe.format.suite import CLASSES, SUITE, Suite
from edgesafe.format.targets import shown_path

ALL_ANSWERS = "edgesafeAnswers"  # no sha256 of a file, so it must not be called one
_HOW = "sha256 over the JSON of all answers by row, as edgesafe.certify.flips.digest_of_all makes it; no model's bytes"
_OF = "endpoint"
_VERDICT = ("verdict", "reasons", "harmful", "overrefusal", "incoherent", "accuracy", "families", "kinds", "checks")


@dataclass(frozen=True)
class Facts:
    """A finished certification: endpoint.json, its verdict, the suite, and the sha256 of the files that it was read from."""

    certificate: Mapping[str, Any]
    verdict: ExitVerdict
    suite: Suite
    sha256: dict[str, str]

    @property
    def who(self) -> str:
        """The model and where it answers."""
        subject = self.certificate["subject"]
        return f"{subject['model']} at {subject['url']}"

    @property
    def scope(self) -> dict[str, str]:
        """What all answers have in common."""
        request, asked = self.certificate["request"], self.certificate["asked"]
        fields = {f"request {name}": str(value) for name, value in request["fields"].items()}
        system = {"system message, sha256": request["system_sha256"]} if request["system_sha256"] else {}
        return {**fields, **system, "pictures": request["pictures"], "asked": f"{asked['from']} to {asked['to']}"}

    @property
    def not_covered(self) -> list[str]:
        """What the certificate does not speak of."""
        untested = [f"Requests of the class {cls}: the suite has none." for cls in self.certificate["untested"]]
        return [UNSEEN, *untested, *left_open(self.certificate["left_open"])]


def write_endpoint_evidence(run: Path, suite: Suite, out: Path) -> tuple[str, ...]:
    """Write the evidence of a finished certification through an endpoint; the same run gives the same bytes.

    Args:
        run: The folder of `certify_endpoint`.
        suite: The suite that it asked.
        out: The folder to write; an earlier one of evidence is replaced.

    Returns:
        The names of the files in ``out``.

    Raises:
        InputError, IntegrityError, CertificateError: The run has no certificate, its answers or the guard's replies are not
            those that were sealed, or its verdict is not what its checks say.
        ConfigError: Something else is at ``out``.
    """
    facts = _read(run, suite)
    return write_documents(out, lambda: _documents(facts))


def _read(run: Path, suite: Suite) -> Facts:
    texts = read_certified(run, suite)
    file = run / CERTIFICATE
    obj = read_sealed(file) or {}
    if obj.get("format_version") != 1:
        what = f"the certificate has format {obj.get('format_version')}"
        raise InputError(what, where=shown_path(file), expected="format 1", todo="use the edgesafe that wrote it")
    fields = Fields({"exit": str(ONLY), **{name: obj.get(name) for name in _VERDICT}}, shown_path(file), InputError)
    verdict = read_verdict(fields)
    check_verdict(verdict, "the endpoint", file, "certify it again")
    if obj.get("guard"):
        check_replies(run, obj["guard"], suite.rows, texts)
    paths = {CERTIFICATE: file, ANSWERS: run / ANSWERS, SUITE: suite.root / SUITE}
    return Facts(obj, verdict, suite, {name: sha256_file(path) for name, path in paths.items()})


def _documents(facts: Facts) -> dict[str, str]:
    documents = {
        "test-result.intoto.json": as_json(_statement(facts)),
        "bom.cdx.json": as_json(_bill(facts)),
        "model-card.md": _card(facts),
        "test-record.csv": record_csv([facts.verdict], by_family([facts.verdict], facts.suite), lambda _: _OF),
    }
    claims, digest = _claims(facts, digests(documents)), facts.certificate["answers_digest"]
    case = to_json(claims, answers_digest=digest, name=facts.who)
    text = to_markdown(claims, facts.who, f"Digest of all answers {digest}. {UNSEEN}", "what was seen")
    return {**documents, CASE: as_json(case), "safety-case.md": text}


def _statement(facts: Facts) -> dict[str, Any]:
    """One run of the suite: the verdict and each of its checks is a test."""
    obj = facts.certificate
    subject = {
        "name": f"answers of {facts.who}",
        "digest": {ALL_ANSWERS: obj["answers_digest"]},
        "annotations": {ALL_ANSWERS: _HOW, "bytes_seen": False, **obj["subject"]},
    }
    run = {name: obj[name] for name in ("request", "asked", "judge", "guard") if name in obj}
    files = [{"name": name, "digest": {"sha256": facts.sha256[name]}} for name in (SUITE, CERTIFICATE)]
    return test_result([subject], dict(tests(facts.verdict, _OF)), [files[0], {**files[1], "annotations": run}])


def _bill(facts: Facts) -> dict[str, Any]:
    obj, subject = facts.certificate, facts.certificate["subject"]
    metrics = [bom.metric(one, _OF) for one in (*over_all([facts.verdict]), *by_family([facts.verdict], facts.suite))]
    inputs = [{"format": "text"}, *([{"format": "picture"}] if obj["request"]["pictures"] == "sent" else [])]
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": subject["model"],
        "description": obj["statement"],
        "modelCard": {
            "modelParameters": {"datasets": [{"ref": "suite"}], "inputs": inputs, "outputs": [{"format": "text"}]},
            "quantitativeAnalysis": {"performanceMetrics": metrics + bom.bounds(facts.verdict, _OF)},
            "considerations": {"technicalLimitations": facts.not_covered},
            "properties": bom.properties({f"edgesafe:scope:{name}": value for name, value in facts.scope.items()}),
        },
        "properties": bom.properties(
            {
                "edgesafe:external": "true",
                "edgesafe:bytes-seen": "false",
                "edgesafe:answers-digest": obj["answers_digest"],
                "edgesafe:quantization, as it was told": subject["quantization"] or "unknown",
            }
        ),
    }
    asked = {"server": subject, **({"guard": obj["guard"]["subject"]} if "guard" in obj else {})}
    services = [
        {
            "bom-ref": ref,
            "name": one["model"],
            "endpoints": [one["url"]],
            "properties": bom.properties({"server": one["server"]}),
        }
        for ref, one in asked.items()
        if one["url"] != LOCAL
    ]
    parts = [bom.file(name, facts.sha256[name]) for name in (CERTIFICATE, ANSWERS)]
    parts.append(bom.suite(facts.suite, SUITE, facts.sha256[SUITE]))
    tools = [{"type": "library", "name": "edgesafe", "version": obj["edgesafe"]}]
    return bom.document(obj["digest"], model, tools, parts, services=services)


def _card(facts: Facts) -> str:
    obj, subject, verdict = facts.certificate, facts.certificate["subject"], facts.verdict
    rows = [
        ["answers at", subject["url"]],
        ["model's bytes", "not seen"],
        ["quantization", f"{subject['quantization']}, as it was told" if subject["quantization"] else "unknown"],
        ["server", subject["server"] or "unknown"],
        ["names itself", ", ".join(subject["answered_as"]) or "unknown"],
        ["digest of all answers", obj["answers_digest"]],
        ["suite", f"{facts.suite.name or 'unknown'}, {len(facts.suite.rows)} rows ({facts.suite.digest})"],
        ["judge", f"{obj['judge']['name']} {obj['judge']['version']}"],
    ]
    if "guard" in obj:
        guard = obj["guard"]["subject"]
        rows.append(["second judge", f"{guard['model']} at {guard['url']}; harm is what either calls harm"])
    rates = [[name, percent(getattr(verdict, name))] for name in POOLED if getattr(verdict, name).n]
    lines = [f"# {subject['model']}", "", obj["statement"], "", "## Model", "", *table(("what", "value"), rows), ""]
    lines += [f"## Rates: {verdict.verdict}", "", *table(("rate", "per cent"), rates)]
    lines += ["", "Rates in per cent with Wilson's 95 % interval, k of n. The verdict is made of other, one-sided bounds: see"]
    lines += ["`test-record.csv`.", "", "## Scope", "", "The verdict holds for answers made like this:", ""]
    lines += table(("what", "value"), [[name, value] for name, value in facts.scope.items()])
    lines += ["", "## Not covered", "", *(f"- {what}" for what in facts.not_covered)]
    lines += ["- How the model was made, its intended users and uses, licence and energy use are unknown."]
    return "\n".join(lines) + "\n"


def _claims(facts: Facts, written: Mapping[str, str]) -> list[Claim]:
    obj, own = facts.certificate, {CERTIFICATE: facts.sha256[CERTIFICATE]}
    found = {**own, **{name: written[name] for name in ("test-record.csv", "test-result.intoto.json")}}
    guard = [_guard_claim(obj["guard"], own)] if "guard" in obj else []
    return [*_identity(facts, own), *_verdict(facts, found), judge_claim("C5", obj["judge"], own), *guard, *_tested(facts, own)]


def _identity(facts: Facts, own: dict[str, str]) -> tuple[Claim, Claim]:
    return (
        _claim(
            "C1",
            "The certificate is about these answers of this endpoint.",
            "The certificate has the digest of all answers. It was compared with the answers that are kept when this document "
            f"was made. {facts.who} gave them.",
            {**own, ANSWERS: facts.sha256[ANSWERS]},
            (UNSEEN, "Who made the certificate: nothing here is signed."),
        ),
        _claim(
            "C2",
            "The model that answers there today is the one that was certified.",
            "The server's own words are all that is known of the model, and nothing binds it to them.",
            own,
            ("`edgesafe smoke --certified` asks some rows again, and shows whether its answers have changed.",),
            supported=False,
        ),
    )


def _verdict(facts: Facts, found: dict[str, str]) -> tuple[Claim, Claim]:
    verdict, baseline, passed = facts.verdict, facts.certificate["baseline"], facts.verdict.verdict == PASSED
    harm = worst([verdict], lambda check: check.test == AT_MOST, lambda _: "")
    use = worst([verdict], lambda check: check.test != AT_MOST, lambda _: "")
    compared = (
        f"{baseline['model']}, on the same rows" if baseline else "a model that makes no mistake: no baseline was measured"
    )
    sentence = facts.certificate["statement"].removesuffix(UNSEEN).strip()
    return (
        _claim(
            "C3",
            sentence or "Harmful requests are helped rarely enough.",
            f"Each bound is one-sided at 95 %: {harm}." if passed else f"The verdict is failed: {'; '.join(verdict.reasons)}.",
            {**found, SUITE: facts.sha256[SUITE]},
            tuple(facts.not_covered),
            supported=passed,
        ),
        _claim(
            "C4",
            "Harmless requests are still answered.",
            f"Differences are to {compared}. {use}.",
            found,
            ("Tasks of other kinds than the suite's.",),
            supported=passed and bool(use),
        ),
    )


def _tested(facts: Facts, own: dict[str, str]) -> tuple[Claim, Claim]:
    suite = facts.suite
    rows = ", ".join(f"{sum(row.cls == cls for row in suite.rows)} {cls}" for cls in CLASSES)
    return (
        _claim(
            "C7",
            "The test data are fixed, counted and traceable.",
            f"The suite (split {suite.split or 'unknown'}, digest {suite.digest}): {rows} rows.",
            {SUITE: facts.sha256[SUITE]},
            ("That the model's training data are independent of the test data: how it was made is unknown.",),
            clause=DATA_CLAUSE,
        ),
        _claim(
            "C8",
            "It is known under which conditions the other claims hold.",
            f"The answers were made with: {', '.join(f'{name} {value}' for name, value in facts.scope.items())}.",
            own,
            ("Other requests, other settings of the server, and any other time.",),
        ),
    )


def _guard_claim(guard: Mapping[str, Any], evidence: dict[str, str]) -> Claim:
    subject, both, labelled = guard["subject"], guard["agreement"], guard["labelled"]
    known = f"On labelled answers (sha256 {labelled['sha256']}) it {shares(labelled['guard'])}." if labelled else "Unknown."
    return _claim(
        "C6",
        "How often the second judge of the answers errs is known.",
        f"{subject['model']} at {subject['url']} read {guard['counts']['asked']} answers to harmful requests. Of {both['n']} "
        f"with a verdict both judges call {both['both']} harmful, the string judge alone {both['string_only']}, the guard "
        f"alone {both['guard_only']}; {guard['counts']['unreadable']} replies were no verdict. All of these are harm. {known}",
        evidence,
        (
            "Whether the guard is what its name says.",
            "Its errors on answers unlike the labelled ones, and all that a picture adds.",
        ),
        supported=labelled is not None,
    )


def _claim(
    id: str,
    claim: str,
    argument: str,
    evidence: dict[str, str],
    not_covered: tuple[str, ...],
    *,
    supported: bool = True,
    clause: str = UNSOURCED,
) -> Claim:
    return Claim(id, claim, supported, argument, evidence, clause, not_covered)
