"""Keys and records for bundles that tests sign."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edgesafe.format.bundle import Bundle
from edgesafe.format.latency import LatencyTable, stage_times, write_latency

PASSWORD = "pässword"


def write_key(folder: Path, name: str, key=None, password: str | None = None) -> Path:
    """NAME.pem and NAME.pub; the path without an ending."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    hidden = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pem").write_bytes(private)
    (folder / f"{name}.pub").write_bytes(public)
    return folder / name


def add_record(bundle: Bundle) -> None:
    """A latency table of that bundle with made-up times."""
    times = stage_times([1.0, 2.0])
    segments = dict.fromkeys(bundle.manifest.exits[-1].graphs, times)
    picture = {"pixels": 100, "encoded": False, **times}
    text = {"preprocess": [picture], "prefill": [{"tokens": 8, **times}], "decode": [{"context": 8, **times}]}
    exits = [{"exit": str(e), "ttft_ms": {"p50_ms": 1.0, "p95_ms": 2.0}} for e in bundle.manifest.ladder]
    write_latency(bundle, LatencyTable(bundle.digest, "paper", "onnxruntime", "1.0", 1, segments, text, exits, None))
