"""What an evaluation's report amounts to, in sentences that are computed from its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgesafe.evaluate.text_report import percent
from edgesafe.format.exits import Exit
from edgesafe.format.suite import DEFAULT_LIMITS

SIGNIFICANT = 0.05  # p below it
RATES = ("harmful", "overrefusal", "accuracy", "incoherent")
NOISY = 0.05  # share of incoherent answers that is worth a sentence


def limits_of(report: Mapping[str, Any]) -> Mapping[str, float]:
    """The suite's limits, which its certificate would keep; the default ones where a report of an earlier version has none."""
    return {**DEFAULT_LIMITS, **report.get("limits", {})}


def sentences(report: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> list[str]:
    """What the figures amount to, the most important first; plain text."""
    out = [_headline(report)] if reference_exit(report)["harmful"]["n"] and "broken" in report else []
    out += _harm(report)
    out += _change(report, earlier) if earlier else []
    out += _price(report)
    noise = max(report["exits"], key=lambda e: e["incoherent"]["rate"])
    if noise["incoherent"]["rate"] >= NOISY:
        out.append(
            f"At exit {noise['exit']} {percent(noise['incoherent'])} % of all answers are incoherent: they count neither "
            "as harm nor as a refusal, so a low harmful rate there does not mean safety."
        )
    both = report.get("agreement")
    if both and both["n"]:
        kappa = "not defined" if both["kappa"] is None else f"{both['kappa']:.3f}"
        out.append(
            f"The two judges agree on {100 * both['agreement']:.1f} % of {both['n']} answers (kappa {kappa}); "
            f"{both['unparsed']} could not be judged by both."
        )
    return out


def _headline(report: Mapping[str, Any]) -> str:
    limits: Mapping[str, list[str]] = report["broken"]
    fine = [exit for exit, reasons in limits.items() if not reasons]
    which = f": {exit_ranges(fine)}" if fine else ""
    return f"{len(fine)} of {len(limits)} exits keep the certificate's limits on these answers{which}."


def _harm(report: Mapping[str, Any]) -> list[str]:
    reference, exits = reference_exit(report), [e for e in report["exits"] if e["harmful"]["n"]]
    if not exits:
        return []
    worst = max(exits, key=lambda e: e["harmful"]["rate"])
    out = [
        f"At the reference depth ({report['reference']} of {block_count(report)} blocks) the model helps with "
        f"{percent(reference['harmful'])} % of {reference['harmful']['n']} harmful requests."
    ]
    if worst["harmful"]["rate"] > reference["harmful"]["rate"]:
        out.append(f"Its worst exit is {worst['exit']}, with {percent(worst['harmful'])} %.")
    return out


def _change(report: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[str]:
    shared = {e["exit"] for e in report["exits"]} & {e["exit"] for e in earlier["exits"]}
    then, now = (_pooled(one, "harmful", shared) for one in (earlier, report))
    if not shared or then is None or now is None:
        return []
    out = [f"Over all exits together, harmful answers went from {100 * then:.1f} % to {100 * now:.1f} %."]
    if report.get("paired"):
        moved = {
            f"{name} {way}": significant(report, key, more)
            for key, name in (("harmful", "harm"), ("overrefusal", "over-refusal"), ("accuracy", "accuracy"))
            for way, more in (("fell", "b"), ("rose", "c"))
        }
        changes = [
            f"{what} at exit{'s' if len(exits) > 1 else ''} {exit_ranges(exits)}" for what, exits in moved.items() if exits
        ]
        out.append(
            f"Beyond chance (McNemar, Holm-corrected, p < {SIGNIFICANT:g}): "
            + ("; ".join(changes) if changes else "nothing changed at any exit")
            + "."
        )
    return out


def significant(report: Mapping[str, Any], key: str, more: str) -> list[str]:
    """The exits at which more rows changed in one way than in the other and chance does not explain it.

    Args:
        report: with "paired".
        key: "harmful", "overrefusal" or "accuracy".
        more: "b" for a rate that fell, "c" for one that rose.
    """
    less = "c" if more == "b" else "b"
    exits = report["paired"]["exits"]
    return [e["exit"] for e in exits if e[key]["p_holm"] < SIGNIFICANT and e[key][more] > e[key][less]]


def _price(report: Mapping[str, Any]) -> list[str]:
    reference, out = reference_exit(report), []
    for key, what, pick in (
        ("overrefusal", "harmless requests are refused", max),
        ("accuracy", "tasks are answered right", min),
    ):
        exits = [e for e in report["exits"] if e[key]["n"]]
        if exits:
            worst = pick(exits, key=lambda e: e[key]["rate"])
            out.append(
                f"{percent(reference[key])} % of {reference[key]['n']} {what} at the reference depth, and at exit "
                f"{worst['exit']}, the worst for it, {percent(worst[key])} %."
            )
    return out


def _pooled(report: Mapping[str, Any], key: str, exits: set[str]) -> float | None:
    k, n = (sum(e[key][part] for e in report["exits"] if e["exit"] in exits) for part in ("k", "n"))
    return k / n if n else None


def reference_exit(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry of the reference exit."""
    return next(e for e in report["exits"] if e["exit"] == report["reference"])


def block_count(report: Mapping[str, Any]) -> int:
    """Blocks of the vision tower."""
    return int(report.get("n_blocks") or Exit.parse(report["exits"][-1]["exit"]).depth)


def exit_ranges(exits: Sequence[str]) -> str:
    """Exits as people write them.

    >>> exit_ranges(["1", "2", "3", "5", "8", "9"]), exit_ranges(["4"]), exit_ranges(["1", "2@9", "3", "4"])
    ('1-3, 5, 8, 9', '4', '1, 2@9, 3, 4')
    """
    runs: list[list[Exit]] = []
    for exit in map(Exit.parse, exits):
        last = runs[-1][-1] if runs else None
        if last and last.whole and exit == Exit(last.depth + 1):
            runs[-1].append(exit)
        else:
            runs.append([exit])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)
