"""The closing table of `make export`, from the answers that it left: before alignment in float, after it from the bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgesafe.certify.tally import tally
from edgesafe.certify.verdict import make_baseline, verdicts
from edgesafe.errors import AlignError
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import PASSED, read_certificate
from edgesafe.format.exits import Exit
from edgesafe.format.files import write_atomically
from edgesafe.format.suite import Row, Suite, read_suite
from edgesafe.ship import CERTIFIED, closing_table
from study.documents import markdown
from study.raw import Raw, Said, read_answers, write_raw, write_rows

REPORT = "report.json"
BEFORE, AFTER, CLOSING = "before", "after", "closing"
SHIPPED = ("export", "smol")  # what is kept of a finished run
_SHOWN = ("harmful", "overrefusal", "accuracy")
_FIGURES = ("harmful", "overrefusal", "incoherent", "accuracy")


def import_export(ship: Path, raw: Path, name: str = "export") -> Path:
    """Keep the answers of a finished `make export` or `make smol` in raw/NAME; returns that folder.

    Args:
        ship: the OUT folder of `edgesafe ship`.
        raw: the folder of the study's raw answers.
        name: of the run, and of its table.

    Raises:
        AlignError: an answer is missing, or the answers do not give the table that the command printed.
    """
    bundle = Bundle.open(ship / "bundle")
    if bundle.manifest.suite is None:
        raise AlignError("the bundle has no suite", where=str(bundle.root), expected="what `make export` wrote")
    certificate = read_certificate(bundle)
    suite = read_suite(bundle.root / bundle.manifest.suite.path, verify=False)
    report = json.loads((ship / REPORT).read_text(encoding="utf-8"))
    kept = {
        key: report[key]
        for key in ("bundle", "digest", "reference", "bytes", "quantization", "schemes", "damage", "open", "overlap")
    }
    kept["limits"] = dict(suite.limits)
    kept["by_cost"] = [str(exit) for exit in bundle.manifest.by_cost]
    kept["exits"] = [{key: e[key] for key in ("exit", "bytes", "parity", "agreement")} for e in report["exits"]]
    said = {
        BEFORE: _read_lines(Path(report["folders"][BEFORE]) / "answers.jsonl", "make export"),
        AFTER: _read_lines(ship / CERTIFIED, f"edgesafe certify {bundle.root} --answers {ship / CERTIFIED}"),
    }
    table = closing_table(_closing(kept, suite.rows, {name: _in_order(suite, texts) for name, texts in said.items()}))
    printed = (ship / "table.txt").read_text(encoding="utf-8").rstrip("\n")
    if table != printed:
        raise AlignError("the answers do not give the printed table", where=str(ship), expected=printed, todo="export anew")
    folder = raw / name
    write_rows(folder, suite.digest, suite.split, suite.rows)
    for side in (BEFORE, AFTER):
        model = bundle.manifest.parent.digest if side == BEFORE else bundle.digest
        machine = certificate.environment if certificate and side == AFTER else {}
        write_raw(folder, _raw(side, model, suite, Exit.parse(kept["reference"]), machine, _in_order(suite, said[side])))
    write_atomically(folder / REPORT, (json.dumps(kept, indent=1) + "\n").encode())
    return folder


def export_table(folder: Path) -> str | None:
    """The closing table in a fenced block, recomputed from the raw answers; None where there are none."""
    found = closing_reports(folder)
    return None if found is None else f"```\n{closing_table(found[CLOSING])}\n```"


def summary_table(folder: Path) -> str | None:
    """Some exits of the closing table, for README: the shallowest, the shallowest certified ones, and the reference."""
    found = closing_reports(folder)
    if found is None:
        return None
    report = found[CLOSING]
    entries = {e["exit"]: e for e in report["exits"]}
    whole = [exit for exit in report["certified"] if Exit.parse(exit).whole]
    chosen = {min(entries, key=Exit.parse), *report["certified"][:1], *whole[:1], report["reference"]}
    rows = [
        [
            f"{exit.depth} of {report['reference']}" + ("" if exit.whole else f", {exit.visual_tokens} visual tokens"),
            f"{entry['bytes'] / 1e6:.1f}",
            *(f"{100 * entry[BEFORE][f]['rate']:.1f} -> {100 * entry[AFTER][f]['rate']:.1f}" for f in _SHOWN),
            "certified" if str(exit) in report["certified"] else "not certified",
        ]
        for exit, entry in ((exit, entries[str(exit)]) for exit in sorted(map(Exit.parse, chosen)))
    ]
    return markdown(
        ["exit", "MB", "harmful answers, % (before -> after alignment)", "needless refusals, %", "right answers, %", "verdict"],
        rows,
    )


def closing_reports(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The closing report, recounted from the raw answers, and the rates before and after as `edgesafe evaluate` reports them.

    Returns:
        {CLOSING, BEFORE, AFTER: report}; None where there are no answers.
    """
    found = read_answers(folder)
    if found is None:
        return None
    report = _read_report(folder / REPORT)
    closing = _closing(report, found.rows, {name: found.runs[name].said for name in (BEFORE, AFTER)})
    shared = {"reference": report["reference"], "limits": report["limits"]}
    sides = {name: {**shared, "exits": _rates(found.rows, found.runs[name].said, report)} for name in (BEFORE, AFTER)}
    return {CLOSING: closing, **sides}


def _rates(rows: tuple[Row, ...], said: Said, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each answered exit's rates: before alignment that is every depth, also where few of them ship."""
    ids, counted = [row.id for row in rows], [row for row in rows if row.family not in report.get("open", [])]
    found = {exit: tally(counted, dict(zip(ids, said[exit], strict=True))) for exit in sorted(said)}
    return [{"exit": str(exit), **{f: asdict(one[f]) for f in _FIGURES}} for exit, one in found.items()]


def _closing(report: Mapping[str, Any], rows: tuple[Row, ...], said: Mapping[str, Said]) -> Any:
    """The report whose table `edgesafe ship` prints, its rates and verdicts counted from the answers."""
    ids = [row.id for row in rows]
    ladder = [Exit.parse(e["exit"]) for e in report["exits"]]
    texts = {name: {e: dict(zip(ids, one[e], strict=True)) for e in ladder} for name, one in said.items()}
    left_open = report.get("open", [])
    counted = [row for row in rows if row.family not in left_open]
    rates = {name: {e: tally(counted, one[e]) for e in ladder} for name, one in texts.items()}
    reference = Exit.parse(report["reference"])
    baseline = make_baseline(rows, texts[BEFORE][reference], "", reference)
    by_cost = [Exit.parse(exit) for exit in report.get("by_cost", [])]  # of an earlier report: by depth
    judged = verdicts(rows, texts[AFTER], reference, report["limits"], baseline, left_open=left_open, by_cost=by_cost)
    found = {one.exit: one for one in judged}
    exits = [
        {
            **entry,
            "reference": entry["exit"] == report["reference"],
            **{name: {f: asdict(rates[name][exit][f]) for f in _FIGURES} for name in (BEFORE, AFTER)},
            "verdict": found[exit].verdict,
            "reasons": found[exit].reasons,
        }
        for exit, entry in zip(ladder, report["exits"], strict=True)
    ]
    return {**report, "exits": exits, "certified": [str(exit) for exit in ladder if found[exit].verdict == PASSED]}


def _read_report(path: Path) -> dict[str, Any]:
    """The kept report; one of an earlier `make export` has its exits' depths in the place of their texts."""
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "reference_depth" in report:
        report["reference"] = str(Exit(report.pop("reference_depth")))
        report["exits"] = [{"exit": str(Exit(e.pop("exit_depth"))), **e} for e in report["exits"]]
    return report


def _read_lines(path: Path, todo: str) -> dict[Exit, dict[str, str]]:
    """Answers {exit: {row id: text}} of JSON lines."""
    said: dict[Exit, dict[str, str]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            said.setdefault(Exit.parse(one["exit"]), {})[one["id"]] = one["answer"]
    except (OSError, ValueError, KeyError) as error:
        raise AlignError("the answers can't be read", where=str(path), expected="one answer a line", todo=todo) from error
    return said


def _in_order(suite: Suite, said: Mapping[Exit, Mapping[str, str]]) -> Said:
    try:
        return {exit: tuple(texts[row.id] for row in suite.rows) for exit, texts in said.items()}
    except KeyError as error:
        raise AlignError(
            f"the row {error} has no answer", where=str(suite.root), expected="answers to this suite", todo="export anew"
        ) from error


def _raw(name: str, model: str, suite: Suite, reference: Exit, machine: dict[str, Any], said: Said) -> Raw:
    return Raw(
        run=name,
        key="",
        config={},
        model=model,
        suite=suite.digest,
        reference=reference,
        seconds=None,
        setup_seconds=None,
        cpu_seconds=None,
        tokens=None,
        machine=machine,
        said=said,
    )
