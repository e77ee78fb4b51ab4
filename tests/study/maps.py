"""The tables of exit maps, from raw answers: what maps do alone, with few or other pictures, and before retraining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from edgesafe.format.exits import Exit
from study.documents import markdown
from study.judged import Study, judge
from study.plan import FEW, MAPPED, MAPPED_NOISE, RAW_STATES, SEEDS, few_run, retrained_run
from study.raw import read_answers

_FIGURES = ("harmful", "overrefusal", "accuracy")
_RETRAINED = {mapped: [retrained_run(seed, mapped=mapped) for seed in SEEDS] for mapped in (False, True)}


def maps_tables(folder: Path) -> dict[str, str]:
    """The tables by their markers' names; a run that is not there is a dash."""
    found = read_answers(folder)
    if not found or not found.runs:
        return dict.fromkeys(("maps", "map-pictures"), "Not run yet.")
    study = judge(found)
    ways = {
        "raw": [RAW_STATES],
        "mapped": [MAPPED],
        "retrained": _RETRAINED[False],
        "mapped, then retrained": _RETRAINED[True],
    }
    pictures = {"none": [RAW_STATES], **{count: [few_run(count)] for count in FEW[:2]}, "600": [MAPPED]}
    pictures |= {FEW[2]: [few_run(FEW[2])], "600 of noise": [MAPPED_NOISE]}
    return {"maps": _table(study, ways), "map-pictures": _table(study, pictures)}


def maps_reports(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The rates of raw and of mapped exits as `edgesafe evaluate` reports them; None where either was not run."""
    found = read_answers(folder)
    if not found or not {RAW_STATES, MAPPED} <= found.runs.keys():
        return None
    study = judge(found)
    raw, mapped = (_report(study, name) for name in (RAW_STATES, MAPPED))
    return raw, mapped


def _report(study: Study, name: str) -> dict[str, Any]:
    exits = [
        {"exit": str(exit), **{key: asdict(rate) for key, rate in rates.items()}}
        for exit, rates in study.rates[name].items()
        if exit
    ]
    return {"reference": str(study.reference), "exits": exits}


def _table(study: Study, ways: dict[str, list[str]]) -> str:
    """A row an exit, a column a way: harm / over-refusal / accuracy in per cent, the mean of the seeds that are there."""
    exits = sorted({exit for rates in study.rates.values() for exit in rates if exit})
    there = {title: [name for name in names if study.has(name)] for title, names in ways.items()}
    rows = [
        [f"{exit}{'*' if exit == study.reference else ''}", *(_cell(study, names, exit) for names in there.values())]
        for exit in exits
    ]
    missing = [name for names in ways.values() for name in names if not study.has(name)]
    headers = ["exit", *(f"{title} ({len(names)} seeds)" if len(names) > 1 else title for title, names in there.items())]
    return markdown(headers, rows) + (f"\n\nNot run yet: {', '.join(missing)}." if missing else "")


def _cell(study: Study, names: Sequence[str], exit: Exit) -> str:
    if not names:
        return "-"
    means = [100 * fmean(study.rates[name][exit][figure].rate for name in names) for figure in _FIGURES]
    return " / ".join(f"{one:.1f}" for one in means)
