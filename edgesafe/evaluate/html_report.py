"""An evaluation as one HTML file: what was run, what it amounts to, and the figures behind it.

The file holds everything itself: no script, no font, no picture and no address of anywhere else. Whatever came from a model, a
suite or a name is escaped. The words of its verdict are computed from the figures, so they can't disagree with them.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from edgesafe.certify.string_judge import COMPLY, REFUSE
from edgesafe.evaluate.charts import plot_rates, plot_training, plot_transfer
from edgesafe.evaluate.heat_maps import heat_maps, see_less
from edgesafe.evaluate.sentences import (
    RATES,
    SIGNIFICANT,
    block_count,
    exit_ranges,
    limits_of,
    reference_exit,
    sentences,
)
from edgesafe.evaluate.text_report import mark, percent
from edgesafe.format.exits import Exit
from edgesafe.format.files import write_atomically
from edgesafe.format.suite import Row

__all__ = ["plot_rates", "plot_transfer", "write_html"]

HTML, ANSWERS = "report.html", "answers.jsonl"
SHOWN = 10  # answers of a kind
_MEASURES = (("harmful", "harmful"), ("overrefusal", "over-refusal"), ("accuracy", "accuracy"), ("incoherent", "incoherent"))
_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--rule:#d0d7de;--paper:#fff;--box:#f6f8fa;--accent:#0b5cad}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9da7b1;--rule:#3d444d;--paper:#0d1117;--box:#161b22;
--accent:#79b8ff}}
body{font:16px/1.5 system-ui,"DejaVu Sans",sans-serif;color:var(--ink);background:var(--paper);max-width:70rem;margin:0 auto;
padding:1.5rem}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .25rem}h2{font-size:1.2rem;margin:2.2rem 0 .5rem;border-bottom:1px solid
var(--rule);padding-bottom:.2rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
p,figcaption{max-width:56rem}.soft,.note,small,figcaption{color:var(--soft)}small{white-space:nowrap}
.verdict{background:var(--box);border-left:5px solid var(--accent);padding:.7rem 1rem;border-radius:4px}
.verdict p{margin:.4rem 0}.verdict p:first-child{font-weight:600;font-size:1.08rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.84rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .5rem;border-bottom:1px solid var(--rule);text-align:right;white-space:nowrap}
th:first-child,td:first-child,.left{text-align:left}thead th{border-bottom:2px solid var(--soft);
white-space:normal;vertical-align:bottom;max-width:8rem}
.note{font-size:.86rem;margin:.3rem 0;max-width:56rem}tr.ref td,tr.ref th{font-weight:700}
code{font-size:.86em;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;font-size:.92rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}figure{margin:1rem 0;overflow-x:auto}figure svg{min-width:34rem}
blockquote{margin:.2rem 0 .8rem;padding:.1rem .8rem;border-left:3px solid var(--rule);overflow-wrap:anywhere;
white-space:pre-wrap}
.maps{display:flex;flex-wrap:wrap;gap:.5rem 2rem}.heat caption{text-align:left;color:var(--soft)}
.heat td{print-color-adjust:exact}.heat thead th{white-space:nowrap}
@media print{body{max-width:none;padding:0;font-size:11px}
.note{font-size:10px}.wide{overflow:visible}table{font-size:9px}th,td{padding:.15rem .3rem}
h2,h3{break-after:avoid}figure,blockquote,tr{break-inside:avoid}}
"""


def write_html(
    folder: Path, report: Mapping[str, Any], earlier: Mapping[str, Any] | None, rows: Sequence[Row] | None = None
) -> None:
    """Write `folder`/report.html.

    Args:
        folder: holds answers.jsonl, from which a sample is shown.
        report: what `edgesafe.evaluate.evaluate.evaluate` returns; beside its keys, as they are there: "training" (the lines of
            the model's metrics.jsonl) and "transfer" (`charts.plot_transfer`).
        earlier: the report of an earlier evaluation on the same suite, or None.
        rows: the suite's rows. Without them no answers are shown, because answers.jsonl names only ids.
    """
    sections = [
        _head(report),
        _verdict_box(report, earlier),
        _plots(report, earlier),
        heat_maps(report, earlier, rows),
        _exits(report, earlier),
        _families(report, rows),
        _judges(report),
        _paired(report),
        _controls(report),
        _training(report),
        _transfer(report),
        _samples(folder / ANSWERS, report, rows),
        _run(report, earlier),
    ]
    title = escape(_title(report))
    text = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><main>\n" + "\n".join(s for s in sections if s) + "\n</main></body></html>\n"
    )
    write_atomically(folder / HTML, text.encode("utf-8", errors="replace"))


def _title(report: Mapping[str, Any]) -> str:
    return f"Exits of model {report['model'][:12]} on {report.get('suite_name') or 'suite ' + report['suite'][:12]}"


def _head(report: Mapping[str, Any]) -> str:
    judges = [report["judge"]] + ([report["second_judge"]] if report.get("second_judge") else [])
    names = " and ".join(f"{one['name']} {one.get('version', '')}".strip() for one in judges)
    counts = ", ".join(
        f"{reference_exit(report)[key]['n']} {name}"
        for key, name in (("harmful", "harmful"), ("overrefusal", "harmless"), ("accuracy", "task"))
    )
    text = f"{len(report['exits'])} exits, {counts} requests, split {report['split']}; judged by {names}."
    return f'<header><h1>{escape(_title(report))}</h1><p class="soft">{escape(text)}</p></header>'


def _verdict_box(report: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> str:
    verdict = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences(report, earlier))
    most = {name: f"{100 * limit:g}" for name, limit in limits_of(report).items()}
    limits = (
        f"Limits, each held against a 95 % bound: harm at any exit down to this one at most {most['harmful_upper_95']} %; "
        f"over-refusal at most {most['overrefusal_over_baseline']} points over the untouched model's at its reference depth; "
        f"accuracy at most {most['accuracy_under_baseline']} points under it. These are answers of the float checkpoint: a "
        "certificate is measured on the exported bytes, by edgesafe certify."
    )
    return f'<section class="verdict" aria-label="verdict">{verdict}<p class="soft">{escape(limits)}</p></section>'


def _plots(report: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> str:
    caption = (
        "Dots are rates, bands their 95 % intervals (Wilson). The dotted upright line is the reference depth, at which the "
        "model was trained to read pictures; point at a dot for its figures, which the table below has too."
    )
    if see_less(report):
        caption += " Exits that see less of a picture are in the maps and the table alone."
    return f"<h2>Over depth</h2><figure>{plot_rates(report, earlier)}<figcaption>{caption}</figcaption></figure>"


def _exits(report: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> str:
    before = {e["exit"]: e for e in earlier["exits"]} if earlier else {}
    first = report["exits"][0]
    heads = ["exit", *(["harmful before"] if before else []), *(name for _, name in _MEASURES)]
    heads += [head for key, head in _EXTRA if _dig(first, key) is not None] + ["limits broken"]
    limits = report.get("broken", {})
    lines = []
    for e in report["exits"]:
        cells = [mark(e["exit"], report)]
        cells += [_interval(before[e["exit"]]["harmful"]) if e["exit"] in before else "-"] if before else []
        broken = list(dict.fromkeys(reason.split()[0] for reason in limits.get(e["exit"], [])))
        cells += _figures(e, first) + [f"<small>{escape(', '.join(broken)) or 'none'}</small>"]
        lines.append((e["exit"] == report["reference"], cells))
    for g in report.get("groups", ()):
        cells = [escape(f"{g['name']} ({exit_ranges(g['exits'])})")]
        cells += [_grouped_before(before, g["exits"])] if before else []
        lines.append((False, cells + _figures(g, first) + [""]))
    note = (
        "Per cent with 95 % intervals. * is the reference depth. A group pools its exits; its intervals are clustered by row."
    )
    return "<h2>Every exit</h2>" + _table(heads, lines, note)


_EXTRA: tuple[tuple[str, str], ...] = (
    ("second.harmful", "harmful, second judge"),
    ("second.agreement.kappa", "kappa"),
    ("length.mean", "words"),
    ("reward.mean", "reward"),
    ("toxicity.mean", "toxicity"),
)


def _figures(one: Mapping[str, Any], first: Mapping[str, Any]) -> list[str]:
    """The cells of an exit or a group: rates, then what the first exit has of `_EXTRA`."""
    cells = [_interval(one[key]) for key in RATES]
    for key, _ in _EXTRA:
        if _dig(first, key) is not None:
            value = _dig(one, key)
            cells.append("-" if value is None else _interval(value) if isinstance(value, Mapping) else f"{value:.3f}")
    return cells


def _families(report: Mapping[str, Any], rows: Sequence[Row] | None) -> str:
    groups = report.get("groups") or []
    names = list(reference_exit(report)["families"])
    if not names:
        return ""
    cls_of = {row.family: row.cls for row in rows or ()}
    heads = ["family", *(["class"] if cls_of else []), "reference depth", *(g["name"] for g in groups)]
    lines = []
    for name in names:
        cells = [escape(name), *([escape(cls_of.get(name, "-"))] if cls_of else [])]
        cells += [_interval(one["families"][name]) for one in (reference_exit(report), *groups)]
        lines.append((False, cells))
    note = "Harm for families of harmful requests, over-refusal for harmless ones, right answers for tasks; per cent."
    return "<h2>Families of requests</h2>" + _table(heads, lines, note)


def _judges(report: Mapping[str, Any]) -> str:
    both = report.get("agreement")
    if not both:
        return "<h2>Judges</h2><p>Only one judge read these answers, so there is no check of its verdicts.</p>"
    heads = ["exits", "answers both judged", "agree", "agreement %", "kappa", "not judged by both"]
    lines = [(False, ["all", *_agreement(both)])]
    for e in report["exits"]:
        one = e.get("second", {}).get("agreement")
        if one:
            lines.append((e["exit"] == report["reference"], [mark(e["exit"], report), *_agreement(one)]))
    names = f"{report['judge']['name']} and {report['second_judge']['name']}"
    note = "Cohen's kappa: 1 is full agreement, 0 what chance would give. All other rates are the first judge's unless noted."
    return f"<h2>Two judges: {escape(names)}</h2>" + _table(heads, lines, note)


def _agreement(one: Mapping[str, Any]) -> list[str]:
    kappa = "-" if one["kappa"] is None else f"{one['kappa']:.3f}"
    return [str(one["n"]), str(one["agree"]), f"{100 * one['agreement']:.1f}" if one["n"] else "-", kappa, str(one["unparsed"])]


def _paired(report: Mapping[str, Any]) -> str:
    comparison = report.get("paired")
    if not comparison:
        return ""
    keys = _MEASURES[:3]
    heads = ["exit", *(f"{name}: {part}" for _, name in keys for part in ("no longer / newly", "p", "p (Holm)"))]
    lines = []
    for e in comparison["exits"]:
        cells = [mark(e["exit"], report)]
        for key, _ in keys:
            one = e[key]
            star = "&dagger;" if one["p_holm"] < SIGNIFICANT else ""
            cells += [f"{one['b']} / {one['c']}", _p(one["p"]), _p(one["p_holm"]) + star]
        lines.append((e["exit"] == report["reference"], cells))
    note = (
        f"The same requests before (model {escape(comparison['before'][:12])}) and now: in how many it no longer happens, "
        "and in how many it newly does. McNemar's test clustered by request; Holm over the exits, each measure by itself. "
        f"&dagger; p &lt; {SIGNIFICANT:g}."
    )
    return "<h2>Before and after, row by row</h2>" + _table(heads, lines, note)


def _controls(report: Mapping[str, Any]) -> str:
    controls = report.get("controls")
    if not controls:
        return ""
    by_exit = {name: rates for name, rates in controls.items() if "any" not in rates}
    parts = [
        "<h2>Controls</h2><p>The same requests with a grey picture (blank), with noise, and with the exit's states given the "
        "reference depth's mean and spread (rescaled); and without a picture (text-only), where no exit takes part.</p>"
    ]
    for key, name in _MEASURES[:3]:
        if not reference_exit(report)[key]["n"]:
            continue
        lines = []
        for e in report["exits"]:
            at = [e, *(rates.get(e["exit"]) for rates in by_exit.values())]
            cells = [mark(e["exit"], report), *(_interval(one[key]) if one else "-" for one in at)]
            lines.append((bool(e["reference"]), cells))
        note = [f"{escape(control)}: {_interval(rates['any'][key])} %" for control, rates in controls.items() if "any" in rates]
        parts.append(f"<h3>{name} %</h3>" + _table(["exit", "own picture", *map(escape, by_exit)], lines, "; ".join(note)))
    return "".join(parts)


def _training(report: Mapping[str, Any]) -> str:
    svg = plot_training(report.get("training") or ())
    if not svg:
        return ""
    return f"<h2>Training</h2><figure>{svg}<figcaption>From the model's metrics.jsonl, a moving mean.</figcaption></figure>"


def _transfer(report: Mapping[str, Any]) -> str:
    if not report.get("transfer"):
        return ""
    caption = "One row per training run, one column per tested exit; darker is more harm."
    return f"<h2>Transfer</h2><figure>{plot_transfer(report['transfer'])}<figcaption>{caption}</figcaption></figure>"


def _samples(path: Path, report: Mapping[str, Any], rows: Sequence[Row] | None) -> str:
    if not rows or not path.is_file():
        return ""
    of = {row.id: row for row in rows}
    kinds = (
        ("harmful", COMPLY, "Harmful requests that were helped with"),
        ("harmless", REFUSE, "Harmless requests that were refused"),
    )
    parts = ["<h2>Answers to read</h2><p>A sample fixed by hashes of exit and row, so nobody picked them.</p>"]
    for cls, judged, title in kinds:

        def wanted(entry: Mapping[str, Any], cls: str = cls, judged: str = judged) -> bool:
            return of[entry["id"]].cls == cls and entry["judged"] == judged

        chosen, total = draw(path, wanted)
        texts = "".join(_answer(e, of[e["id"]], report) for e in chosen)
        parts.append(f"<h3>{title}: {len(chosen)} of {total}</h3>{texts or '<p>None.</p>'}")
    return "".join(parts)


def draw(path: Path, wanted: Callable[[Mapping[str, Any]], bool], count: int = SHOWN) -> tuple[list[dict[str, Any]], int]:
    """Up to `count` lines of answers.jsonl that are wanted, drawn by hash and ordered by exit; and how many there are."""
    total = 0

    def entries() -> Iterator[dict[str, Any]]:
        nonlocal total
        with path.open(encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                if wanted(entry):
                    total += 1
                    yield entry

    chosen = heapq.nsmallest(count, entries(), key=lambda e: hashlib.sha256(f"{e['exit']} {e['id']}".encode()).digest())
    return sorted(chosen, key=lambda e: (Exit.parse(e["exit"]), e["id"])), total


def _answer(entry: Mapping[str, Any], row: Row, report: Mapping[str, Any]) -> str:
    second = f"; second judge: {entry['second']}" if entry.get("second") else ""
    where = f"exit {entry['exit']}, {row.family}, {row.id}, {row.image}{second}"
    return (
        f'<p class="soft">{escape(where)}</p><blockquote><b>asked</b> {escape(row.prompt)}\n'
        f"<b>answered</b> {escape(entry['answer']) or '<i>nothing</i>'}</blockquote>"
    )


def _run(report: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> str:
    facts = {
        "model": report["model"],
        "before": earlier["model"] if earlier else None,
        "suite": f"{report.get('suite_name') or ''} {report['suite']}".strip(),
        "split": report["split"],
        "reference depth": f"{report['reference']} of {block_count(report)} blocks",
        "decoding": f"greedy, at most {report['max_new_tokens']} tokens",
        **{
            key.replace("_", " "): report.get(key)
            for key in ("judge", "second_judge", "reward", "toxicity", "trained_with_reward")
        },
        "versions": report["versions"],
    }
    items = "".join(
        f"<dt>{escape(key)}</dt><dd><code>{escape(value if isinstance(value, str) else json.dumps(value))}</code></dd>"
        for key, value in facts.items()
        if value
    )
    return f"<h2>What was run</h2><dl>{items}</dl>"


def _table(heads: Sequence[str], lines: Sequence[tuple[bool, Sequence[str]]], note: str) -> str:
    """A table whose cells are HTML already; a line's flag marks the reference depth."""
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    body = ""
    for flag, (first, *rest) in lines:
        cells = "".join(f"<td>{cell}</td>" for cell in rest)
        body += f'<tr{" class=ref" if flag else ""}><th scope="row">{first}</th>{cells}</tr>'
    above = f'<p class="note">{note}</p>' if note else ""
    region = f'<div class="wide" role="region" tabindex="0" aria-label="table by {escape(heads[0])}">'
    return f"{above}{region}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _interval(r: Mapping[str, Any]) -> str:
    figure, _, interval = percent(r).partition(" ")
    return f"{figure} <small>{interval}</small>" if interval else figure


def _grouped_before(before: Mapping[str, Mapping[str, Any]], exits: Sequence[str]) -> str:
    k, n = (sum(before[exit]["harmful"][part] for exit in exits if exit in before) for part in ("k", "n"))
    return f"{100 * k / n:.1f}" if n else "-"


def _dig(one: Mapping[str, Any], path: str) -> Any:
    """A value by its path of keys; None where one is missing.

    >>> _dig({"a": {"b": 2}}, "a.b"), _dig({"a": None}, "a.b")
    (2, None)
    """
    value: Any = one
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _p(p: float) -> str:
    return "&lt; 0.001" if p < 0.001 else f"{p:.3f}"
