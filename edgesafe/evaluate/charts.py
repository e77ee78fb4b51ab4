"""Plots of an evaluation: SVG text for the report, and plot.png.

An SVG needs nothing from elsewhere, follows light and dark, and can be read without colour. It stands alone as a file or
inside HTML. Lines differ in stroke and marker as well as in colour, every point says its figures in a tooltip, and `<desc>`
says them for those who can't see the plot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from edgesafe.evaluate.sentences import limits_of
from edgesafe.format.exits import Exit

STYLE = """<style>
.es{--ink:#1b1f24;--soft:#57606a;--rule:#d0d7de;--shade:#6e778118;--now:#0b5cad;--then:#a8430a;--paper:#fff;
font-family:system-ui,"DejaVu Sans",sans-serif;font-size:12px}
@media screen and (prefers-color-scheme:dark){.es{--ink:#e6edf3;--soft:#9da7b1;--rule:#3d444d;--shade:#8b949e20;--now:#79b8ff;
--then:#f0a35e;--paper:#0d1117}}
.es text{fill:var(--ink)}.es .soft{fill:var(--soft);font-size:11px}.es .head{font-weight:600;font-size:13px}
.es .rule{stroke:var(--rule);fill:none}.es .mark{stroke:var(--soft);fill:none;stroke-dasharray:2 3}.es .shade{fill:var(--shade)}
.es .now{stroke:var(--now);fill:none;stroke-width:2}.es .then{stroke:var(--then);fill:none;stroke-width:2;stroke-dasharray:6 4}
.es .band.now{fill:var(--now);fill-opacity:.16;stroke:none}.es .band.then{fill:var(--then);fill-opacity:.14;stroke:none}
.es .dot.now{fill:var(--now)}.es .dot.then{fill:var(--paper);stroke-dasharray:none}
</style>"""
MEASURES = (
    ("harmful", "helps with harm"),
    ("overrefusal", "refuses the harmless"),
    ("accuracy", "answers the task right"),
    ("incoherent", "incoherent"),
)
TRAINING = (
    ("loss", "loss"),
    ("exit_score", "reward at the exits"),
    ("reference_score", "reward at the reference depth"),
    ("kl", "KL to the untouched model"),
    ("grad_norm", "gradient norm"),
)
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 380, 230, 38, 46, 12, 36
_CELL_WIDTH, _CELL_HEIGHT = 46, 28

Series = Sequence[tuple[float, float]]


def plot_rates(report: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> str:
    """Harm, over-refusal, accuracy and incoherence over exit depth with 95 % bands, before and after.

    Args:
        report: what `edgesafe.evaluate.evaluate.evaluate` returns.
        earlier: the report of an earlier evaluation, or None.

    Returns:
        One `<svg>`.
    """
    report, earlier = over_depth(report), over_depth(earlier) if earlier else None
    runs = [("then", "before", earlier)] if earlier else []
    runs += [("now", "after" if earlier else "this model", report)]
    panels = []
    for i, (key, title) in enumerate(MEASURES):
        x, y = (i % 2) * _WIDTH, (i // 2) * _HEIGHT + 24
        panels.append(f'<g transform="translate({x} {y})">{_rate_panel(key, title, report, runs)}</g>')
    desc = "; ".join(f"{name}: {_in_words(one)}" for _, name, one in runs if one)
    body = _legend(runs, _harm_limit(report)) + "".join(panels)
    return _svg(2 * _WIDTH, 2 * _HEIGHT + 24, "Rates by exit depth, with 95 % intervals", desc, body)


def over_depth(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report with the exits alone that see all of a picture, which curves over depth are drawn of."""
    return {**report, "exits": [e for e in report["exits"] if Exit.parse(e["exit"]).whole]}


def _harm_limit(report: Mapping[str, Any]) -> float:
    """The most that the suite lets the upper bound of harm be, in per cent."""
    return 100 * limits_of(report)["harmful_upper_95"]


def plot_transfer(transfer: Mapping[str, Any]) -> str:
    """Harm of models trained on some exits, tested on every exit: a heat map with its figures in the cells.

    Args:
        transfer: {"trained": names of the runs, "exits": exits' texts, "harmful": a list of rates 0..1 a run, in the exits'
            order; None where not measured}. A rate may also be a report's {rate, ..}.

    Returns:
        One `<svg>`.

    Raises:
        ValueError: the lists do not fit each other.
    """
    names, exits = list(transfer["trained"]), list(transfer["exits"])
    left = 20 + 7 * max(map(len, names), default=0)
    cells = [f'<text class="soft" x="{left}" y="14">tested at exit depth (harmful answers, %)</text>']
    for j, exit in enumerate(exits):
        cells.append(f'<text x="{left + (j + 0.5) * _CELL_WIDTH:g}" y="34" text-anchor="middle">{escape(str(exit))}</text>')
    lines = []
    for i, (name, rates) in enumerate(zip(names, transfer["harmful"], strict=True)):
        y = 42 + i * _CELL_HEIGHT
        cells.append(f'<text x="{left - 8}" y="{y + 18}" text-anchor="end">{escape(str(name))}</text>')
        figures = []
        for j, (exit, rate) in enumerate(zip(exits, rates, strict=True)):
            value = rate["rate"] if isinstance(rate, Mapping) else rate
            cells.append(_cell(left + j * _CELL_WIDTH, y, value, f"{name}, exit {exit}"))
            figures.append(f"{exit} {_number(value)}")
        lines.append(f"{name}: " + ", ".join(figures))
    size = (left + len(exits) * _CELL_WIDTH + 10, 52 + len(names) * _CELL_HEIGHT)
    return _svg(*size, "Transfer between exit depths", "; ".join(lines), "".join(cells))


def plot_training(lines: Sequence[Mapping[str, Any]]) -> str:
    """Every figure of a run's metrics.jsonl that people read, over the updates.

    Args:
        lines: {update, and any of `TRAINING` and eval: {exit: {harmful, overrefusal, accuracy: rates 0..1}}}, in order.
            Of an update's own figures a moving mean is drawn, over a fortieth of the updates; of a validation pass the mean
            over the exits that it answered from.

    Returns:
        One `<svg>`; empty text where there are not two finite values of any of them.
    """
    drawn: list[tuple[str, list[tuple[float, float]]]] = []
    for key, title in TRAINING:
        points = _finite((e.get("update"), e.get(key)) for e in lines)
        drawn.append((title, smooth(points, max(1, len(points) // 40))))
    for key, title in MEASURES[:3]:
        points = _finite((e.get("update"), _mean_of_exits(e["eval"], key)) for e in lines if e.get("eval"))
        drawn.append((f"validation: {title}, mean of exits (%)", points))
    drawn = [(title, points) for title, points in drawn if len(points) > 1]
    if not drawn:
        return ""
    panels = []
    for i, (title, points) in enumerate(drawn):
        x, y = (i % 2) * _WIDTH, (i // 2) * _HEIGHT
        panels.append(f'<g transform="translate({x} {y})">{_line_panel(title, points)}</g>')
    desc = "; ".join(f"{title} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for title, points in drawn)
    return _svg(2 * _WIDTH, (len(panels) + 1) // 2 * _HEIGHT, "Training", desc, "".join(panels))


def _finite(points: Iterable[tuple[Any, Any]]) -> list[tuple[float, float]]:
    """The points whose both values are finite numbers: a metrics file may be of any make."""
    fine = ((x, y) for x, y in points if isinstance(x, int | float) and isinstance(y, int | float))
    return [(float(x), float(y)) for x, y in fine if math.isfinite(x) and math.isfinite(y)]


def _mean_of_exits(rates_of: Mapping[str, Mapping[str, float]], key: str) -> float | None:
    rates = [one[key] for one in rates_of.values() if key in one]
    return 100 * sum(rates) / len(rates) if rates else None


def smooth(points: Series, window: int) -> list[tuple[float, float]]:
    """The mean of each point and up to `window` - 1 before it.

    >>> smooth([(0, 2.0), (1, 4.0), (2, 9.0)], 2)
    [(0, 2.0), (1, 3.0), (2, 6.5)]
    """
    out = []
    for i, (x, _) in enumerate(points):
        part = [y for _, y in points[max(0, i + 1 - window) : i + 1]]
        out.append((x, sum(part) / len(part)))
    return out


def _svg(width: float, height: float, title: str, desc: str, body: str) -> str:
    return (
        f'<svg class="es" xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {width:g} {height:g}" '
        f'style="width:100%;max-width:{width:g}px;height:auto">'
        f"<title>{escape(title)}</title><desc>{escape(desc)}</desc>{STYLE}{body}</svg>"
    )


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Values from low..high to places from start..end; the middle where low is high."""
    if high <= low:
        return lambda _: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _rate_panel(key: str, title: str, report: Mapping[str, Any], runs: Sequence[tuple[str, str, Any]]) -> str:
    depths = sorted({_depth(e["exit"]) for _, _, one in runs for e in one["exits"]})
    x = _scale(depths[0], depths[-1], _LEFT + 8, _WIDTH - _RIGHT - 8)
    y = _scale(0, 100, _HEIGHT - _BOTTOM, _TOP)
    parts = [f'<text class="head" x="{_LEFT}" y="16">{escape(title)} (%)</text>', _shades(report, x)]
    for tick in (0, 25, 50, 75, 100):
        parts.append(f'<path class="rule" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="soft" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    step = max(1, -(-len(depths) // 14))
    for depth in depths[::step]:
        place = f'x="{x(depth):.1f}" y="{_HEIGHT - _BOTTOM + 14}"'
        parts.append(f'<text class="soft" {place} text-anchor="middle">{depth}</text>')
    parts.append(f'<text class="soft" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end">exit depth (blocks run)</text>')
    at = x(_depth(report["reference"]))
    parts.append(f'<path class="mark" d="M{at:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"><title>reference depth</title></path>')
    if key == "harmful":
        limit = _harm_limit(report)
        title = f"<title>limit of the upper bound: {limit:g} %</title>"
        parts.append(f'<path class="mark" d="M{_LEFT} {y(limit):.1f}H{_WIDTH - _RIGHT}">{title}</path>')
    drawn = [_rate_line(kind, name, one, key, x, y) for kind, name, one in runs]
    if not any(drawn):
        parts.append(f'<text class="soft" x="{_LEFT + 12}" y="{y(50) + 4:.1f}">the suite has no such rows</text>')
    return "".join(parts + drawn)


def _rate_line(
    kind: str, name: str, one: Mapping[str, Any], key: str, x: Callable[[float], float], y: Callable[[float], float]
) -> str:
    exits = [e for e in one["exits"] if e[key]["n"]]  # what was not counted has no place
    if not exits:
        return ""
    points = [(x(_depth(e["exit"])), y(100 * e[key]["rate"])) for e in exits]
    upper = [(x(_depth(e["exit"])), y(100 * e[key]["upper_95"])) for e in exits]
    lower = [(x(_depth(e["exit"])), y(100 * e[key]["lower_95"])) for e in exits]
    out = [
        f'<path class="band {kind}" d="{_path([*upper, *reversed(lower)])}Z"/>',
        f'<path class="{kind}" d="{_path(points)}"/>',
    ]
    for (px, py), e in zip(points, exits, strict=True):
        r = e[key]
        text = f"{name}, exit {e['exit']}: {100 * r['rate']:.1f} % [{100 * r['lower_95']:.1f}-{100 * r['upper_95']:.1f}]"
        out.append(_dot(kind, px, py, f"{text}, {r['k']} of {r['n']}"))
    return "".join(out)


def _dot(kind: str, x: float, y: float, tooltip: str = "") -> str:
    """A filled circle for now, a hollow square for then."""
    title = f"<title>{escape(tooltip)}</title>"
    if kind == "now":
        return f'<circle class="dot now" cx="{x:.1f}" cy="{y:.1f}" r="2.6">{title}</circle>'
    return f'<rect class="dot then" x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6">{title}</rect>'


def _shades(report: Mapping[str, Any], x: Callable[[float], float]) -> str:
    """Names of the groups of exits over the panel, every second group shaded."""
    groups = [g for g in report.get("groups", ()) if g["name"] != "all" and g["exits"]]
    out, start = [], float(_LEFT)
    for i, group in enumerate(groups):
        last = i + 1 == len(groups)
        end = _WIDTH - _RIGHT if last else (x(_depth(group["exits"][-1])) + x(_depth(groups[i + 1]["exits"][0]))) / 2
        if i % 2:
            size = f'width="{end - start:.1f}" height="{_HEIGHT - _TOP - _BOTTOM}"'
            out.append(f'<rect class="shade" x="{start:.1f}" y="{_TOP}" {size}/>')
        middle = (start + end) / 2
        out.append(f'<text class="soft" x="{middle:.1f}" y="{_TOP - 8}" text-anchor="middle">{escape(group["name"])}</text>')
        start = end
    return "".join(out)


def _legend(runs: Sequence[tuple[str, str, Any]], limit: float) -> str:
    out, x = [], _LEFT
    for kind, name, _ in runs:
        out.append(f'<path class="{kind}" d="M{x} 10h34"/>{_dot(kind, x + 17, 10, name)}')
        out.append(f'<text x="{x + 42}" y="14">{escape(name)}</text>')
        x += 70 + 8 * len(name)
    text = f"reference depth; flat: {limit:g} % limit"
    out.append(f'<path class="mark" d="M{x} 3v14"/><text class="soft" x="{x + 8}" y="14">{text}</text>')
    return "".join(out)


def _line_panel(title: str, points: Series) -> str:
    values = [value for _, value in points]
    low, high = min(0.0, *values), max(values)
    x = _scale(points[0][0], points[-1][0], _LEFT + 16, _WIDTH - _RIGHT - 8)
    y = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts = [f'<text class="head" x="{_LEFT}" y="16">{escape(title)}</text>']
    for tick in (low, (low + high) / 2, high):
        parts.append(f'<path class="rule" d="M{_LEFT + 8} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="soft" x="{_LEFT + 4}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for update, anchor in ((points[0][0], "start"), (points[-1][0], "end")):
        place = f'x="{x(update):.1f}" y="{_HEIGHT - _BOTTOM + 16}"'
        parts.append(f'<text class="soft" {place} text-anchor="{anchor}">update {update:g}</text>')
    parts.append(f'<path class="now" d="{_path([(x(a), y(b)) for a, b in points])}"/>')
    return "".join(parts)


def _path(points: Series) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def shade(share: float) -> tuple[str, str]:
    """The ground from white (0) to dark blue (1) and an ink that shows on it, in light and dark alike, as CSS colours.

    >>> shade(0.0), shade(1.0)
    (('rgb(255,255,255)', '#000'), ('rgb(8,48,107)', '#fff'))
    """
    share = min(1.0, max(0.0, share))
    red, green, blue = (round(255 + (dark - 255) * share) for dark in (8, 48, 107))
    return f"rgb({red},{green},{blue})", "#fff" if share > 0.655 else "#000"  # where the two contrast alike, 4.6 : 1


def _cell(x: float, y: float, value: float | None, name: str) -> str:
    """A cell with its figure."""
    ground, ink = shade(value or 0.0)
    box = f'x="{x:g}" y="{y:g}" width="{_CELL_WIDTH - 2}" height="{_CELL_HEIGHT - 2}"'
    return (
        f'<g><title>{escape(name)}: {_number(value)} %</title><rect class="rule" {box} style="fill:{ground}"/>'
        f'<text x="{x + _CELL_WIDTH / 2 - 1:g}" y="{y + 17:g}" text-anchor="middle" style="fill:{ink}">'
        f"{_number(value)}</text></g>"
    )


def _depth(exit: str) -> int:
    return Exit.parse(exit).depth


def _number(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _in_words(report: Mapping[str, Any]) -> str:
    return ". ".join(
        f"{title}, % by exit: " + ", ".join(f"{e['exit']} {_number(e[key]['rate'])}" for e in report["exits"])
        for key, title in MEASURES
    )


def save_plot(report: Mapping[str, Any], before: Mapping[str, Any] | None, path: Path) -> None:
    """harmful_rate and accuracy over exit depth with 95 % bands, before and after, as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    report, before = over_depth(report), over_depth(before) if before else None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    titles = {"harmful": "helps with harm (%)", "accuracy": "answers the task right (%)"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for name, colour, one in (("before", "#c0392b", before), ("after" if before else "model", "#1f6fb4", report)):
            if one is None:
                continue
            x = [_depth(e["exit"]) for e in one["exits"]]
            rate, lower, upper = ([100 * e[key][part] for e in one["exits"]] for part in ("rate", "lower_95", "upper_95"))
            axis.plot(x, rate, "o-", color=colour, label=name, ms=3.5)
            axis.fill_between(x, lower, upper, color=colour, alpha=0.18, lw=0)
        axis.axvline(_depth(report["reference"]), color="#888", ls=":", lw=1)
        axis.set(xlabel="exit depth (vision blocks run)", title=title, ylim=(-2, 102))
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
