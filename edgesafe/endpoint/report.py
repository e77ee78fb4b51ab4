"""What a run through an endpoint found: as text, as JSON, and in one sentence that claims no more than was seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgesafe.certify.string_judge import JUDGE
from edgesafe.endpoint.guard import guard_lines
from edgesafe.endpoint.kept import Kept
from edgesafe.endpoint.reply import FILTERED
from edgesafe.format.certificate import PASSED, ExitVerdict, Rate
from edgesafe.format.suite import Row, Suite
from edgesafe.progress import table

RATES = {"harmful": "harmful", "overrefusal": "over-refusal", "incoherent": "incoherent", "accuracy": "accuracy"}
UNSEEN = (
    "The model's bytes were not seen: this is about what the server answered then, whoever runs it may change the model at any "
    "time, and it says nothing of any file."
)


@dataclass(frozen=True)
class Report:
    """A finished run, judged.

    ``subject`` is who answered and ``request`` what was sent beside the rows, both as run.json has them. ``kept`` are the
    answers in the order of ``rows``. ``untested`` names classes that the rows leave out. Of the answers so many as
    ``identical`` are those of an earlier certificate, and ``shows`` says what that shows. Both are empty without one.
    ``guard`` is what a second judge said (`edgesafe.endpoint.guard.Second`).
    """

    what: str
    subject: dict[str, Any]
    request: dict[str, Any]
    suite: Suite
    rows: tuple[Row, ...]
    kept: tuple[Kept, ...]
    verdict: ExitVerdict
    untested: tuple[str, ...]
    identical: int | None = None
    shows: tuple[str, ...] = ()
    guard: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        """Whether the verdict is passed."""
        return self.verdict.verdict == PASSED

    @property
    def asked(self) -> dict[str, str]:
        """When the first and the last answer came, UTC."""
        times = sorted(one.at for one in self.kept)
        return {"from": times[0], "to": times[-1]}

    @property
    def counts(self) -> dict[str, int]:
        """Answers; those cut at their longest length, stopped by a content filter, or empty; tokens as the server counts."""
        return {
            "answers": len(self.kept),
            "cut": sum(one.finish == "length" for one in self.kept),
            "filtered": sum(one.finish == FILTERED for one in self.kept),
            "empty": sum(not one.answer.strip() for one in self.kept),
            "prompt_tokens": sum(one.prompt_tokens or 0 for one in self.kept),
            "completion_tokens": sum(one.completion_tokens or 0 for one in self.kept),
        }

    def statement(self) -> str:
        """What the run shows, in sentences: of a certification that passed a bound, and of any that no bytes were seen."""
        if self.what != "certify" or not self.passed:
            return UNSEEN
        bound, who = 100 * self.verdict.checks[0].bound, f"{self.subject['model']} at {self.subject['url']}"
        left_open = f" Not certified: {', '.join(self.suite.left_open)}." if self.suite.left_open else ""
        return (
            f"With 95 % confidence, at most {bound:.1f} % of harmful requests drawn as the suite draws them were helped by "
            f"{who} between {self.asked['from']} and {self.asked['to']}.{left_open} {UNSEEN}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; rates as in a bundle's certificate."""
        verdict = {name: value for name, value in self.verdict.to_dict().items() if name != "exit"}
        return {
            "passed": self.passed,
            "what": self.what,
            "bytes_seen": False,
            "statement": self.statement(),
            "subject": self.subject,
            "request": self.request,
            "asked": self.asked,
            "counts": self.counts,
            "suite": {"digest": self.suite.digest, "name": self.suite.name, "split": self.suite.split},
            "left_open": list(self.suite.left_open),
            "untested": list(self.untested),
            "limits": dict(self.suite.limits),
            **verdict,
            "identical": self.identical,
            "shows": list(self.shows),
            **({"guard": self.guard} if self.guard else {}),
        }

    def text(self) -> str:
        """The rates, whatever broke a limit, and what all of it is about."""
        verdict, counts = self.verdict, self.counts
        lines = [[title, *cells(getattr(verdict, name))] for name, title in RATES.items() if getattr(verdict, name).n]
        parts = [
            table(lines, ["", "of", "%", "95 % interval"]),
            "",
            f"{verdict.verdict}: {'; '.join(verdict.reasons) or 'nothing speaks against the limits'}",
            f"judge: {JUDGE['name']} {JUDGE['version']}",
        ]
        parts += guard_lines(self.guard) if self.guard else []
        parts += [f"not tested: {', '.join(self.untested)} rows, of which the suite has none"] if self.untested else []
        odd = "".join(f", {counts[name]} {name}" for name in ("cut", "filtered", "empty") if counts[name])
        parts.append(f"{counts['answers']} answers{odd}; {counts['completion_tokens']:,} tokens")
        if self.identical is not None:
            parts += [f"identical answers on {self.identical} of {len(self.rows)}", *self.shows]
        if len(self.subject["answered_as"]) > 1 or len(self.subject["fingerprints"]) > 1:
            several = self.subject["answered_as"] + self.subject["fingerprints"]
            parts.append(f"the server changed meanwhile, or is several: {', '.join(several)}")
        return "\n".join([*parts, self.statement()])


def cells(rate: Rate) -> tuple[str, str, str]:
    """A rate as k/n, per cent and its interval.

    >>> cells(Rate(1, 40, 0.025, 0.0044, 0.1288))
    ('1/40', '2.5', '0.4 to 12.9')
    """
    return f"{rate.k}/{rate.n}", f"{100 * rate.rate:.1f}", f"{100 * rate.lower_95:.1f} to {100 * rate.upper_95:.1f}"
