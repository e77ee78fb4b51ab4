"""An evaluation over depth and visual tokens or tiles at once: tables with a figure on coloured ground for each exit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

from edgesafe.certify.verdict import MISTAKEN, NAMED, OTHER
from edgesafe.evaluate.charts import shade
from edgesafe.format.exits import Exit
from edgesafe.format.suite import Row

# A rate 0..1 of an exit's entry in the report; None where nothing was counted.
Figure = Callable[[Mapping[str, Any]], float | None]
_KINDS = {NAMED: "for the danger that was asked for", MISTAKEN: "for something else", OTHER: "for what the answer doesn't name"}


def see_less(report: Mapping[str, Any]) -> bool:
    """Whether some of its exits have fewer visual tokens or tiles than others."""
    return len({Exit.parse(e["exit"]).fewer for e in report["exits"]}) > 1


def heat_maps(report: Mapping[str, Any], earlier: Mapping[str, Any] | None, rows: Sequence[Row] | None) -> str:
    """A map for each kind of harm, over-refusal, accuracy and each family of tasks, before and after.

    Args:
        report: what `edgesafe.evaluate.evaluate.evaluate` returns.
        earlier: the report of an earlier evaluation, or None.
        rows: the suite's, which say what families are tasks.

    Returns:
        A section of HTML; empty text where all exits see as much.
    """
    if not see_less(report):
        return ""
    runs = [("before", earlier), ("after", report)] if earlier else [("", report)]
    exits = sorted({Exit.parse(e["exit"]) for _, one in runs for e in one["exits"]})
    parts = [
        "<h2>Over depth and what is seen of a picture</h2>",
        '<p class="note">Per cent; darker is more. * is the reference, - is no such exit, or nothing counted. Harm is a share '
        "of all harmful requests, told apart by what the answer names; all three kinds count as harm. The table of every exit "
        "has intervals.</p>",
    ]
    for title, figure in _figures(rows):
        tables = "".join(_map(f"{title}{name and ', '}{name}", one, exits, figure) for name, one in runs)
        parts.append(f'<h3>{escape(title)}</h3><div class="maps">{tables}</div>')
    return "".join(parts)


def _figures(rows: Sequence[Row] | None) -> Iterator[tuple[str, Figure]]:
    for kind, words in _KINDS.items():
        yield f"Helps with harm: {words}", partial(_harm, kind)
    yield "Refuses the harmless", partial(_rate, "overrefusal")
    yield "Answers the task right", partial(_rate, "accuracy")
    tasks = dict.fromkeys(row.family for row in rows or () if row.cls == "task")
    for family in tasks if len(tasks) > 1 else ():
        yield f"Answers the task right: {family}", partial(_family, family)


def _harm(kind: str, e: Mapping[str, Any]) -> float | None:
    count, of = e.get("kinds", {}).get(kind), e["harmful"]["n"]  # an earlier edgesafe didn't tell them apart
    return None if count is None or not of else count / of


def _rate(key: str, e: Mapping[str, Any]) -> float | None:
    return e[key]["rate"] if e[key]["n"] else None


def _family(name: str, e: Mapping[str, Any]) -> float | None:
    return _rate(name, e["families"]) if name in e["families"] else None


def _map(caption: str, report: Mapping[str, Any], exits: Sequence[Exit], figure: Figure) -> str:
    """One table: a column for each depth and a row for each number of visual tokens or tiles, all of them first."""
    of = {e["exit"]: e for e in report["exits"]}
    kind = "tiles" if any(exit.tiles for exit in exits) else "visual tokens"
    by_place = {(exit.fewer, exit.depth): str(exit) for exit in exits}
    depths = sorted({exit.depth for exit in exits})
    counts = sorted({exit.fewer for exit in exits}, key=lambda count: -count if count else float("-inf"))
    head = "".join(f'<th scope="col">{depth}</th>' for depth in depths)
    body = ""
    for count in counts:
        cells = "".join(_cell(by_place.get((count, depth), ""), of, figure, report["reference"]) for depth in depths)
        body += f'<tr><th scope="row">{count or "all"}</th>{cells}</tr>'
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}"><table class="heat"><caption>'
        f'{escape(caption)}</caption><thead><tr><th scope="col">{kind} \\ depth</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(exit: str, of: Mapping[str, Mapping[str, Any]], figure: Figure, reference: str) -> str:
    value = figure(of[exit]) if exit in of else None
    if value is None:
        return "<td>-</td>"
    ground, ink = shade(value)
    return f'<td style="background:{ground};color:{ink}">{100 * value:.1f}{"*" if exit == reference else ""}</td>'
