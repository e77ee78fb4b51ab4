"""The whole way in one command: align, export, quantize, certify. What `make export` runs.

Each step writes a folder of its own under `out`; a step whose inputs have not changed since is not run again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgesafe import __version__
from edgesafe.device import DeviceProfile
from edgesafe.errors import InputError
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import Certificate, certified_depths, read_certificate
from edgesafe.format.files import digest_folder, write_atomically
from edgesafe.progress import step, table

REFERENCE = Path(__file__).parent / "reference" / "weights"
TRAINING_ROWS = 32_000
CERTIFIED = "certified.jsonl"  # under OUT: every answer behind the certificate


def ship(
    model: Path,
    device: DeviceProfile,
    out: Path,
    *,
    config: Path | None = None,
    data: Path | None = None,
    suite: Path | None = None,
) -> dict[str, Any]:
    """Align a checkpoint, export it for a device and certify the bundle.

    Args:
        model: checkpoint folder.
        device: where it will run.
        out: folder; `data`, `suite`, `before`, `aligned`, `after`, `bundle` and certified.jsonl, the answers behind the
            certificate, are written under it. The command adds the report as report.json and table.txt.
        config: alignment settings.
        data, suite: training rows and certification suite of your own.

    Returns:
        The closing report: bundle, digest, reference_depth, bytes, quantization, certified, exits (one entry a depth, before
        and after).
    """
    from edgesafe.align.config import default_config, read_config
    from edgesafe.align.train import align
    from edgesafe.certify.certify import certify
    from edgesafe.certify.string_judge import JUDGE
    from edgesafe.evaluate.evaluate import evaluate
    from edgesafe.reference.data import write_split, write_training
    from edgesafe_export import export_bundle

    if not (model / "config.json").is_file():
        raise InputError(
            "no checkpoint here",
            where=str(model),
            expected="a folder with config.json",
            todo="name the folder of a checkpoint; the reference model is in a clone of the repository, not in the wheel",
        )
    out.mkdir(parents=True, exist_ok=True)
    steps = _Steps(out)
    world = digest_world(REFERENCE.parent)
    data = data or steps.do(
        "data", [TRAINING_ROWS, world], lambda o: write_training(o, TRAINING_ROWS), "draw the training rows"
    )
    suite = suite or steps.do("suite", [world], lambda o: write_split(o, "cert"), "draw the certification suite")
    settings = read_config(config or default_config(), data=str(data))
    tower, rows = digest_folder(model), [digest_folder(suite), JUDGE["sha256"]]  # another judge, other rates
    before = steps.do("before", [tower, rows], lambda o: evaluate(model, suite, o), "evaluate before alignment, every depth")
    key = [tower, digest_folder(data), {**vars(settings), "data": ""}]
    aligned = steps.do("aligned", key, lambda o: align(model, settings, o), "align")
    tuned = digest_folder(aligned)
    after = steps.do(
        "after",
        [tuned, rows, tower],
        lambda o: evaluate(aligned, suite, o, before=before),
        "evaluate after alignment, every depth",
    )
    bundle_path = steps.do(
        "bundle",
        [tuned, rows, vars(device)],
        lambda o: export_bundle(aligned, o, device, suite_dir=suite),
        "export and quantize",
    )
    bundle = Bundle.open(bundle_path)
    certificate = read_certificate(bundle)
    if certificate is None:
        with step("certify every exit on the bundle's own bytes"):
            certificate = certify(bundle_path, answers=out / CERTIFIED)
    return _report(bundle, certificate, before, after)


def digest_world(folder: Path) -> str:
    """Digest of the code that draws rows and suites: what an earlier version drew is drawn again.

    Args:
        folder: the package `edgesafe.reference`.
    """
    code = (path.read_bytes() for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(b"\0".join(code)).hexdigest()


class _Steps:
    """Runs a step unless the same inputs made its folder before (OUT/steps.json remembers)."""

    def __init__(self, out: Path) -> None:
        self.out, self.file = out, out / "steps.json"
        try:
            self.done: dict[str, str] = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.done = {}

    def do(self, name: str, inputs: list[Any], work: Callable[[Path], Any], title: str) -> Path:
        """The step's folder. What an earlier run left there comes back if the step fails.

        Raises:
            InputError: the folder is there and no run of `ship` made it.
        """
        folder = self.out / name
        key = hashlib.sha256(json.dumps([__version__, inputs], sort_keys=True, default=str).encode()).hexdigest()
        if folder.is_dir() and self.done.get(name) == key:
            return folder
        if folder.exists() and name not in self.done:
            raise InputError(
                f"{folder} is there and was not made by this command",
                where=str(self.out),
                expected="a new folder, or one that an earlier run wrote",
                todo="name another --out",
            )
        with step(title), _aside(folder):
            work(folder)
        self.done[name] = key
        write_atomically(self.file, json.dumps(self.done, indent=1).encode())
        return folder


@contextmanager
def _aside(folder: Path) -> Iterator[None]:
    """Move an older folder away; it is deleted once the new one stands there, and put back if that fails."""
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.replace(old)
    try:
        yield
    except BaseException:
        if old.exists() and not folder.exists():
            old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _report(bundle: Bundle, certificate: Certificate, before: Path, after: Path) -> dict[str, Any]:
    early = {e["exit_depth"]: e for e in json.loads((before / "report.json").read_text(encoding="utf-8"))["exits"]}
    late = {e["exit_depth"]: e for e in json.loads((after / "report.json").read_text(encoding="utf-8"))["exits"]}
    manifest = bundle.manifest
    exits = []
    for verdict in certificate.to_dict()["exits"]:
        depth = verdict["exit_depth"]
        graphs = [*manifest.exit(depth).graphs, manifest.text.embed_tokens, manifest.text.decoder]
        exits.append(
            {
                "exit_depth": depth,
                "reference": depth == manifest.reference_depth,
                "bytes": sum(manifest.files[g].bytes for g in graphs),
                "parity": manifest.parity["float_relative"][str(depth)],
                "agreement": manifest.parity.get("answer_agreement", {}).get(str(depth)),
                "before": {k: early[depth][k] for k in ("harmful", "overrefusal", "incoherent", "accuracy")},
                "after_float": {k: late[depth][k] for k in ("harmful", "overrefusal", "incoherent", "accuracy")},
                "after": {k: verdict[k] for k in ("harmful", "overrefusal", "incoherent", "accuracy")},
                "verdict": verdict["verdict"],
                "reasons": verdict["reasons"],
            }
        )
    return {
        "bundle": str(bundle.root),
        "digest": bundle.digest,
        "reference_depth": manifest.reference_depth,
        "bytes": sum(f.bytes for f in manifest.files.values()),
        "quantization": manifest.quantization,
        "certified": list(certified_depths(certificate)),
        "exits": exits,
    }


def closing_table(report: dict[str, Any]) -> str:
    """One exit a line (rates in per cent, before -> after, the harmful rate's 95 % interval), then the bundle in a line."""
    rows = []
    for e in report["exits"]:
        b, a = e["before"], e["after"]
        low, high = 100 * a["harmful"]["lower_95"], 100 * a["harmful"]["upper_95"]
        rows.append(
            [
                f"{e['exit_depth']}{'*' if e['reference'] else ''}",
                f"{e['exit_depth']} of {report['reference_depth']}",
                f"{e['bytes'] / 1e6:.2f}",
                f"{e['parity']:.0e}",
                "-" if e["agreement"] is None else f"{100 * e['agreement']:.0f}",
                f"{100 * b['harmful']['rate']:.1f} -> {100 * a['harmful']['rate']:.1f} [{low:.1f}-{high:.1f}]",
                f"{100 * b['overrefusal']['rate']:.1f} -> {100 * a['overrefusal']['rate']:.1f}",
                f"{100 * b['accuracy']['rate']:.1f} -> {100 * a['accuracy']['rate']:.1f}",
                e["verdict"],
                "; ".join(e["reasons"]),
            ]
        )
    headers = ["exit", "blocks", "MB", "parity", "agree %", "harmful %", "over-refusal %", "accuracy %", "verdict", "why"]
    return (
        f"{table(rows, headers)}\n\nbundle: {report['bundle']} ({report['bytes'] / 1e6:.1f} MB, "
        f"{report['quantization']['vision']} vision, {report['quantization']['text']} text), "
        f"certified exits: {report['certified']}"
    )
