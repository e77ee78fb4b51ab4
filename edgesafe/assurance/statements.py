"""in-toto statements about a bundle: how it was made (SLSA provenance) and what its certification found (test-result).

Source: github.com/in-toto/attestation, spec/v1 and spec/predicates/test-result.md; slsa.dev/spec/v1.0/provenance.
Differs: nothing here is signed. Builder and build types have names of ours, because the bundle knows no service that built it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from edgesafe.assurance.facts import Facts
from edgesafe.format.bundle import CERTIFICATE, MANIFEST
from edgesafe.format.certificate import PASSED, ExitVerdict

STATEMENT = "https://in-toto.io/Statement/v1"
PROVENANCE = "https://slsa.dev/provenance/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
# A folder's digest is no sha256 of a file, so it must not be called one.
FOLDER = "edgesafeFolder"
_HOW = "sha256 over the sorted relative paths of a folder's files, each with its own sha256"


def statements(facts: Facts) -> dict[str, dict[str, Any]]:
    """Every statement that the bundle's records support, by the name of its file."""
    made = {"test-result.intoto.json": _tested(facts), "provenance-export.intoto.json": _export(facts)}
    if facts.quantized():
        made["provenance-quantize.intoto.json"] = _quantize(facts)
    if facts.untouched is not None:
        made["provenance-align.intoto.json"] = _align(facts, facts.untouched)
    return made


def _tested(facts: Facts) -> dict[str, Any]:
    """One run of the suite: every exit and each of its checks is a test."""
    results = {name: fine for one in facts.certificate.exits for name, fine in tests(one, f"exit {one.exit}")}
    run = {"environment": facts.certificate.environment, "judge": facts.certificate.judge}
    configuration = [_file(facts, facts.suite_json), {**_file(facts, CERTIFICATE), "annotations": run}]
    return test_result(_files(facts, [MANIFEST, *facts.model_files()]), results, configuration)


def test_result(
    subject: list[dict[str, Any]], results: Mapping[str, bool], configuration: list[dict[str, Any]]
) -> dict[str, Any]:
    """A statement about a subject: which tests passed, and what they were made with."""
    predicate = {
        "result": "PASSED" if all(results.values()) else "FAILED",
        "configuration": configuration,
        "passedTests": [name for name, fine in results.items() if fine],
        "warnedTests": [],
        "failedTests": [name for name, fine in results.items() if not fine],
    }
    return _statement(subject, TEST_RESULT, predicate)


def tests(verdict: ExitVerdict, of: str) -> Iterator[tuple[str, bool]]:
    """The tests of what a verdict is of: itself, and each of its checks."""
    yield of, verdict.verdict == PASSED
    for check in verdict.checks:
        yield f"{of}: {check.name}", check.kept


def _export(facts: Facts) -> dict[str, Any]:
    manifest = facts.manifest
    external = {
        "device": manifest.device,
        "layout": manifest.layout,
        **{key: value for key, value in manifest.config.items() if key not in ("device_profile", "retrained_from")},
    }
    internal = {
        "seed": manifest.seed,
        "created": manifest.created,
        **{key: value for key, value in manifest.config.items() if key == "device_profile"},
        "parity": manifest.parity,
    }
    subject = _files(facts, [MANIFEST, *facts.model_files()])
    dependencies = [_checkpoint(manifest.parent.name, manifest.parent.digest), _file(facts, facts.suite_json)]
    return _provenance(subject, "export", external, internal, dependencies, manifest.versions)


def _quantize(facts: Facts) -> dict[str, Any]:
    manifest, files = facts.manifest, facts.quantized()
    internal = {"float_graphs": "not kept, so they have no digest here", "scheme": files}
    dependencies = [_checkpoint(manifest.parent.name, manifest.parent.digest)]
    subject = _files(facts, files)
    return _provenance(subject, "quantize", dict(manifest.quantization), internal, dependencies, manifest.versions)


def _align(facts: Facts, untouched: str) -> dict[str, Any]:
    """The retraining of the checkpoint; its settings are known where the checkpoint was given."""
    record = facts.training or {}
    config = record.get("config", "unknown: the bundle does not hold the training record")
    kept = ("seed", "exits", "reference", "tokens", "threads", "processes")
    internal: dict[str, Any] = {key: record[key] for key in kept if key in record}
    parent = record.get("parent")
    name = str(parent.get("name", "")) if isinstance(parent, Mapping) else ""
    dependencies = [_checkpoint(name or "the checkpoint before it was retrained", untouched)]
    if isinstance(record.get("data"), str):
        dependencies.append(_checkpoint("training data", record["data"]))
    versions = record.get("versions")
    versions = {str(key): str(value) for key, value in versions.items()} if isinstance(versions, Mapping) else {}
    subject = [_checkpoint(facts.manifest.parent.name, facts.manifest.parent.digest)]
    return _provenance(subject, "align", {"config": config}, internal, dependencies, versions)


def _provenance(
    subject: list[dict[str, Any]],
    step: str,
    external: Mapping[str, Any],
    internal: Mapping[str, Any],
    dependencies: list[dict[str, Any]],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    definition = {
        "buildType": f"urn:edgesafe:build:{step}:v1",
        "externalParameters": dict(external),
        "internalParameters": {**internal, "host": "not recorded"},
        "resolvedDependencies": dependencies,
    }
    run = {"builder": {"id": "urn:edgesafe:builder:unrecorded", "version": dict(versions)}}
    return _statement(subject, PROVENANCE, {"buildDefinition": definition, "runDetails": run})


def _statement(subject: list[dict[str, Any]], kind: str, predicate: dict[str, Any]) -> dict[str, Any]:
    return {"_type": STATEMENT, "subject": subject, "predicateType": kind, "predicate": predicate}


def _files(facts: Facts, paths: Iterable[str]) -> list[dict[str, Any]]:
    return [_file(facts, path) for path in paths]


def _file(facts: Facts, path: str) -> dict[str, Any]:
    return {"name": path, "digest": {"sha256": facts.sha256[path]}}


def _checkpoint(name: str, digest: str) -> dict[str, Any]:
    return {"name": name, "digest": {FOLDER: digest}, "annotations": {FOLDER: _HOW}}
