"""The safety case of a bundle: claims, why they should be believed, the evidence by digest, and what they leave open.

Every number is one of the bundle's own. A claim that its records don't support says so instead of being left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgesafe.assurance.facts import Facts
from edgesafe.format.bundle import CERTIFICATE, MANIFEST
from edgesafe.format.certificate import AT_MOST, Check, ExitVerdict, statement

# The standard's text is not public. Summaries of it name clause 11 for data; any other number would be a guess of ours.
DATA_CLAUSE = (
    "ISO/PAS 8800:2024, clause 11 by public summaries (independence and traceability of training, validation and test data); "
    "to be confirmed by the assessor"
)
UNSOURCED = "ISO/PAS 8800:2024; clause to be confirmed by the assessor"


@dataclass(frozen=True)
class Claim:
    """One claim; ``evidence`` maps a file to the sha256 of its bytes."""

    id: str
    claim: str
    supported: bool
    argument: str
    evidence: dict[str, str]
    clause: str
    not_covered: tuple[str, ...]


def safety_case(facts: Facts, written: Mapping[str, str]) -> list[Claim]:
    """The claims about a bundle.

    Args:
        facts: What the bundle says.
        written: The other documents of evidence: names and the sha256 of their bytes.
    """
    sealed = {name: facts.sha256[name] for name in (MANIFEST, CERTIFICATE)}
    suite = {facts.suite_json: facts.sha256[facts.suite_json]}
    found = {name: written[name] for name in ("test-record.csv", "test-result.intoto.json") if name in written}
    made = {name: sha256 for name, sha256 in written.items() if name.startswith("provenance-")}
    return [
        _identity(sealed),
        _harm(facts, {**sealed, **suite, **found}),
        _use(facts, {CERTIFICATE: sealed[CERTIFICATE], **found}),
        judge_claim("C4", facts.certificate.judge, {CERTIFICATE: sealed[CERTIFICATE]}),
        _data(facts, {**suite, **made}),
        _export(facts, {MANIFEST: sealed[MANIFEST], **made}),
        _scope(facts, {CERTIFICATE: sealed[CERTIFICATE]}),
    ]


def to_json(claims: Iterable[Claim], **head: str) -> dict[str, Any]:
    """The safety case as plain JSON values; ``head`` says what it is of."""
    return {**head, "claims": [asdict(claim) for claim in claims]}


def to_markdown(claims: Iterable[Claim], title: str, digest: str, recorded: str = "what the bundle records") -> str:
    """The safety case for people.

    Args:
        claims: its claims.
        title: what it is of.
        digest: a sentence with the digest of that.
        recorded: what does not support a claim that is not supported.
    """
    lines = [f"# Safety case of {title}", "", digest]
    for claim in claims:
        status = "supported by the evidence below" if claim.supported else f"NOT SUPPORTED by {recorded}"
        lines += ["", f"## {claim.id}. {claim.claim}", "", f"Status: {status}.", "", f"Argument: {claim.argument}"]
        lines += ["", f"Clause: {claim.clause}.", "", "Evidence (sha256):", ""]
        lines += [f"- `{name}` {sha256}" for name, sha256 in claim.evidence.items()]
        lines += ["", "Not covered:", "", *(f"- {what}" for what in claim.not_covered)]
    return "\n".join(lines) + "\n"


def left_open(families: Iterable[str]) -> list[str]:
    """What a certificate does not speak of; ``families`` are those that it leaves open."""
    families = [f"The family {family} was measured and is not certified." for family in families]
    return [
        *families,
        "Requests and pictures that are not drawn as the suite draws them, among them ones made to get around refusals.",
        "Answers given under other conditions than those of the scope.",
        "What a person or a machine does with an answer.",
    ]


def _identity(sealed: dict[str, str]) -> Claim:
    return Claim(
        id="C1",
        claim="The certificate was measured on exactly the files of this bundle.",
        supported=True,
        argument="The manifest lists the sha256 of every file, and the certificate names the manifest's digest. Both were "
        "compared with the files when this document was made; `edgesafe verify` compares them again.",
        evidence=sealed,
        clause=UNSOURCED,
        not_covered=("Who made the bundle and its certificate: `edgesafe verify --public-key` shows that of a signed one.",),
    )


def _harm(facts: Facts, evidence: dict[str, str]) -> Claim:
    sentence = statement(facts.certificate)
    nearest = worst(facts.passed, lambda check: check.test == AT_MOST)
    argument = (
        "The exits were tested from the reference down, and the certified set ends at the first that fails. Each bound is "
        f"one-sided at 95 %. The worst at a certified exit: {nearest}."
    )
    if not sentence:
        earlier = "The certificate was made by an earlier, weaker verdict." if facts.passed else "No exit kept the limits."
        argument = f"{earlier} It supports no statement about all certified exits together."
    return Claim(
        id="C2",
        claim=sentence or "Harmful requests are helped rarely enough, whichever certified exit answers.",
        supported=bool(sentence),
        argument=argument,
        evidence=evidence,
        clause=UNSOURCED,
        not_covered=tuple(left_open(facts.certificate.left_open)),
    )


def _use(facts: Facts, evidence: dict[str, str]) -> Claim:
    baseline = facts.certificate.baseline
    compared = "a model that makes no mistake, because no baseline was measured"
    if baseline is not None:
        compared = f"the untouched model (digest {baseline.model[:12]}) at its exit {baseline.exit}, on the same rows"
    nearest = worst(facts.passed, lambda check: check.test != AT_MOST)
    argument = f"Differences are to {compared}. The worst at a certified exit: {nearest}."
    return Claim(
        id="C3",
        claim="Harmless requests are still answered and tasks still solved at every certified exit.",
        supported=bool(nearest),
        argument=argument if nearest else "The certificate holds no check of it at a certified exit.",
        evidence=evidence,
        clause=UNSOURCED,
        not_covered=("Tasks of other kinds than the suite's.",),
    )


def judge_claim(id: str, judge: Mapping[str, Any], evidence: dict[str, str]) -> Claim:
    """What is known of the judge's errors, as a certificate has it."""
    counts = {name: _k_of_n(judge.get(name)) for name in ("sensitivity", "specificity", "partial")}
    known = [f"{name} {count}" for name, count in counts.items() if count]
    labelled = f" Labelled set: {judge['labelled']}." if isinstance(judge.get("labelled"), str) else ""
    name = f"{judge.get('name', 'unknown')}, version {judge.get('version', 'unknown')}, sha256 {judge.get('sha256', 'unknown')}"
    argument = f"The judge is {name}. On labelled answers: {', '.join(known)}.{labelled}" if known else f"The judge is {name}."
    return Claim(
        id=id,
        claim="How often the judge of the answers errs is known.",
        supported=bool(counts["sensitivity"]),
        argument=argument,
        evidence=evidence,
        clause=UNSOURCED,
        not_covered=("The judge's errors on answers unlike the labelled ones.",),
    )


def _data(facts: Facts, evidence: dict[str, str]) -> Claim:
    rows = {cls: sum(row.cls == cls for row in facts.suite.rows) for cls in ("harmful", "harmless", "task")}
    counted = ", ".join(f"{n} {cls}" for cls, n in rows.items())
    trained = (facts.training or {}).get("data")
    known = f"The training data have the digest {trained}." if isinstance(trained, str) else "The training data are not known."
    return Claim(
        id="C5",
        claim="The test data are fixed, counted and traceable.",
        supported=True,
        argument=f"The suite (split {facts.suite.split or 'unknown'}, digest {facts.suite.digest}) lies in the bundle: "
        f"{counted} rows. {known}",
        evidence=evidence,
        clause=DATA_CLAUSE,
        not_covered=("That the test data are independent of the training data: the bundle's records don't show it.",),
    )


def _export(facts: Facts, evidence: dict[str, str]) -> Claim:
    parity = facts.manifest.parity
    shown = ", ".join(f"{key} {value}" for key, value in parity.items() if isinstance(value, str | int | float))
    return Claim(
        id="C6",
        claim="The exported graphs compute what the checkpoint computes.",
        supported=bool(parity) and "damage" not in parity,
        argument=f"Measured at export: {shown}; the manifest has each exit's." if parity else "Nothing was recorded.",
        evidence=evidence,
        clause=UNSOURCED,
        not_covered=(
            "Inputs other than those that were compared. The certificate, which is of the exported graphs, is not affected.",
        ),
    )


def _scope(facts: Facts, evidence: dict[str, str]) -> Claim:
    scope = ", ".join(f"{key} {value}" for key, value in facts.scope().items())
    said = f"The answers were made with: {scope}. {facts.requests()}".strip()
    return Claim(
        id="C7",
        claim="It is known under which conditions the other claims hold.",
        supported=bool(scope),
        argument=said if scope else "The certificate records no conditions.",
        evidence=evidence,
        clause=UNSOURCED,
        not_covered=(
            "Other engines, versions and processors: `edgesafe smoke` on the device itself shows whether its answers agree.",
        ),
    )


def worst(
    passed: Sequence[ExitVerdict],
    wanted: Callable[[Check], bool],
    name: Callable[[ExitVerdict], str] = lambda one: f" (exit {one.exit})",
) -> str:
    """Of each limit, the check at a certified exit that comes nearest to it; ``name`` says which exit's it is."""
    nearest: dict[str, tuple[float, Check, str]] = {}
    for one in passed:
        for check in filter(wanted, one.checks):
            room = abs(check.limit - check.bound)
            if check.name not in nearest or room < nearest[check.name][0]:
                nearest[check.name] = (room, check, name(one))
    return "; ".join(
        f"{check.name} {check.k} of {check.n}, bound {check.bound:.4f}, {check.test} {check.limit:.4f}{whose}"
        for _, check, whose in nearest.values()
    )


def _k_of_n(count: object) -> str:
    if not isinstance(count, Mapping) or not {"k", "n"} <= count.keys():
        return ""
    return f"{count['k']} of {count['n']}"
