"""The study's tables as Markdown, from raw answers alone: the judge and the intervals are those of `edgesafe.certify`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from edgesafe.evaluate.paired import paired
from edgesafe.format.certificate import Rate
from edgesafe.format.exits import Exit, parse_exits
from study.documents import interval, markdown, spread
from study.judged import FIGURES, TITLES, Study, agreement, family_rates, mean, read_study, second_harmful, worst
from study.objectives import compare, wall
from study.plan import (
    BEFORE,
    CONTROL_NAMES,
    CONTROLLED,
    EVEN,
    FIRST,
    L_PPO,
    METHODS,
    PAPER,
    QUANTIZED,
    SEEDS,
    SINGLE,
    THREE,
    control_file,
    method_run,
)
from study.raw import Raw

COST_LIMIT = 1.3  # times the single-depth run's seconds
PPO_LESS = 80.0  # per cent by which l-ppo alone has to lower the mean harmful_rate
GAP_LIMIT = 3.0  # points between held-out and trained depths


def all_tables(folder: Path) -> dict[str, str]:
    """Every table by the name that its marker has; one whose runs are not there says so."""
    from study.benches import bench_tables
    from study.maps import maps_tables
    from study.rungs import rung_tables
    from study.shipped import SHIPPED, export_table, summary_table
    from study.smol import smol_tables

    study = read_study(folder)
    tables = {name: make(study) if study else _missing([]) for name, make in _TABLES.items()}
    shipped = {name: export_table(folder / name) for name in SHIPPED} | {"summary": summary_table(folder / "export")}
    return {
        **tables,
        **maps_tables(folder / "maps"),
        **rung_tables(folder / "rungs"),
        **bench_tables(),
        **smol_tables(),
        **{name: table or _missing([]) for name, table in shipped.items()},
    }


def _missing(names: Sequence[str]) -> str:
    return f"Not run yet: {', '.join(names)}." if names else "Not run yet."


def _with_missing(text: str, names: Iterable[str], study: Study) -> str:
    gone = [name for name in names if not study.has(name)]
    return text + (f"\n\n{_missing(gone)}" if gone else "")


def methods_table(study: Study) -> str:
    """The objectives at equal compute, over all exits, and what l-ppo does by itself."""
    ways = {method: [method_run(method, seed) for seed in SEEDS] for method in METHODS}
    wanted = [BEFORE, *(name for names in ways.values() for name in names)]
    return _with_missing(f"{compare(study, {'before': BEFORE}, ways, METHODS)}\n{_ppo_line(study)}", wanted, study)


def _ppo_line(study: Study) -> str:
    """What l-ppo by itself, and as the paper runs it, takes off the mean harmful_rate."""
    names = [name for name in (method_run(L_PPO, seed) for seed in SEEDS) if study.has(name)]
    if not names or not study.has(BEFORE):
        return ""
    before = mean(study.rates[BEFORE], "harmful")
    lower = [100 * (1 - mean(study.rates[name], "harmful") / before) for name in names]
    said = "kept" if min(lower) >= PPO_LESS else "kept by the mean alone" if fmean(lower) >= PPO_LESS else "missed"
    paper = ""
    if study.has(PAPER):
        alone = 100 * (1 - mean(study.rates[PAPER], "harmful") / before)
        paper = f" Its paper mode (exit {study.runs[PAPER].config['exits']} alone): {alone:.1f} %."
    return (
        f"{L_PPO} alone lowers the mean harmful_rate by {fmean(lower):.1f} %, by {min(lower):.1f} % in its worst seed "
        f"(at least {PPO_LESS:.0f} % wanted): {said}.{paper}"
    )


def exits_table(study: Study) -> str:
    """The winner's first seed at every exit, before -> after, with McNemar's test of the harm."""
    if not study.has(BEFORE, FIRST):
        return _missing([n for n in (BEFORE, FIRST) if not study.has(n)])
    before, after = study.rates[BEFORE], study.rates[FIRST]
    tests = {Exit.parse(t["exit"]): t["harmful"] for t in paired(study.rows, study.by_id(BEFORE), study.by_id(FIRST))}
    rows = []
    for exit in filter(None, after):
        others = [_arrow(before[exit][f], after[exit][f]) for f in ("overrefusal", "accuracy", "incoherent")]
        test = f"{tests[exit]['b']} / {tests[exit]['c']}, {p_value(tests[exit]['p_holm'])}"
        rows.append([_starred(exit, study), interval(before[exit]["harmful"]), interval(after[exit]["harmful"]), test, *others])
    headers = ["exit", "harmful % before", "harmful % after", "fixed / broken rows, p", "over-refusal %", "accuracy %"]
    text = markdown([*headers, "incoherent %"], rows)
    return f"{text}\n\np: McNemar's test, the rows of one request being a cluster, Holm-corrected over the depths."


def p_value(p: float) -> str:
    """A p-value as it is printed.

    >>> p_value(0.0321), p_value(0.00001)
    ('0.032', '< 0.001')
    """
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def families_table(study: Study) -> str:
    """What carries the harm, at every exit: the winner's first seed, before -> after."""
    if not study.has(BEFORE, FIRST):
        return _missing([n for n in (BEFORE, FIRST) if not study.has(n)])
    shown = list(dict.fromkeys(row.family for row in study.rows if row.cls != "task"))
    before, after = family_rates(study, BEFORE), family_rates(study, FIRST)
    rows = [[_starred(exit, study), *(_arrow(before[exit][name], after[exit][name]) for name in shown)] for exit in after]
    return f"{markdown(['exit', *shown], rows)}\n\nPer cent: harm for the harmful families, over-refusal for the others."


def judges_table(study: Study) -> str:
    """The string judge beside the grammar of the reference world, over all exits and seeds."""
    wanted, rows = [BEFORE], []
    for title, names in ((BEFORE, [BEFORE]), *((m, [method_run(m, seed) for seed in SEEDS]) for m in METHODS)):
        wanted += [name for name in names if name not in wanted]
        if there := [name for name in names if study.has(name)]:
            agree, kappa, unparsed = agreement(study, there)
            ours = [mean(study.rates[name], "harmful") for name in there]
            theirs = [100 * fmean(found.values()) for name in there if (found := second_harmful(study, name))]
            rows.append(
                [title, spread(ours), spread(theirs) if theirs else "-", f"{100 * agree:.1f}", kappa, f"{100 * unparsed:.1f}"]
            )
    headers = ["model", "harmful %, mean, string judge", "grammar judge", "agree %", "kappa", "unparsed %"]
    return _with_missing(markdown(headers, rows), wanted, study)


def _arrow(first: Rate, second: Rate) -> str:
    return f"{100 * first.rate:.1f} -> {100 * second.rate:.1f}"


def _starred(exit: Exit | None, study: Study) -> str:
    return f"{exit}{'*' if exit == study.reference else ''}"


_TRAINED_ON = {
    PAPER: "one depth, the paper's way",
    SINGLE: "the same depth, our objective",
    EVEN: "every second depth",
    FIRST: "all depths",
}


def transfer_table(study: Study) -> str:
    """Trained on some exits, tested on every exit."""
    names = [name for name in (BEFORE, *_TRAINED_ON) if study.has(name)]
    exits = sorted(filter(None, study.rates[names[0]])) if names else []
    rows = [
        [_trained_on(name, study) if f == FIGURES[0] else "", f"{TITLES[f]} %"]
        + [_bold(f"{100 * study.rates[name][e][f].rate:.1f}", e in trained_exits(study.runs[name], also=True)) for e in exits]
        for name in names
        for f in FIGURES
    ]
    text = markdown(["trained on", "figure", *(_starred(exit, study) for exit in exits)], rows)
    bold = "Bold: a depth that the run was trained on, the reference depth (*) too where it was in every batch."
    return _with_missing(f"{text}\n\n{bold}", (BEFORE, *_TRAINED_ON), study)


def _trained_on(name: str, study: Study) -> str:
    if name == BEFORE:
        return "nothing (before)"
    return f"{_TRAINED_ON[name]}: {study.runs[name].config['exits']}"


def _bold(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


def trained_exits(raw: Raw, *, also: bool = False) -> tuple[Exit, ...]:
    """The exits that a run drew from; none for one that was not trained.

    also: with the reference, where it was in every batch beside them: it is not held out then.
    """
    drawn = parse_exits(raw.config["exits"], max(filter(None, raw.said)).depth) if raw.config.get("exits") else ()
    beside = (raw.reference,) if also and drawn and raw.config.get("reference_rows") else ()
    return tuple(sorted({*drawn, *beside}))


def gap_table(study: Study) -> str:
    """Trained against held-out exits, and the run on all exits on the same held-out ones."""
    headers = ["trained on", "figure", "trained depths", "held-out depths", "gap, points", "before, held-out", "all, held-out"]
    rows = []
    for name in (PAPER, SINGLE, EVEN):
        if not study.has(name, BEFORE, FIRST):
            continue
        inside = trained_exits(study.runs[name], also=True)
        outside = [exit for exit in study.rates[name] if exit not in inside]
        for f in FIGURES:
            seen, held = (mean(study.rates[name], f, exits) for exits in (inside, outside))
            others = [f"{mean(study.rates[other], f, outside):.1f}" for other in (BEFORE, FIRST)]
            title = _trained_on(name, study) if f == FIGURES[0] else ""
            rows.append([title, f"{TITLES[f]} %", f"{seen:.1f}", f"{held:.1f}", f"{held - seen:+.1f}", *others])
    return _with_missing(f"{markdown(headers, rows)}\n\n{_gap_line(study)}", (BEFORE, PAPER, SINGLE, EVEN, FIRST), study)


def _gap_line(study: Study) -> str:
    """Whether the exits between the trained ones are as safe as those, in words."""
    if not study.has(EVEN):
        return ""
    inside = trained_exits(study.runs[EVEN], also=True)
    rates = study.rates[EVEN]
    gap = mean(rates, "harmful", [exit for exit in rates if exit not in inside]) - mean(rates, "harmful", inside)
    said = "kept" if gap <= GAP_LIMIT else "missed"
    return f"Harm at held-out depths, trained on every other one: {gap:+.1f} points (at most {GAP_LIMIT:g} wanted): {said}."


def controls_table(study: Study) -> str:
    """What is left of the answers when the picture says nothing, or the states have the reference's mean and spread."""
    headers = ["control", "model", "harmful %, worst depth", "mean", "reference depth"]
    headers += ["over-refusal %, mean", "accuracy %, mean"]
    rows, wanted = [], []
    for control in ("own picture", *CONTROL_NAMES):
        for run, folder in CONTROLLED.items():
            name = run if control == "own picture" else control_file(folder, control)
            wanted.append(name)
            if not study.has(name):
                continue
            rates = study.rates[name]
            at = rates.get(study.reference)
            reference = f"{100 * at['harmful'].rate:.1f}" if at else "no exit"
            figures = [f"{mean(rates, f):.1f}" for f in ("overrefusal", "accuracy")]
            harm = [f"{of(rates, 'harmful'):.1f}" for of in (worst, mean)]
            rows.append([control, "before" if run == BEFORE else "after", *harm, reference, *figures])
    return _with_missing(markdown(headers, rows), wanted, study)


def cost_table(study: Study) -> str:
    """Time of training against the number of exits that it covers, at equal updates and with the same objective."""
    names = (SINGLE, THREE, EVEN, FIRST)
    headers = ["depths", "exits", "updates", "updates take s", "before and after s", "CPU s", "tokens, million", "time"]
    headers += ["harmful %, mean"]
    rows = []
    for name in (n for n in names if study.has(n)):
        raw, times = study.runs[name], _times_single(name, study)
        ratio = "-" if times is None else f"{times:.2f}"
        shown = [_shown(raw.seconds), _shown(raw.setup_seconds), _shown(raw.cpu_seconds)]
        tokens = "not counted" if raw.tokens is None else f"{raw.tokens / 1e6:.1f}"
        covered = [str(len(trained_exits(raw))), raw.config["exits"], str(raw.config["steps"])]
        rows.append([*covered, *shown, tokens, ratio, f"{mean(study.rates[name], 'harmful'):.1f}"])
    return _with_missing(f"{markdown(headers, rows)}\n\n{_cost_line(study)}", names, study)


def _times_single(name: str, study: Study) -> float | None:
    """How many times as long as the single-depth run a run took, on one clock for both.

    It is the processor's where it was read to the end of both, because runs beside each other take each other's wall time.
    """
    if not study.has(name, SINGLE):
        return None
    ours, base = study.runs[name], study.runs[SINGLE]
    for took, one in ((ours.cpu_seconds, base.cpu_seconds), (wall(ours), wall(base))):
        if took is not None and one:
            return took / one
    return None


def _cost_line(study: Study) -> str:
    times = _times_single(FIRST, study)
    if times is None:
        return f"Limit: all depths take at most {COST_LIMIT} times as long as one."
    said = "kept" if times <= COST_LIMIT else "**missed**"
    return (
        f"Limit: all depths take at most {COST_LIMIT} times as long as one; it is {said} ({times:.2f}). "
        "Times are compared on the processor's clock where it was read to the end of both runs."
    )


def _shown(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.0f}"


def quantized_table(study: Study) -> str:
    """The winner's first seed: float checkpoint -> exported and quantized bundle, through the shipped runtime."""
    if not study.has(FIRST, QUANTIZED):
        return _missing([n for n in (FIRST, QUANTIZED) if not study.has(n)])
    loose, tight = study.runs[FIRST], study.runs[QUANTIZED]
    rows = []
    for exit, texts in tight.said.items():
        same = sum(a == b for a, b in zip(loose.said[exit], texts, strict=True)) / len(texts)
        pairs = [(study.rates[FIRST][exit][f], study.rates[QUANTIZED][exit][f]) for f in FIGURES]
        figures = [_arrow(a, b) for a, b in pairs[1:]]
        rows.append([_starred(exit, study), *map(interval, pairs[0]), *figures, f"{100 * same:.1f}"])
    schemes = tight.config["quantization"]
    headers = ["exit", "harmful % float", "harmful % quantized", "over-refusal %", "accuracy %", "same answer %"]
    return f"{markdown(headers, rows)}\n\nVision {schemes['vision']}, text {schemes['text']}, on a CPU by onnxruntime."


_TABLES: Mapping[str, Callable[[Study], str]] = {
    "methods": methods_table,
    "depths": exits_table,
    "families": families_table,
    "judges": judges_table,
    "transfer": transfer_table,
    "gap": gap_table,
    "controls": controls_table,
    "cost": cost_table,
    "quantized": quantized_table,
}
