"""Objectives side by side: what each leaves over all exits, and how equal their compute was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from study.documents import interval, markdown, spread
from study.judged import FIGURES, TITLES, Study, mean, worst
from study.plan import WINNER
from study.raw import Raw

COMPUTE_TOLERANCE = 0.1  # compute within this share of the winner's counts as equal


def compare(study: Study, before: Mapping[str, str], ways: Mapping[str, Sequence[str]], equal: Sequence[str]) -> str:
    """A row a way of training: over all exits the mean of its seeds, lowest and highest in parentheses.

    Args:
        study: judged answers.
        before: runs that nothing was trained for, by their titles.
        ways: the seeds' runs of each way of training, by its title; compute is shown against `WINNER`'s.
        equal: titles of the ways whose compute should be the same.
    """
    headers = ["method", "seeds", "updates", "compute", "minutes"]
    headers += [f"{TITLES[f]} %, {which}" for f in FIGURES for which in ("worst depth", "mean")]
    headers += ["worst seed's worst depth: harmful %"]
    rows = [_row(title, [name], study, ["-", "-", "-", "-"]) for title, name in before.items() if study.has(name)]
    for title, names in ways.items():
        if there := [name for name in names if study.has(name)]:
            raws = [study.runs[name] for name in there]
            updates = "/".join(sorted({str(raw.config["steps"]) for raw in raws}))
            ratio = compute_ratio(study, there, ways[WINNER])
            compute = "not counted" if ratio is None else f"{ratio:.2f}"
            rows.append(_row(title, there, study, [str(len(there)), updates, compute, _minutes(raws)]))
    ratios = {title: compute_ratio(study, ways[title], ways[WINNER]) for title in equal}
    off = [title for title, ratio in ratios.items() if ratio is not None and abs(ratio - 1) > COMPUTE_TOLERANCE]
    said = f"not equal for {', '.join(off)}" if off else "equal"
    line = f"Compute: language-model token positions against {WINNER}'s; equal is within {COMPUTE_TOLERANCE:.0%}: {said}."
    return f"{markdown(headers, rows)}\n\n{line}"


def _row(title: str, names: Sequence[str], study: Study, first: Sequence[str]) -> list[str]:
    rates = [study.rates[name] for name in names]
    figures = [spread([of(r, f) for r in rates]) for f in FIGURES for of in (worst, mean)]
    name, exit = max(((n, e) for n in names for e in study.rates[n]), key=lambda at: study.rates[at[0]][at[1]]["harmful"].rate)
    return [title, *first, *figures, f"{interval(study.rates[name][exit]['harmful'])} at depth {exit}"]


def compute_ratio(study: Study, names: Sequence[str], base: Sequence[str]) -> float | None:
    """Token positions of some runs over those of the base's runs; None where they were not counted."""
    ours, theirs = _tokens(study, names), _tokens(study, base)
    return ours / theirs if ours is not None and theirs else None


def _tokens(study: Study, names: Sequence[str]) -> float | None:
    tokens = [study.runs[n].tokens for n in names if study.has(n)]
    known = [t for t in tokens if t is not None]
    return fmean(known) if known and len(known) == len(tokens) else None


def _minutes(raws: Sequence[Raw]) -> str:
    times = [t for t in map(wall, raws) if t is not None]
    return spread([t / 60 for t in times]) if times else "-"


def wall(raw: Raw) -> float | None:
    """Seconds of a run's training by the clock, with what came before and after its updates; None where it was not trained."""
    return None if raw.seconds is None else raw.seconds + (raw.setup_seconds or 0.0)
