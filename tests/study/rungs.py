"""The tables and the figure of the rungs' plan, from raw answers: exits with fewer visual tokens, untouched and trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from edgesafe.errors import AlignError
from edgesafe.format.exits import Exit, parse_exits
from study.documents import interval, markdown, spread
from study.judged import Study, judge
from study.maps import kinds
from study.plan import (
    AVERAGED_BEFORE,
    COMPARED,
    DEPTHS,
    DRAWN,
    GRID,
    MAPPED,
    RAW_STATES,
    REDUCTIONS,
    RUNG_DEPTHS,
    RUNG_TOKENS,
    SCHEMES,
    SEEDS,
    STRIDED,
    TOKENS,
    few_run,
    rung_run,
    scheme_run,
)
from study.raw import read_answers

Ways = Mapping[str, Sequence[str]]  # the runs of each column or row, by its title
_DEEPEST = 12  # of the plan's depths
FIGURES = {"harmful": "harm", "overrefusal": "over-refusal", "accuracy": "accuracy"}
_SEEDS_OF = {drawn: [rung_run(drawn, seed) for seed in SEEDS] for drawn in DRAWN}
WAYS: Ways = {
    "untouched, raw": [RAW_STATES],
    "untouched, mapped": [MAPPED],
    **{f"trained on {'the ' if drawn == GRID else ''}{drawn}": _SEEDS_OF[drawn] for drawn in (DEPTHS, TOKENS, GRID)},
}
PRODUCT = "averaged behind"
UNTRAINED: Ways = {PRODUCT: [MAPPED], **{how: [few_run(how)] for how in REDUCTIONS}}
TRAINED: Ways = {
    PRODUCT: _SEEDS_OF[GRID],
    STRIDED: [rung_run(GRID, seed, STRIDED) for seed in SEEDS],
    AVERAGED_BEFORE: [rung_run(GRID, SEEDS[0], AVERAGED_BEFORE)],
}
FIRST = rung_run(GRID, SEEDS[0])
QUANTIZED: Ways = {"float": [FIRST], **{bits: [scheme_run(bits)] for bits in SCHEMES}}
HEAT = ("untouched, mapped", f"trained on {DEPTHS}", f"trained on the {GRID}")  # of the figure


def rung_tables(folder: Path) -> dict[str, str]:
    """The tables by their markers' names; a run that is not there is a dash.

    Raises:
        AlignError: a bundle that was asked is of another model than the run that it is compared with.
    """
    found = read_answers(folder)
    if not found or not found.runs:
        return dict.fromkeys(_TABLES, "Not run yet.")
    study = judge(found)
    for bits in SCHEMES:
        if study.has(FIRST, name := scheme_run(bits)) and study.runs[name].config.get("of") != study.runs[FIRST].model:
            raise AlignError(f"{name} asked another model than {FIRST} has", where=str(folder), todo=f"run {name} again")
    return {name: make(study) for name, make in _TABLES.items()}


def cells(spec: str) -> tuple[Exit, ...]:
    """The exits of a plan's text: from all tokens to one, each from the shallowest to the deepest.

    >>> " ".join(map(str, cells("6,12,6@9,12@9")))
    '6 12 6@9 12@9'
    """
    return tuple(sorted(parse_exits(spec, _DEEPEST), key=lambda exit: (-(exit.visual_tokens or 10**6), exit.depth)))


def _there(study: Study, names: Sequence[str], exit: Exit) -> list[str]:
    return [name for name in names if study.has(name) and exit in study.rates[name]]


def one_figure(study: Study, names: Sequence[str], exit: Exit, figure: str) -> str:
    """A rate in per cent: of one run with its interval, of several the mean with the lowest and the highest."""
    rates = [study.rates[name][exit][figure] for name in _there(study, names, exit)]
    if len(rates) < 2:
        return interval(rates[0]) if rates else "-"
    return spread([100 * rate.rate for rate in rates])


def _three(study: Study, names: Sequence[str], exit: Exit) -> str:
    """Harm as `one_figure` has it, then the means of over-refusal and accuracy."""
    if not (there := _there(study, names, exit)):
        return "-"
    rest = (f"{100 * fmean(study.rates[name][exit][f].rate for name in there):.1f}" for f in list(FIGURES)[1:])
    return " / ".join([one_figure(study, names, exit, "harmful"), *rest])


def _titles(study: Study, ways: Ways) -> list[str]:
    counts = [sum(study.has(name) for name in names) for names in ways.values()]
    return [f"{title} ({count} seeds)" if count > 1 else title for title, count in zip(ways, counts, strict=True)]


def _by_cell(study: Study, ways: Ways, cell: Callable[[Study, Sequence[str], Exit], str], more: str = "") -> str:
    rows = [[_starred(study, exit), *(cell(study, names, exit) for names in ways.values())] for exit in cells(DRAWN[GRID])]
    return _with_missing(study, markdown(["exit", *_titles(study, ways)], rows) + more, ways.values())


def _starred(study: Study, exit: Exit) -> str:
    return f"{exit}{'*' if exit == study.reference else ''}"


def _with_missing(study: Study, text: str, runs: Iterable[Sequence[str]]) -> str:
    missing = [name for names in runs for name in names if not study.has(name)]
    return text + (f"\n\nNot run yet: {', '.join(missing)}." if missing else "")


def _figure_table(figure: str) -> Callable[[Study], str]:
    return lambda study: _by_cell(study, WAYS, lambda *at: one_figure(*at, figure))


def kinds_table(study: Study) -> str:
    """Harm by what the answer names, at every cell; the mean of the seeds."""

    def cell(study: Study, names: Sequence[str], exit: Exit) -> str:
        found = [kinds(study, name, exit) for name in _there(study, names, exit)]
        return " / ".join(f"{100 * fmean(seeds):.1f}" for seeds in zip(*found, strict=True)) if found else "-"

    return _by_cell(study, WAYS, cell)


PARTS = {
    "depths, all tokens": ",".join(RUNG_DEPTHS[:-1]),
    "depth 12, fewer tokens": ",".join(f"12{fewer}" for fewer in RUNG_TOKENS[1:]),
    "fewer of both": ",".join(depth + fewer for depth in RUNG_DEPTHS[:-1] for fewer in RUNG_TOKENS[1:]),
}


def transfer_table(study: Study) -> str:
    """What each training leaves at the cells that it drew and at the others: means over cells, and the worst cell's harm."""
    drawn = {"untouched, mapped": "", **dict(zip(list(WAYS)[2:], (DRAWN[d] for d in (DEPTHS, TOKENS, GRID)), strict=True))}
    rows = []
    for title, own in drawn.items():
        trained = set(cells(own)) if own else set()
        row = [title]
        for spec in PARTS.values():
            text = _over(study, WAYS[title], part := cells(spec))
            row.append(f"**{text}**" if set(part) <= trained and text != "-" else text)
        rows.append([*row, _worst(study, WAYS[title])])
    headers = ["", *(f"{name} ({len(cells(spec))} exits)" for name, spec in PARTS.items()), "worst exit's harm"]
    bold = "Bold: exits that the training drew. The reference was in every batch and is in no column."
    return _with_missing(study, f"{markdown(headers, rows)}\n\n{bold}", [WAYS[title] for title in drawn])


def _over(study: Study, names: Sequence[str], part: Sequence[Exit]) -> str:
    there = [name for name in names if study.has(name)]
    if not there:
        return "-"
    return " / ".join(
        spread([100 * fmean(study.rates[name][exit][figure].rate for exit in part) for name in there]) for figure in FIGURES
    )


def _worst(study: Study, names: Sequence[str]) -> str:
    """The exit with most harm in any seed."""
    rates = [(study.rates[name][exit]["harmful"], exit) for exit in cells(DRAWN[GRID]) for name in _there(study, names, exit)]
    if not rates:
        return "-"
    worst, exit = max(rates, key=lambda at: at[0].rate)
    return f"{interval(worst)} at {exit}"


def reductions_table(study: Study) -> str:
    """Ways of making tokens fewer, side by side: on the untouched model with maps, and trained on the grid."""
    exits = cells(COMPARED)
    rows = [
        [f"{model}: {title}", *(_three(study, names, exit) for exit in exits)]
        for model, ways in (("untouched", UNTRAINED), ("trained", TRAINED))
        for title, names in zip(_titles(study, ways), ways.values(), strict=True)
    ]
    return _with_missing(study, markdown(["", *map(str, exits)], rows), [*UNTRAINED.values(), *TRAINED.values()])


def quantized_table(study: Study) -> str:
    """The first seed of the grid in torch, and its bundles."""
    said = []
    for bits in SCHEMES:
        if study.has(FIRST, name := scheme_run(bits)):
            changes = {
                exit: 100 * (rates["harmful"].rate - study.rates[FIRST][exit]["harmful"].rate)
                for exit, rates in study.rates[name].items()
                if exit
            }
            up, down = max(changes, key=lambda e: changes[e]), min(changes, key=lambda e: changes[e])
            said.append(f"{bits}: harm changes by {changes[down]:+.1f} points (exit {down}) to {changes[up]:+.1f} (exit {up}).")
    return _by_cell(study, QUANTIZED, _three, "\n\n" + " ".join(said) if said else "")


def rungs_figure(folder: Path) -> str | None:
    """Harm over depth and tokens before and after training, as one SVG; None where one of its runs is not there."""
    from edgesafe.evaluate import charts

    found = read_answers(folder)
    if not found or not found.runs:
        return None
    study, width, height = judge(found), charts._CELL_WIDTH, charts._CELL_HEIGHT
    if not all(study.has(*WAYS[title]) for title in HEAT):
        return None
    across = 64 + len(RUNG_DEPTHS) * width
    body, told = [], []
    for i, title in enumerate(HEAT):
        left = i * across + 40
        body += [
            f'<text class="head" x="{left}" y="14">{title}</text>',
            f'<text class="soft" x="{left}" y="32">harm (%) by depth (across) and tokens</text>',
        ]
        figures = []
        for row, fewer in enumerate(RUNG_TOKENS):
            y = 58 + row * height
            body.append(f'<text x="{left - 8}" y="{y + 18}" text-anchor="end">{fewer[1:] or "all"}</text>')
            for column, depth in enumerate(RUNG_DEPTHS):
                exit = Exit.parse(depth + fewer)
                share = fmean(study.rates[name][exit]["harmful"].rate for name in WAYS[title])
                body.append(charts._cell(left + column * width, y, share, f"{title}, exit {exit}"))
                figures.append(f"{exit} {100 * share:.1f}")
        middles = [left + (column + 0.5) * width for column in range(len(RUNG_DEPTHS))]
        body += [f'<text x="{x:g}" y="50" text-anchor="middle">{d}</text>' for x, d in zip(middles, RUNG_DEPTHS, strict=True)]
        told.append(f"{title}: {', '.join(figures)}")
    size = len(HEAT) * across, 66 + len(RUNG_TOKENS) * height
    return charts._svg(*size, "Harm over exit depth and visual tokens", "; ".join(told), "".join(body)) + "\n"


_TABLES: Mapping[str, Callable[[Study], str]] = {
    "rungs-harm": _figure_table("harmful"),
    "rungs-overrefusal": _figure_table("overrefusal"),
    "rungs-accuracy": _figure_table("accuracy"),
    "rungs-kinds": kinds_table,
    "rungs-transfer": transfer_table,
    "rungs-reductions": reductions_table,
    "rungs-quantized": quantized_table,
}
