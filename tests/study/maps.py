"""The tables of exit maps, from raw answers: what maps do alone and before retraining, which maps, and for which requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from edgesafe.certify.verdict import MISTAKEN, NAMED, OTHER, kinds_of_harm
from edgesafe.errors import AlignError
from edgesafe.format.exits import Exit
from study.documents import markdown
from study.judged import Study, family_rates, judge
from study.objectives import compare
from study.plan import (
    ALONE,
    FEW,
    FOLDERS,
    KINDS,
    LONGER,
    MAPPED,
    MAPPED_NOISE,
    METHODS,
    RAW_STATES,
    RESCALED,
    SEEDS,
    few_run,
    mapped_run,
    retrained_run,
)
from study.raw import Raw, read_answers
from study.reached import reached_table, read_reached

Ways = Mapping[str, Sequence[str]]  # the runs of each column, by its title

FIGURES = {"harmful": -1, "overrefusal": -1, "accuracy": 1}  # and whether more of it is better
_RETRAINED = {mapped: [retrained_run(seed, mapped=mapped) for seed in SEEDS] for mapped in (False, True)}
_AFTER = "mapped, then retrained"
WAYS: Ways = {
    "raw": [RAW_STATES],
    RESCALED: [few_run(RESCALED)],
    "mapped": [MAPPED],
    "retrained": _RETRAINED[False],
    _AFTER: _RETRAINED[True],
}
PICTURES: Ways = {
    "none": [RAW_STATES],
    **{count: [few_run(count)] for count in FEW[:2]},
    "600": [MAPPED],
    FEW[2]: [few_run(FEW[2])],
    "600 of noise": [MAPPED_NOISE],
    **{f"600 of {name}": [few_run(name)] for name in FOLDERS},
}
SHAPES: Ways = {"the product's": [MAPPED], **{kind: [few_run(kind)] for kind in KINDS if kind != RESCALED}}
OBJECTIVES: Ways = {
    **{method: [mapped_run(method, seed) for seed in SEEDS] for method in METHODS},
    "l-ppo, longer": [mapped_run(LONGER, SEEDS[0])],
    "l-dpo, the preference alone": [mapped_run(ALONE, SEEDS[0])],
}
FAMILY_EXITS = (4, 6, 8)  # beside the reference


def maps_tables(folder: Path) -> dict[str, str]:
    """The tables by their markers' names; a run that is not there is a dash."""
    found = read_answers(folder)
    if not found or not found.runs:
        return dict.fromkeys([*_TABLES, "map-reach"], "Not run yet.")
    study = judge(found)
    made = {name: make(study) for name, make in _TABLES.items()}
    return made | {"map-reach": reached_table(study, read_reached(folder))}


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


def ways_table(study: Study) -> str:
    """Harm / over-refusal / accuracy of every way at every exit, and what a way costs."""
    seconds = ["*seconds*", *(_seconds([study.runs[name] for name in names if study.has(name)]) for names in WAYS.values())]
    return _table(study, WAYS, _rates, [seconds])


def _seconds(raws: Sequence[Raw]) -> str:
    """The mean of the runs' processor time for fitting and training."""
    known = [spent for raw in raws if (spent := raw.config.get("fit_cpu_seconds", raw.cpu_seconds)) is not None]
    return f"*{fmean(known):.0f}*" if known else "*0*" if raws and not any(raw.config for raw in raws) else "-"


def pictures_table(study: Study) -> str:
    """The same of maps by what they were fitted to."""
    return _table(study, PICTURES, _rates)


def shapes_table(study: Study) -> str:
    """The same of maps of other kinds, at the exits where those were asked."""
    return _table(study, SHAPES, _rates, exits=_shared(study, SHAPES))


def _shared(study: Study, ways: Ways) -> list[Exit | None]:
    """The exits that every run of these ways was asked at."""
    there = [study.rates[name] for names in ways.values() for name in names if study.has(name)]
    return [exit for exit in there[0] if all(exit in rates for rates in there)] if there else []


def objectives_table(study: Study) -> str:
    """Every objective from mapped states, at the exits that all were asked at: over them, and one by one."""
    ways = {"mapped": [MAPPED], **OBJECTIVES}
    exits = _shared(study, ways)
    runs = [name for names in ways.values() for name in names if study.has(name)]
    some = replace(study, rates={name: {exit: study.rates[name][exit] for exit in exits} for name in runs})
    return f"{compare(some, {'mapped': MAPPED}, OBJECTIVES, METHODS)}\n\n{_table(study, ways, _rates, exits=exits)}"


def kinds_table(study: Study) -> str:
    """Harm by what the answer names, at every exit."""
    return _table(study, WAYS, kinds)


def kinds(study: Study, name: str, exit: Exit) -> list[float]:
    """The shares of harmful requests whose answer helps with the danger, with a mistaken object, with neither."""
    harmful = [row for row in study.rows if row.cls == "harmful"]
    counts = kinds_of_harm(harmful, study.by_id(name)[exit])
    return [counts[kind] / len(harmful) for kind in (NAMED, MISTAKEN, OTHER)]


def families_table(study: Study) -> str:
    """What carries the harm that is left, and what is refused for nothing: a row a family, a column an exit."""
    ways = {title: [n for n in names if study.has(n)] for title, names in WAYS.items() if title in ("raw", "mapped", _AFTER)}
    rates = {name: family_rates(study, name) for names in ways.values() for name in names}
    exits = [e for e in map(Exit, FAMILY_EXITS) if all(e in found for found in rates.values())] + [study.reference]
    families = dict.fromkeys(row.family for row in study.rows if row.cls != "task")

    def cell(names: Sequence[str], family: str, exit: Exit) -> str:
        return f"{100 * fmean(rates[name][exit][family].rate for name in names):.0f}" if names else "-"

    rows = [
        [family, *(" / ".join(cell(names, family, exit) for names in ways.values()) for exit in exits)] for family in families
    ]
    return markdown(["family", *(f"exit {exit}{'*' if exit == study.reference else ''}" for exit in exits)], rows)


def pairs_table(study: Study) -> str:
    """Retrained from mapped states against retrained from raw ones, seed by seed: the means and the seeds' differences."""
    pairs = [(a, b) for a, b in zip(*_RETRAINED.values(), strict=True) if study.has(a, b)]
    for a, b in pairs:
        if study.runs[a].model == study.runs[b].model:
            raise AlignError(f"{b} and {a} have the same weights", where=b, expected="one with maps", todo=f"run {b} again")
    if not pairs:
        return f"Not run yet: {', '.join(name for names in _RETRAINED.values() for name in names)}."
    rows, said = [], {}
    for exit in filter(None, study.rates[pairs[0][0]]):
        changes = {f: _changes(study, pairs, exit, f) for f in FIGURES}
        said[exit] = verdict(changes)
        rows.append([f"{exit}{'*' if exit == study.reference else ''}", *map(_change, changes.values()), said[exit]])
    shown = markdown(["exit", "harm, points", "over-refusal", "accuracy", "with maps"], rows)
    return f"{shown}\n\n{_sentence(said, len(pairs))}"


def _changes(study: Study, pairs: Iterable[tuple[str, str]], exit: Exit, figure: str) -> list[float]:
    return [100 * (study.rates[b][exit][figure].rate - study.rates[a][exit][figure].rate) for a, b in pairs]


def _change(values: Sequence[float]) -> str:
    shown = f"{fmean(values):+.1f}"
    return shown if len(values) == 1 else f"{shown} ({min(values):+.1f} to {max(values):+.1f})"


def verdict(changes: Mapping[str, Sequence[float]]) -> str:
    """Better where no figure's mean got worse and one got better; worse the other way round; else mixed.

    >>> verdict({"harmful": [-1.0, 0.5], "overrefusal": [0.0, 0.0], "accuracy": [1.0, 1.0]})
    'better'
    >>> verdict({"harmful": [-1.0], "overrefusal": [2.0], "accuracy": [0.0]})
    'mixed'
    """
    gains = [FIGURES[figure] * fmean(values) for figure, values in changes.items()]
    if not any(gains):
        return "alike"
    return "better" if min(gains) >= 0 else "worse" if max(gains) <= 0 else "mixed"


def _sentence(said: Mapping[Exit, str], seeds: int) -> str:
    """Whether maps and retraining beat retraining alone at equal updates, at which exits."""
    by = {word: [str(exit) for exit, own in said.items() if own == word] for word in dict.fromkeys(said.values())}
    told = "; ".join(f"{word} at {len(exits)} ({', '.join(exits)})" for word, exits in by.items())
    everywhere = "beats" if set(by) <= {"better"} else "does not beat"
    return (
        f"At equal updates retraining from mapped states {everywhere} retraining alone at every exit in all three figures "
        f"({seeds} seeds, paired): {told}."
    )


def _table(
    study: Study,
    ways: Ways,
    figures: Callable[[Study, str, Exit], Sequence[float]],
    more: Sequence[Sequence[str]] = (),
    exits: Sequence[Exit | None] = (),
) -> str:
    """A row an exit, a column a way: its figures in per cent, the mean of the seeds that are there."""
    there = {title: [name for name in names if study.has(name)] for title, names in ways.items()}
    shown = exits or sorted({exit for names in there.values() for name in names for exit in study.rates[name] if exit})
    rows = [
        [
            f"{exit}{'*' if exit == study.reference else ''}",
            *(_cell([figures(study, name, exit) for name in names if exit in study.rates[name]]) for names in there.values()),
        ]
        for exit in filter(None, shown)
    ]
    missing = [name for names in ways.values() for name in names if not study.has(name)]
    headers = ["exit", *(f"{title} ({len(names)} seeds)" if len(names) > 1 else title for title, names in there.items())]
    return markdown(headers, [*rows, *more]) + (f"\n\nNot run yet: {', '.join(missing)}." if missing else "")


def _rates(study: Study, name: str, exit: Exit) -> list[float]:
    return [study.rates[name][exit][figure].rate for figure in FIGURES]


def _cell(figures: Sequence[Sequence[float]]) -> str:
    return " / ".join(f"{100 * fmean(seeds):.1f}" for seeds in zip(*figures, strict=True)) if figures else "-"


_TABLES: Mapping[str, Callable[[Study], str]] = {
    "maps": ways_table,
    "map-pairs": pairs_table,
    "map-kinds": kinds_table,
    "map-objectives": objectives_table,
    "map-pictures": pictures_table,
    "map-shapes": shapes_table,
    "map-families": families_table,
}
