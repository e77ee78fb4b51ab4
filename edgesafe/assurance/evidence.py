"""Write what a bundle records about itself in the formats that assessors and their tools read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgesafe.assurance.bom import bill_of_materials
from edgesafe.assurance.documents import model_card, record_csv
from edgesafe.assurance.facts import Facts, read_facts
from edgesafe.assurance.safety_case import safety_case, to_json, to_markdown
from edgesafe.assurance.statements import statements
from edgesafe.format.files import replacing
from edgesafe.format.targets import NEW

CASE = "safety-case.json"
_ALL = {
    *("bom.cdx.json", "model-card.md", "test-record.csv", "safety-case.md", CASE, "test-result.intoto.json"),
    *(f"provenance-{step}.intoto.json" for step in ("align", "export", "quantize")),
}


def write_evidence(
    path: str | os.PathLike[str], out: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None = None
) -> tuple[str, ...]:
    """Write the evidence of a certified bundle to a folder; the same bundle gives the same bytes.

    Args:
        path: The bundle's folder, which is verified first.
        out: The folder to write; an earlier one of evidence is replaced.
        checkpoint: The checkpoint that the bundle was made from. Its training record says how it was retrained; the bundle
            itself doesn't.

    Returns:
        The names of the files in ``out``.

    Raises:
        BundleError, CertificateError: The bundle doesn't verify, or has no certificate.
        InputError: The checkpoint is another one or has no record, or ``out`` can't be written.
        ConfigError: Something else is at ``out``.
    """
    facts = read_facts(path, checkpoint)
    return write_documents(Path(out), lambda: _documents(facts))


def write_documents(out: Path, make: Callable[[], dict[str, str]]) -> tuple[str, ...]:
    """Write the documents that are made, by their names, to a folder that is replaced when all of them are there.

    Raises:
        ConfigError, InputError: As by `write_evidence`.
    """
    with replacing(out, "folder of evidence", is_evidence) as work:
        (work / NEW).mkdir()
        documents = make()
        for name, text in documents.items():
            (work / NEW / name).write_bytes(text.encode())
    return tuple(sorted(documents))


def is_evidence(folder: Path) -> bool:
    """Whether a folder holds evidence and nothing else, so that new evidence may replace it."""
    names = {path.name for path in folder.iterdir()}
    return CASE in names and names <= _ALL


def _documents(facts: Facts) -> dict[str, str]:
    """Every document by its name; the safety case names the others by their digests."""
    documents = {name: as_json(statement) for name, statement in statements(facts).items()}
    documents |= {
        "bom.cdx.json": as_json(bill_of_materials(facts)),
        "model-card.md": model_card(facts),
        "test-record.csv": record_csv(facts.certificate.exits, facts.families()),
    }
    claims, name, digest = safety_case(facts, digests(documents)), facts.manifest.name, facts.bundle.digest
    case = to_json(claims, bundle_digest=digest, name=name)
    text = to_markdown(claims, f"{name} for {facts.manifest.device}", f"Bundle digest {digest}.")
    return {**documents, CASE: as_json(case), "safety-case.md": text}


def digests(documents: Mapping[str, str]) -> dict[str, str]:
    """The sha256 of each document's bytes, by its name."""
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in documents.items()}


def as_json(obj: dict[str, Any]) -> str:
    """JSON as the documents have it."""
    return json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
