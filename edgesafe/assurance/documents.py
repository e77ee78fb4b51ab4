"""The test record as CSV and the model card as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence

from edgesafe.assurance.facts import Facts, Measured
from edgesafe.assurance.safety_case import left_open
from edgesafe.format.certificate import Check, ExitVerdict, Rate, statement

COLUMNS = (
    *("exit", "verdict", "family", "class", "measure", "k", "n", "rate", "lower_95", "upper_95"),
    *("check", "test", "check_k", "check_n", "effective", "bound", "limit", "kept"),
)


def record_csv(
    verdicts: Sequence[ExitVerdict], families: Iterable[Measured], name: Callable[[ExitVerdict], object] = lambda one: one.exit
) -> str:
    """One line per exit and family, then one per exit and check of no single family. Rates and bounds are 0..1.

    Args:
        verdicts: the exits'.
        families: each exit's rates by family.
        name: what stands in the column `exit`.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    told = set()
    for one in families:
        rate = [one.rate.k, one.rate.n, one.rate.rate, one.rate.lower_95, one.rate.upper_95]
        writer.writerow([name(one.exit), one.exit.verdict, one.family, one.cls, one.measure, *rate, *_cells(one.check)])
        told.add((name(one.exit), one.check.name if one.check else ""))
    for exit in verdicts:
        for check in exit.checks:
            if (name(exit), check.name) not in told:
                writer.writerow([name(exit), exit.verdict, *[""] * 8, *_cells(check)])
    return file.getvalue()


def _cells(check: Check | None) -> list[object]:
    if check is None:
        return [""] * 8
    return [check.name, check.test, check.k, check.n, check.effective, check.bound, check.limit, "yes" if check.kept else "no"]


def model_card(facts: Facts, title: str = "", record: str = "test-record.csv") -> str:
    """What the model is, was measured to do, and was not measured to do; unknown where the bundle doesn't say.

    ``title`` heads it in the model's own name's place; ``record`` is the file beside it that has the verdict's bounds.
    """
    manifest, certificate = facts.manifest, facts.certificate
    lines = [f"# {title or manifest.name}", "", statement(certificate) or "No exit is certified under the present verdict.", ""]
    lines += ["## Model", "", *table(("what", "value"), _facts(facts)), "", "## Exits", ""]
    rates = ("harmful", "overrefusal", "incoherent", "accuracy")
    rows = [[str(one.exit), one.verdict, *(percent(getattr(one, name)) for name in rates)] for one in certificate.exits]
    lines += table(("exit", "verdict", "harmful", "over-refusal", "incoherent", "accuracy"), rows)
    lines += ["", "Rates in per cent with Wilson's 95 % interval, k of n. The verdict is made of other, one-sided bounds: see"]
    lines += [f"`{record}`.", "", "## Scope", "", "The verdicts hold for answers made like this:", ""]
    lines += table(("what", "value"), [[key, value] for key, value in facts.scope().items()])
    lines += ["", facts.requests()] if facts.requests() else []
    lines += ["", "## Not covered", "", *(f"- {what}" for what in left_open(facts.certificate.left_open))]
    lines += ["- Intended users and uses, licence and energy use are unknown: the bundle does not record them."]
    return "\n".join(lines) + "\n"


def _facts(facts: Facts) -> list[list[str]]:
    manifest = facts.manifest
    schemes = ", ".join(f"{side} {scheme}" for side, scheme in manifest.quantization.items())
    method = (facts.training or {}).get("config", {})
    trained = method.get("method", "unknown") if isinstance(method, dict) else "unknown"
    return [
        ["bundle digest", facts.bundle.digest],
        ["family", manifest.family],
        ["device", manifest.device],
        ["made from", f"{manifest.parent.name} ({manifest.parent.digest})"],
        ["retrained from", facts.untouched or "unknown, or not retrained"],
        ["retrained by", str(trained)],
        ["quantization", schemes],
        ["suite", f"{facts.suite.name or 'unknown'}, {len(facts.suite.rows)} rows ({facts.suite.digest})"],
        ["created", manifest.created or "unknown"],
        ["versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()) or "unknown"],
    ]


def percent(rate: Rate) -> str:
    """A rate in per cent with its interval, and k of n."""
    low, high = 100 * rate.lower_95, 100 * rate.upper_95
    return f"{100 * rate.rate:.1f} [{low:.1f}, {high:.1f}], {rate.k} of {rate.n}"


def table(headers: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (list(headers), ["---"] * len(headers), *cells)]
