"""The whole way in one command: align, export, quantize, certify. What `make export` runs.

Each step writes a folder of its own; a step whose inputs have not changed is not run again. What does not depend on the device
lies in a work folder that the runs for all devices share.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesafe import __version__
from edgesafe.certify.overlap import overlap, say_overlap
from edgesafe.device import DeviceProfile
from edgesafe.errors import InputError
from edgesafe.format.bundle import Bundle, is_bundle
from edgesafe.format.certificate import Certificate, certified_exits, read_certificate
from edgesafe.format.exits import MOST_RUNGS, Exit, parse_exits
from edgesafe.format.files import digest_folder, write_atomically
from edgesafe.format.suite import read_suite
from edgesafe.format.targets import check_target, check_writable, lies_in
from edgesafe.progress import step, table
from edgesafe.requests.suite import check
from edgesafe.steps import Shared, make_step, settings_for, shared_steps

if TYPE_CHECKING:
    from edgesafe.align.settings import AlignConfig
    from edgesafe_export.plan import Plan

KEPT = "answers"  # under the work folder: answers behind certificates, for the next device whose bundle has the same graphs
# Under OUT: every answer behind the certificate, the closing report and table, and what made the bundle.
CERTIFIED, REPORT, TABLE, _DONE = "certified.jsonl", "report.json", "table.txt", "steps.json"


def ship(
    model: Path,
    device: DeviceProfile,
    out: Path,
    *,
    config: Path | None = None,
    data: Path | None = None,
    suite: Path | None = None,
    work: Path | None = None,
    retrain: bool = False,
    accept_damage: bool = False,
    exits: str | None = None,
) -> dict[str, Any]:
    """Align a checkpoint, export it for a device and certify the bundle.

    Args:
        model: checkpoint folder.
        device: where it will run.
        out: folder; `bundle` and certified.jsonl, the answers behind the certificate, are written under it. The command adds
            the report as report.json and table.txt.
        config: alignment settings; by default the reference model's own, or l-sft's.
        data: training rows of your own.
        suite: certification suite of your own.
        work: folder of the steps that don't depend on the device (`shared_steps`); default: `shared` beside `out`. Any number
            of runs may share it.
        retrain: evaluate and align the reference model here, though the clone carries the results.
        accept_damage: as `edgesafe_export.export_bundle` takes it.
        exits: what is evaluated before and exported, as `edgesafe.format.exits.parse_exits` reads them; by default what
            `shipped_exits` says, or, if these are the trained ones and `[eval]` names a validation suite, those of them that
            no faster one equals in accuracy there.

    Returns:
        The closing report: bundle, digest, reference, bytes, quantization, schemes (why each text scheme was taken or not),
        damage (what was accepted), open (families), overlap (of the suite with the training rows), certified, exits (one entry
        per exit, before and after), carried (the steps whose results came with the clone), folders (of the shared steps).

    Raises:
        InputError: no checkpoint, or a folder that can't be written; found before any work.
        ConfigError: settings, exits or schemes that can't be used, or OUT/bundle is not a bundle.
        CertificateError: a suite of your own with which nothing could be certified.
    """
    from edgesafe.align.config import LADDER, OPTION, read_config, shipped_exits

    work = work or default_work(out)
    check_before(model, device, out, work, accept_damage=accept_damage)
    if suite is not None:
        check(read_suite(suite))
    config = config or settings_for(model)
    settings = read_config(config)
    where, named = (OPTION, exits) if exits else (LADDER, settings.ladder)
    exits, choose_by = named or shipped_exits(settings), "" if named else settings.eval.suite
    ladder, plan = _ladder(model, device, exits, settings, choose_by, where) if exits else ((), None)
    shared = shared_steps(model, work, config=config, data=data, suite=suite, retrain=retrain, exits=exits)
    exits = _front(plan, shared.aligned, Path(choose_by), work) if plan else exits
    _check_aligned(shared.aligned, ladder, where)
    bundle = _bundle(out, shared.aligned, device, shared.suite, accept_damage, exits)
    certificate = _certificate(bundle, out, work, shared.before)
    folders = {name: str(folder) for name, folder in vars(shared).items() if isinstance(folder, Path)}
    return {**_report(bundle, certificate, shared), "folders": folders}


def _ladder(
    model: Path, device: DeviceProfile, exits: str, settings: AlignConfig, suite: str, where: str
) -> tuple[tuple[Exit, ...], Plan | None]:
    """The exits that a text names, and where `_front` will choose among them by a validation suite, their times.

    Raises:
        ConfigError: They can't be exported, or one is not trained.
        InputError: The device's profile predicts no times, or the suite can't tell their accuracy.
    """
    from edgesafe.align.config import check_trained
    from edgesafe.checkpoint.hub import resolve_outline
    from edgesafe_export.front import check_chooses, front
    from edgesafe_export.plan import choose_ladder, make_plan
    from edgesafe_export.skeleton import open_sketch

    folder, name, header = resolve_outline(str(model))
    sketch = open_sketch(folder, header)
    ladder = choose_ladder(sketch, exits, None if suite else MOST_RUNGS)
    check_trained(ladder, parse_exits(settings.exits, sketch.family.geometry.n_blocks, None), where)
    if not suite:
        return ladder, None
    asked = read_suite(Path(suite))
    check_chooses(asked.split, any(row.cls == "task" for row in asked.rows), suite)
    schemes = {"vision": device.vision_scheme, "text": device.text_scheme}
    plan = make_plan(sketch, folder, name, device, ladder, "chain", schemes)
    front(plan, {one.exit: 0.0 for one in plan.exits})
    return ladder, plan


def _front(plan: Plan, aligned: Path, suite: Path, work: Path) -> str:
    """Those of a plan's exits that no faster one equals in accuracy on a validation suite."""
    from edgesafe.certify.string_judge import JUDGE
    from edgesafe.evaluate.evaluate import evaluate
    from edgesafe_export.front import front, read_accuracy

    exits = ",".join(str(one.exit) for one in plan.exits)
    inputs = [digest_folder(aligned), digest_folder(suite), JUDGE["sha256"], exits]
    title = "evaluate the aligned model on the validation suite, to choose exits"
    done = make_step(work, "validation", inputs, lambda o: evaluate(aligned, suite, o, exits=exits), title)
    return ",".join(map(str, front(plan, read_accuracy(done))))


def _check_aligned(aligned: Path, ladder: tuple[Exit, ...], where: str) -> None:
    """As `check_trained`, of the alignment that is there: it may be an earlier one, of other settings."""
    from edgesafe.align.config import check_trained
    from edgesafe.format.training_record import RECORD

    if any(exit.visual_tokens for exit in ladder):
        record = json.loads((aligned / RECORD).read_text(encoding="utf-8"))
        check_trained(ladder, [Exit.parse(text) for text in record["exits"]], where)


def default_work(out: Path) -> Path:
    """The folder of the steps that all devices share, where none is named: beside OUT."""
    return Path(os.path.realpath(out)).parent / "shared"


def check_before(model: Path, device: DeviceProfile, out: Path, work: Path, *, accept_damage: bool) -> None:
    """Refuse before any work what would fail after hours of it, a missing extra first."""
    from edgesafe_export.quantize import check_schemes

    for module in ("edgesafe.align.train", "edgesafe_export.export"):
        importlib.import_module(module)
    if not (model / "config.json").is_file():
        raise InputError(
            "no checkpoint here",
            where=str(model),
            expected="a folder with config.json",
            todo="name the folder of a checkpoint; the reference model is in a clone of the repository, not in the wheel",
        )
    check_target(out / "bundle", "bundle", is_bundle, model=model)
    if lies_in(work, model):
        todo = "name another --work"
        raise InputError("the work folder lies in the model", where=str(work), expected=f"one apart from {model}", todo=todo)
    out.mkdir(parents=True, exist_ok=True)
    for name in (CERTIFIED, REPORT, TABLE, _DONE):
        check_writable(out / name)
    check_schemes(device.vision_scheme, device.text_scheme, accept_damage=accept_damage)


def _bundle(out: Path, aligned: Path, device: DeviceProfile, suite: Path, accept_damage: bool, exits: str | None) -> Bundle:
    """OUT/bundle, exported unless the same inputs made it before (OUT/steps.json remembers).

    Raises:
        InputError: there is one that no run of `ship` made.
    """
    from edgesafe_export import export_bundle

    folder = out / "bundle"
    inputs = [
        __version__,
        digest_folder(aligned),
        digest_folder(suite),
        asdict(device),
        accept_damage,
        *([exits] if exits else []),
    ]
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    try:
        done = json.loads((out / _DONE).read_text(encoding="utf-8"))["bundle"]
    except (OSError, ValueError, KeyError, TypeError):
        done = ""
    if folder.is_dir() and any(folder.iterdir()):
        if done == key:
            return Bundle.open(folder)
        if not done:
            raise InputError(
                f"{folder} exists and was not made by this command",
                where=str(out),
                expected="a new folder, or one that an earlier run wrote",
                todo="name another --out",
            )
    write_atomically(out / _DONE, json.dumps({"bundle": "begun"}, indent=1).encode())
    with step("export and quantize"):
        bundle: Bundle = export_bundle(aligned, folder, device, exits=exits, suite_dir=suite, accept_damage=accept_damage)
    write_atomically(out / _DONE, json.dumps({"bundle": key}, indent=1).encode())
    return bundle


def _certificate(bundle: Bundle, out: Path, work: Path, before: Path) -> Certificate:
    """The bundle's certificate, made here unless it has one that counts where these kernels run."""
    from edgesafe.certify.certify import certify
    from edgesafe.runtime.kernels import kernels_here, kernels_of
    from edgesafe.runtime.ort import OnnxRuntime

    certificate = read_certificate(bundle)
    if certificate is None or kernels_of(certificate) != kernels_here(OnnxRuntime()):
        (kept := work / KEPT).mkdir(exist_ok=True)
        with step("certify every exit on the bundle's own bytes"):
            certificate = certify(bundle.root, answers=out / CERTIFIED, baseline=before, kept=kept)
    return certificate


def _report(bundle: Bundle, certificate: Certificate, shared: Shared) -> dict[str, Any]:
    early = {e["exit"]: e for e in json.loads((shared.before / "report.json").read_text(encoding="utf-8"))["exits"]}
    manifest = bundle.manifest
    exits = []
    for verdict in certificate.to_dict()["exits"]:
        exit = verdict["exit"]
        graphs = {*manifest.exit(Exit.parse(exit)).graphs, manifest.text.embed_tokens, manifest.text.decoder}
        files = graphs | {f"{graph.rpartition('/')[0]}/weights.bin" for graph in graphs}  # what several graphs keep once
        exits.append(
            {
                "exit": exit,
                "reference": exit == str(manifest.reference),
                "bytes": sum(manifest.files[name].bytes for name in files & manifest.files.keys()),
                "parity": manifest.parity["float_relative"][exit],
                "agreement": manifest.parity.get("answer_figures", {}).get(exit, {}).get("equal"),
                "before": {k: early[exit][k] for k in ("harmful", "overrefusal", "incoherent", "accuracy")},
                "after": {k: verdict[k] for k in ("harmful", "overrefusal", "incoherent", "accuracy")},
                "verdict": verdict["verdict"],
                "reasons": verdict["reasons"],
            }
        )
    return {
        "bundle": str(bundle.root),
        "digest": bundle.digest,
        "reference": str(manifest.reference),
        "bytes": sum(f.bytes for f in manifest.files.values()),
        "quantization": manifest.quantization,
        "schemes": manifest.parity.get("schemes_why", {}),
        "damage": manifest.parity.get("damage", ""),
        "open": list(certificate.left_open),
        "carried": list(shared.carried),
        "overlap": overlap(*(read_suite(folder, verify=False) for folder in (shared.suite, shared.data))),
        "certified": [str(exit) for exit in certified_exits(certificate)],
        "exits": exits,
    }


def closing_table(report: dict[str, Any]) -> str:
    """One exit a line (rates in per cent, before -> after, the harmful rate's 95 % interval), then the bundle and its suite."""
    rows = []
    for e in report["exits"]:
        b, a = e["before"], e["after"]
        low, high = 100 * a["harmful"]["lower_95"], 100 * a["harmful"]["upper_95"]
        rows.append(
            [
                f"{e['exit']}{'*' if e['reference'] else ''}",
                f"{Exit.parse(e['exit']).depth} of {Exit.parse(report['reference']).depth}",
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
        f"certified exits: [{', '.join(report['certified'])}]\n{_say_schemes(report)}{say_overlap(report['overlap'])}"
    )


def _say_schemes(report: dict[str, Any]) -> str:
    """One line per text scheme that was tried, and the damage that was accepted; an earlier edgesafe's report has neither."""
    lines = [f"text {scheme}: {why}" for scheme, why in report.get("schemes", {}).items()]
    lines += [f"damage accepted: {report['damage']}"] if report.get("damage") else []
    return "".join(f"{line}\n" for line in lines)
