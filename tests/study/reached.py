"""How far each run's states reach towards the reference's, and whether that tells its harm.

`reached.json` beside the raw answers of the maps' plan is {run: {exit: share}}: the share of the variance of the reference's
states that an exit's states, mapped or raw, reach on the suite's first pictures. One yardstick for all runs, whatever pictures
their maps were fitted to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import correlation, fmean, median

from edgesafe.format.exits import Exit, parse_exits
from edgesafe.format.files import write_atomically
from edgesafe.format.suite import read_suite
from study.documents import markdown
from study.judged import Study
from study.plan import KINDS, MAPPED, RAW_STATES, Run
from study.raw import raw_path
from study.work import Setup, checkpoint, fit_maps, has_checkpoint

REACHED, PICTURES = "reached.json", 256
_FIGURES = {"harmful": "Harm", "accuracy": "Accuracy"}
_ENOUGH = 5  # sets of maps that a correlation is taken over
Reached = Mapping[str, Mapping[Exit, float]]


def measure(setup: Setup, runs: Sequence[Run]) -> Path:
    """Measure those of the runs that train nothing, have answers and whose maps are there; others' shares stay in the file."""
    from edgesafe.checkpoint.exit_maps import maps_of
    from edgesafe.checkpoint.exit_model import load
    from study.other_maps import picture_states, reached

    suite = read_suite(setup.suite, verify=False)
    plain = load(setup.model)
    states = picture_states(plain, sorted({suite.image_path(row) for row in suite.rows})[:PICTURES])
    wanted, path = states[plain.reference.depth], setup.out / REACHED
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def maps(run: Run, depths: Sequence[int]) -> Mapping[int, object]:
        if run.how in KINDS:
            return fit_maps(setup, run, plain, depths)
        return maps_of(load(checkpoint(setup, run)[0]).model)

    for run in runs:
        if not run.config and raw_path(setup.out, run.name).is_file() and has_checkpoint(setup, run):
            depths = [exit.depth for exit in parse_exits(run.asked or "all", plain.n_blocks) if exit != plain.reference]
            own = maps(run, depths)
            found[run.name] = {d: round(reached(own[d](states[d]) if d in own else states[d], wanted), 4) for d in depths}
    write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())
    return path


def read_reached(folder: Path) -> Reached:
    """What was measured; {} where nothing was."""
    path = folder / REACHED
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {run: {Exit.parse(exit): share for exit, share in shares.items()} for run, shares in found.items()}


def reached_table(study: Study, reached: Reached) -> str:
    """The share that raw and mapped exits reach, beside their harm and accuracy; and whether the one tells the others."""
    there = [name for name in (RAW_STATES, MAPPED) if name in reached and study.has(name)]
    if MAPPED not in there:
        return "Not run yet."
    rows = [[str(exit), *(_cell(study, reached, name, exit) for name in there)] for exit in reached[MAPPED]]
    headers = ["exit", *(f"{name}: reached / harm / accuracy" for name in there)]
    return "\n\n".join([markdown(headers, rows), *(_sentence(study, reached, figure) for figure in _FIGURES)])


def _cell(study: Study, reached: Reached, name: str, exit: Exit) -> str:
    figures = [100 * reached[name][exit], *(_rate(study, name, exit, figure) for figure in _FIGURES)]
    return " / ".join(f"{figure:.1f}" for figure in figures)


def _rate(study: Study, name: str, exit: Exit, figure: str) -> float:
    return 100 * study.rates[name][exit][figure].rate


def _sentence(study: Study, reached: Reached, figure: str) -> str:
    """Rank correlations over exits and over maps, and what a reading off the product's maps misses on others."""
    known = sorted((share, _rate(study, MAPPED, exit, figure)) for exit, share in reached[MAPPED].items())
    others = {name: shares for name, shares in reached.items() if name != MAPPED and study.has(name)}
    over_maps = []
    for exit in reached[MAPPED]:
        names = [name for name in (*others, MAPPED) if exit in reached[name]]
        if len(names) >= _ENOUGH:
            pairs = [(reached[name][exit], _rate(study, name, exit, figure)) for name in names]
            over_maps.append(rank_correlation(*zip(*pairs, strict=True)))
    said = (
        f"{_FIGURES[figure]}: rank correlation with the share {rank_correlation(*zip(*known, strict=True)):.2f} over the exits"
    )
    if over_maps:
        said += f", {median(over_maps):.2f} over sets of maps at one exit (median of {len(over_maps)} exits)"
    cases = [(name, exit, share) for name, shares in others.items() for exit, share in shares.items()]
    missed = [abs(read_off(known, share) - _rate(study, name, exit, figure)) for name, exit, share in cases]
    if missed:
        said += f". Read off the product's maps by the share alone, that of other maps is missed by {fmean(missed):.1f} points"
        said += f" in the mean and {max(missed):.1f} at worst ({len(missed)} cases)"
    return f"{said}."


def read_off(known: Sequence[tuple[float, float]], share: float) -> float:
    """Harm at a share, on straight lines between known (share, harm), in order; beyond their ends the end's.

    >>> read_off([(0.0, 50.0), (1.0, 10.0)], 0.25), read_off([(0.0, 50.0), (1.0, 10.0)], -3.0)
    (40.0, 50.0)
    """
    import numpy as np

    return float(np.interp(share, *zip(*known, strict=True)))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, equal values sharing the mean of theirs; nan where one side is constant.

    >>> rank_correlation([1, 2, 3], [9, 4, 1])
    -1.0
    """
    ranks = [_ranks(side) for side in (a, b)]
    return correlation(*ranks) if all(len(set(side)) > 1 for side in ranks) else float("nan")


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]
