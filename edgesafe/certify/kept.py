"""Answers of an earlier certification, found by everything that makes them: two devices' bundles often hold the same graphs.

A file under the folder is named by a digest of the bundle's bytes but for its device, the suite, the engine and the machine. It
is used only where that digest is the same; whatever is in doubt is asked again. So are a few rows that nobody can foresee,
as a forged file's digest may be right.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgesafe.certify.flips import digest_of_all
from edgesafe.format.exits import Exit
from edgesafe.format.files import write_atomically
from edgesafe.format.manifest import Manifest
from edgesafe.format.suite import Row

# What a manifest says of when and for which device it was exported. Everything else may have a say in an answer, and counts.
_APART = ("device", "created", "digest")

_SHARE, _LEAST = 0.05, 20  # of a suite's rows, asked again whenever kept answers are taken


def drawn(rows: Sequence[Row]) -> list[Row]:
    """A twentieth of the rows, other ones each time, in the suite's order; of a small suite 20 or all.

    A forger who changed 60 of 2,500 rows is found in 95 of 100 draws, one who changed a single row in 5.
    """
    count = min(len(rows), max(_LEAST, round(_SHARE * len(rows))))
    # Not seeded: answers are the same whichever rows are drawn, and a draw that can be foreseen checks nothing.
    return [rows[i] for i in sorted(random.SystemRandom().sample(range(len(rows)), count))]


def kept_path(folder: Path, manifest: Manifest, environment: Mapping[str, Any]) -> Path:
    """Where the answers of a bundle to its suite are kept.

    Args:
        folder: of all kept answers.
        manifest: of the bundle; it lists the digest of every file, the suite's among them.
        environment: as the certificate has it: engine, kernels, processor, threads and decoding.
    """
    plain = {key: value for key, value in manifest.to_dict().items() if key not in _APART}
    profile = dict(plain["config"]).pop("device_profile", {})
    plain["config"] = plain["config"] | {"device_profile": {"provider": profile.get("provider")}}
    made_of = json.dumps([plain, dict(environment)], sort_keys=True)
    return folder / f"answers-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.json"


def keep(path: Path, answered: Mapping[Exit, Mapping[str, str]]) -> None:
    """Write all answers {exit: {row id: text}}, with their digest."""
    texts = {str(exit): dict(one) for exit, one in answered.items()}
    write_atomically(path, json.dumps({"digest": digest_of_all(answered), "answers": texts}).encode())


def read_kept(path: Path, rows: Sequence[Row], exits: Sequence[Exit]) -> dict[Exit, dict[str, str]] | None:
    """Answers {exit: {row id: text}} to every row at every exit; None where one is missing or was changed."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        answered = {exit: {row.id: str(stored["answers"][str(exit)][row.id]) for row in rows} for exit in exits}
        return answered if digest_of_all(answered) == stored["digest"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
