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
from edgesafe.format.suite import Suite

_SPACE = uuid.UUID("6f4a3c1e-6f0a-5f0e-9b0b-8d2f0b6b6c55")  # any fixed one: serial numbers differ by the digest


def bill_of_materials(facts: Facts) -> dict[str, Any]:
    """The document as plain JSON values."""
    files = [file(path, facts.sha256[path]) for path in (MANIFEST, CERTIFICATE, *facts.model_files())]
    parts = [*files, suite(facts.suite, facts.suite_json, facts.sha256[facts.suite_json])]
    return document(facts.bundle.digest, _model(facts), _tools(facts), parts)


def document(
    digest: str, model: dict[str, Any], tools: list[dict[str, Any]], parts: list[dict[str, Any]], **more: list[dict[str, Any]]
) -> dict[str, Any]:
    """A bill of materials of a model, which depends on its parts; ``digest`` makes the serial number."""
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_SPACE, digest)}",
        "version": 1,
        "metadata": {"tools": {"components": tools}, "component": model},
        "components": parts,
        "dependencies": [{"ref": "model", "dependsOn": [part["bom-ref"] for part in parts]}],
        **more,
    }


def _model(facts: Facts) -> dict[str, Any]:
    manifest = facts.manifest
    parent = {"type": "machine-learning-model", "bom-ref": "parent", "name": manifest.parent.name}
    ancestors = [{**parent, "properties": properties({"edgesafe:folder-digest": manifest.parent.digest})}]
    if facts.untouched is not None:
        before = {"type": "machine-learning-model", "bom-ref": "untouched", "name": "the checkpoint before it was retrained"}
        ancestors.append({**before, "properties": properties({"edgesafe:folder-digest": facts.untouched})})
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": manifest.name,
        "version": facts.bundle.digest,
        "description": statement(facts.certificate) or "No exit is certified under the present verdict.",
        "pedigree": {"ancestors": ancestors},
        "modelCard": _card(facts),
        "properties": properties({"edgesafe:device": manifest.device, "edgesafe:layout": manifest.layout}),
    }


def _card(facts: Facts) -> dict[str, Any]:
    manifest = facts.manifest
    metrics = [metric(one, f"exit {one.exit.exit}") for one in (*facts.pooled(), *facts.families())]
    metrics += [bound for one in facts.certificate.exits for bound in bounds(one, f"exit {one.exit}")]
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
        "considerations": {"technicalLimitations": left_open(facts.certificate.left_open)},
        "properties": properties({**scope, **schemes}),
    }


def metric(one: Measured, of: str) -> dict[str, Any]:
    """A rate with its two-sided 95 % interval (Wilson); ``of`` is what it was measured of."""
    where = of + (f", family {one.family}" if one.family else "")
    interval = {"lowerBound": repr(one.rate.lower_95), "upperBound": repr(one.rate.upper_95)}
    return {"type": one.measure, "value": repr(one.rate.rate), "slice": where, "confidenceInterval": interval}


def bounds(verdict: ExitVerdict, of: str) -> list[dict[str, Any]]:
    """What a verdict was made of: one-sided 95 % bounds, each with the limit that it was held against."""
    kinds = [f"{check.name}: one-sided 95 % bound, limit {check.limit!r} ({check.test})" for check in verdict.checks]
    return [{"type": kind, "value": repr(check.bound), "slice": of} for kind, check in zip(kinds, verdict.checks, strict=True)]


def suite(one: Suite, path: str, sha256: str) -> dict[str, Any]:
    """A suite as a component, by the file of its head."""
    rows = {"edgesafe:rows": str(len(one.rows)), "edgesafe:digest": one.digest}
    return {
        **file(path, sha256),
        "type": "data",
        "bom-ref": "suite",
        "data": [{"type": "dataset", "name": one.name or "certification suite"}],
        "properties": properties(rows),
    }


def _tools(facts: Facts) -> list[dict[str, Any]]:
    """What made and certified the bundle, by its own records."""
    named = {**facts.manifest.versions, "edgesafe": facts.certificate.environment.get("edgesafe")}
    known = {name: version for name, version in sorted(named.items()) if isinstance(version, str)}
    return [{"type": "library", "name": name, "version": version} for name, version in known.items()]


def file(path: str, sha256: str) -> dict[str, Any]:
    """A file as a component."""
    return {"type": "file", "bom-ref": f"file:{path}", "name": path, "hashes": [{"alg": "SHA-256", "content": sha256}]}


def properties(values: dict[str, str]) -> list[dict[str, str]]:
    """Properties by name, in CycloneDX's form."""
    return [{"name": name, "value": value} for name, value in values.items()]
