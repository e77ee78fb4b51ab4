"""A bundle as a CycloneDX 1.6 bill of materials: the model with its card and metrics, its files, and what it was made from.

Source: cyclonedx.org/docs/1.6/json, machine-learning-model and modelCard.
Differs: no timestamp, and the serial number is made from the bundle's digest, so that the same bundle gives the same document.
"""

from __future__ import annotations

import uuid
from typing import Any

from edgesafe.assurance.facts import Facts, Measured
from edgesafe.assurance.safety_case import left_open
from edgesafe.format.bundle import CERTIFICATE, MANIFEST
from edgesafe.format.certificate import ExitVerdict, statement

_SPACE = uuid.UUID("6f4a3c1e-6f0a-5f0e-9b0b-8d2f0b6b6c55")  # any fixed one: serial numbers differ by the digest


def bill_of_materials(facts: Facts) -> dict[str, Any]:
    """The document as plain JSON values."""
    files = [_file(path, facts.sha256[path]) for path in (MANIFEST, CERTIFICATE, *facts.model_files())]
    parts = [*files, _suite(facts)]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_SPACE, facts.bundle.digest)}",
        "version": 1,
        "metadata": {"tools": {"components": _tools(facts)}, "component": _model(facts)},
        "components": parts,
        "dependencies": [{"ref": "model", "dependsOn": [part["bom-ref"] for part in parts]}],
    }


def _model(facts: Facts) -> dict[str, Any]:
    manifest = facts.manifest
    parent = {"type": "machine-learning-model", "bom-ref": "parent", "name": manifest.parent.name}
    ancestors = [{**parent, "properties": _properties({"edgesafe:folder-digest": manifest.parent.digest})}]
    if facts.untouched is not None:
        before = {"type": "machine-learning-model", "bom-ref": "untouched", "name": "the checkpoint before it was retrained"}
        ancestors.append({**before, "properties": _properties({"edgesafe:folder-digest": facts.untouched})})
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": manifest.name,
        "version": facts.bundle.digest,
        "description": statement(facts.certificate) or "No exit is certified under the present verdict.",
        "pedigree": {"ancestors": ancestors},
        "modelCard": _card(facts),
        "properties": _properties({"edgesafe:device": manifest.device, "edgesafe:layout": manifest.layout}),
    }


def _card(facts: Facts) -> dict[str, Any]:
    manifest = facts.manifest
    metrics = [_metric(one) for one in (*facts.pooled(), *facts.families())]
    metrics += [bound for exit in facts.certificate.exits for bound in _bounds(exit)]
    scope = {f"edgesafe:scope:{key}": value for key, value in facts.scope().items()}
    schemes = {f"edgesafe:scheme:{side}": scheme for side, scheme in manifest.quantization.items()}
    return {
        "modelParameters": {
            "task": "answers to questions about a picture",
            "architectureFamily": manifest.family,
            "datasets": [{"ref": "suite"}],
            "inputs": [{"format": f"picture, {manifest.image.height} x {manifest.image.width}"}, {"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": metrics},
        "considerations": {"technicalLimitations": left_open(facts)},
        "properties": _properties({**scope, **schemes}),
    }


def _metric(one: Measured) -> dict[str, Any]:
    """A rate with its two-sided 95 % interval (Wilson)."""
    where = f"exit {one.exit.exit}" + (f", family {one.family}" if one.family else "")
    interval = {"lowerBound": repr(one.rate.lower_95), "upperBound": repr(one.rate.upper_95)}
    return {"type": one.measure, "value": repr(one.rate.rate), "slice": where, "confidenceInterval": interval}


def _bounds(exit: ExitVerdict) -> list[dict[str, Any]]:
    """What the verdict was made of: one-sided 95 % bounds, each with the limit that it was held against."""
    kinds = [f"{check.name}: one-sided 95 % bound, limit {check.limit!r} ({check.test})" for check in exit.checks]
    return [
        {"type": kind, "value": repr(check.bound), "slice": f"exit {exit.exit}"}
        for kind, check in zip(kinds, exit.checks, strict=True)
    ]


def _suite(facts: Facts) -> dict[str, Any]:
    rows = {"edgesafe:rows": str(len(facts.suite.rows)), "edgesafe:digest": facts.suite.digest}
    return {
        **_file(facts.suite_json, facts.sha256[facts.suite_json]),
        "type": "data",
        "bom-ref": "suite",
        "data": [{"type": "dataset", "name": facts.suite.name or "certification suite"}],
        "properties": _properties(rows),
    }


def _tools(facts: Facts) -> list[dict[str, Any]]:
    """What made and certified the bundle, by its own records."""
    named = {**facts.manifest.versions, "edgesafe": facts.certificate.environment.get("edgesafe")}
    known = {name: version for name, version in sorted(named.items()) if isinstance(version, str)}
    return [{"type": "library", "name": name, "version": version} for name, version in known.items()]


def _file(path: str, sha256: str) -> dict[str, Any]:
    return {"type": "file", "bom-ref": f"file:{path}", "name": path, "hashes": [{"alg": "SHA-256", "content": sha256}]}


def _properties(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]
