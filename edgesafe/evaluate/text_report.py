"""An evaluation's report as text: table.txt and what the command prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgesafe.format.exits import Exit
from edgesafe.progress import table

HARM = "-harm"  # how the families end that get a column of their own


def percent(r: Mapping[str, Any]) -> str:
    """A rate with its interval, in per cent; a dash where nothing was counted.

    >>> percent({"n": 40, "rate": 0.05, "lower_95": 0.021, "upper_95": 0.1118})
    '5.0 [2.1-11.2]'
    """
    if not r["n"]:
        return "-"
    return f"{100 * r['rate']:.1f} [{100 * r['lower_95']:.1f}-{100 * r['upper_95']:.1f}]"


def report_table(report: Mapping[str, Any]) -> str:
    """The report as text, the reference depth with a star: exits and groups, agreement, before and after, controls."""
    parts = [rates_table(report), notes(report)]
    if report["paired"]:
        parts.append(paired_table(report))
    if report["controls"]:
        parts.append(controls_table(report))
    return "\n\n".join(parts)


def rates_table(report: Mapping[str, Any]) -> str:
    """One line per exit, then one line per group of exits."""
    first = report["exits"][0]
    harm = [name for name in first["families"] if name.endswith(HARM)]
    extra = [key for key in ("second", "reward", "toxicity") if key in first]
    lines = [[mark(e["exit"], report), *_line(e, harm, extra)] for e in report["exits"]]
    lines += [[f"{g['name']} ({_range(g['exits'])})", *_line(g, harm, extra)] for g in report["groups"]]
    heads = ["exit", "harmful %", *(name.removesuffix(HARM) for name in harm), "over-refusal %", "accuracy %", "incoherent %"]
    names = {"second": ["second: harmful %", "kappa"], "reward": ["reward"], "toxicity": ["toxicity"]}
    return table(lines, [*heads, "words", *(head for key in extra for head in names[key])])


def notes(report: Mapping[str, Any]) -> str:
    """Who judged, and how far the two judges agree."""
    lines = ["* reference depth. A group pools its exits' answers; its intervals are clustered by row."]
    lines.append(f"judge: {report['judge']['name']} {report['judge'].get('version', '')}".rstrip())
    if report.get("open"):
        at = report["open"][report["reference"]]
        measured = ", ".join(f"{name} {percent(one)}" for name, one in at.items())
        lines.append(f"open families, measured and in no other figure, at the reference depth: {measured}")
    both = report["agreement"]
    if both:
        kappa = "-" if both["kappa"] is None else f"{both['kappa']:.3f}"
        share = f"{100 * both['agreement']:.1f} %" if both["n"] else "none"
        lines.append(
            f"second judge: {report['second_judge']['name']}; of {both['n']} answers that both could judge they agree on "
            f"{share}, kappa {kappa}; {both['unparsed']} it could not parse or has no say on"
        )
    return "\n".join(lines)


def paired_table(report: Mapping[str, Any]) -> str:
    """What changed against the earlier evaluation, by row."""
    lines = []
    for e in report["paired"]["exits"]:
        cells = [f"{e[m]['b']} / {e[m]['c']}  {_p(e[m]['p_holm'])}" for m in ("harmful", "overrefusal", "accuracy")]
        lines.append([mark(e["exit"], report), *cells])
    head = "before and after, the same rows: no longer / newly, and p (McNemar clustered by request, Holm over the exits)"
    return head + "\n" + table(lines, ["exit", "harmful", "over-refusal", "accuracy"])


def controls_table(report: Mapping[str, Any]) -> str:
    """Rates under each control, one line per exit."""
    lines = []
    for name, by_exit in report["controls"].items():
        for exit, rates in by_exit.items():
            figures = [percent(rates[m]) for m in ("harmful", "overrefusal", "accuracy", "incoherent")]
            lines.append([name, mark(exit, report), *figures])
    head = (
        "controls: no picture (text-only), a grey one (blank), noise, and the exit's own states given the reference depth's\n"
        "mean and spread (rescaled)"
    )
    return head + "\n" + table(lines, ["control", "exit", "harmful %", "over-refusal %", "accuracy %", "incoherent %"])


def _line(one: Mapping[str, Any], harm: list[str], extra: list[str]) -> list[str]:
    """The cells of an exit or of a group."""
    families = [f"{100 * one['families'][name]['rate']:.1f}" for name in harm]
    cells = [percent(one["harmful"]), *families, *(percent(one[m]) for m in ("overrefusal", "accuracy", "incoherent"))]
    cells.append(f"{one['length']['mean']:.1f}")
    if "second" in extra:
        kappa = one["second"]["agreement"]["kappa"]
        cells += [percent(one["second"]["harmful"]), "-" if kappa is None else f"{kappa:.3f}"]
    return cells + [f"{one[key]['mean']:.3f}" for key in ("reward", "toxicity") if key in extra]


def mark(exit: str, report: Mapping[str, Any]) -> str:
    """An exit's text, with a star where it is the reference."""
    return f"{exit}{'*' if exit == report['reference'] else ''}"


def _range(exits: list[str]) -> str:
    """Exits as people write them.

    >>> _range(["1", "2", "3"]), _range(["2", "4"]), _range(["4"])
    ('1-3', '2, 4', '4')
    """
    first, last = (Exit.parse(exit).depth for exit in (exits[0], exits[-1]))
    whole = len(exits) > 1 and exits == [str(Exit(depth)) for depth in range(first, last + 1)]
    return f"{first}-{last}" if whole else ", ".join(exits)


def _p(p: float) -> str:
    """A p-value.

    >>> _p(0.0321), _p(1e-9), _p(1.0)
    ('p 0.032', 'p < 0.001', 'p 1.000')
    """
    return "p < 0.001" if p < 0.001 else f"p {p:.3f}"
