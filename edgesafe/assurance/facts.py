"""What a bundle knows about itself, read once for every document of evidence. What it doesn't know is None or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesafe.assurance.signing import verify
from edgesafe.errors import CertificateError, InputError
from edgesafe.format.bundle import CERTIFICATE, MANIFEST, Bundle
from edgesafe.format.certificate import PASSED, Certificate, Check, ExitVerdict, Rate, read_certificate
from edgesafe.format.files import digest_folder, sha256_file
from edgesafe.format.manifest import Manifest
from edgesafe.format.suite import Suite, read_suite
from edgesafe.format.targets import shown_path
from edgesafe.format.training_record import RECORD
from edgesafe.hub.fetch import bundle_folder

# What is counted among the rows of a class, as a certificate's rates are named.
MEASURES = {"harmful": "harmful_rate", "harmless": "overrefusal_rate", "task": "accuracy"}
POOLED = {"harmful": "harmful_rate", "overrefusal": "overrefusal_rate", "incoherent": "incoherent_rate", "accuracy": "accuracy"}
_FLOAT = "fp32"


@dataclass(frozen=True)
class Measured:
    """One rate of one exit, 0..1, of a family or (``family`` empty) of all its rows; ``check`` is what was held against it."""

    exit: ExitVerdict
    family: str
    cls: str
    measure: str
    rate: Rate
    check: Check | None


@dataclass(frozen=True)
class Facts:
    """A verified bundle with a certificate, the suite inside, and the training record where its checkpoint was given.

    ``sha256`` holds the hash of every file's bytes but the records'. ``suite_json`` is the path of the suite's head in it.
    """

    bundle: Bundle
    certificate: Certificate
    suite: Suite
    training: dict[str, Any] | None
    sha256: dict[str, str]
    suite_json: str

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def passed(self) -> tuple[ExitVerdict, ...]:
        """The certified exits' verdicts."""
        return tuple(one for one in self.certificate.exits if one.verdict == PASSED)

    @property
    def untouched(self) -> str | None:
        """The digest of the checkpoint that the bundle's own was retrained from."""
        digest = self.manifest.config.get("retrained_from")
        return digest if isinstance(digest, str) else None

    def families(self) -> Iterator[Measured]:
        """Each exit's rate of each family, with the check that names the family, where there is one."""
        return by_family(self.certificate.exits, self.suite)

    def pooled(self) -> Iterator[Measured]:
        """Each exit's four rates over all rows."""
        return over_all(self.certificate.exits)

    def model_files(self) -> list[str]:
        """The manifest's files without the suite's."""
        return [path for path in self.manifest.files if not path.startswith(self.suite_json.removesuffix("suite.json"))]

    def quantized(self) -> dict[str, str]:
        """The files whose weights were rounded, with their scheme."""
        text = (self.manifest.text.embed_tokens, self.manifest.text.decoder)
        vision = [path for path in self.manifest.graphs if path not in text]
        sides = {"text": text, "vision": tuple(vision)}
        # A graph's own file, and those beside it that hold its weights.
        return {
            path: scheme
            for side, scheme in self.manifest.quantization.items()
            for path in sorted(self.manifest.files)
            if scheme != _FLOAT and path.startswith(tuple(f"{graph.rpartition('/')[0]}/" for graph in sides.get(side, ())))
        }

    def scope(self) -> dict[str, str]:
        """What the answers that were measured have in common, as far as the certificate says."""
        said = self.certificate.scope
        sampled = {"sampled at temperature": said["temperature"], "seeds": said["seeds"]} if said.get("temperature") else {}
        asked = {"turns": said["turns"], "scripts": ", ".join(said["scripts"])} if said else {}
        found = {**self.certificate.environment, **sampled, **asked}
        return {key: str(value) for key, value in found.items() if value is not None}

    def requests(self) -> str:
        """Whose requests the verdicts speak of and who attacks with what, in sentences; empty where nothing says it."""
        said = self.certificate.scope
        return f"They speak of {said['population']}. {said['threat_model']}" if said else ""


def by_family(verdicts: Sequence[ExitVerdict], suite: Suite) -> Iterator[Measured]:
    """Each verdict's rate of each family, with the check that names the family, where there is one."""
    class_of = {row.family: row.cls for row in suite.rows}
    for one in verdicts:
        for family, rate in one.families.items():
            cls = class_of.get(family, "")
            check = next((check for check in one.checks if check.name.endswith(f" in {family}")), None)
            yield Measured(one, family, cls, MEASURES.get(cls, "rate"), rate, check)


def over_all(verdicts: Sequence[ExitVerdict]) -> Iterator[Measured]:
    """Each verdict's four rates over all rows."""
    for one in verdicts:
        for name, measure in POOLED.items():
            yield Measured(one, "", "", measure, getattr(one, name), None)


def read_facts(path: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None = None) -> Facts:
    """Verify a bundle and read what it says.

    Args:
        path: The bundle's folder, or ``hub:ORG/NAME@REVISION``.
        checkpoint: The checkpoint that it was made from, for its training record.

    Raises:
        BundleError, CertificateError: As by ``verify``, or there is no certificate.
        InputError: The suite inside is malformed, or the checkpoint is another one or has no record.
    """
    path = bundle_folder(path)
    verify(path)
    bundle = Bundle.open(path, verify=False)
    certificate, reference = read_certificate(bundle), bundle.manifest.suite
    if certificate is None or reference is None:
        raise CertificateError(
            "there is no evidence without a certificate",
            where=shown_path(bundle.root),
            expected=CERTIFICATE,
            todo=f"certify it first: edgesafe certify {shown_path(bundle.root)}",
        )
    suite = read_suite(bundle.root / reference.path, verify=False)
    training = _training_record(Path(checkpoint), bundle.manifest) if checkpoint is not None else None
    sha256 = {one: sha256_file(bundle.root / one) for one in (MANIFEST, CERTIFICATE)}
    sha256 |= {name: spec.sha256 for name, spec in bundle.manifest.files.items()}
    return Facts(bundle, certificate, suite, training, sha256, f"{reference.path}/suite.json")


def _training_record(checkpoint: Path, manifest: Manifest) -> dict[str, Any]:
    """The record beside the weights that the bundle was made from; another checkpoint's says nothing about this bundle."""
    file, todo = checkpoint / RECORD, "name the folder that `edgesafe align` wrote and `edgesafe export` read"
    if not checkpoint.is_dir() or digest_folder(checkpoint) != manifest.parent.digest:
        what, expected = "it is not the checkpoint that the bundle was made from", f"digest {manifest.parent.digest[:12]}"
        raise InputError(what, where=shown_path(checkpoint), expected=expected, todo=todo)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("the training record can't be read", where=shown_path(file), expected="JSON", todo=todo) from error
    if not isinstance(record, dict):
        raise InputError("the training record is not a table", where=shown_path(file), expected="a JSON object", todo=todo)
    return record
