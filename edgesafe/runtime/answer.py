"""An answer and all that is known about how it came about."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Answer:
    """What was said and how.

    ``finish_reason`` is ``stop`` (the model ended), ``length`` or ``deadline`` (cut before the budget's
    ``total_ms``). Times are ms from the call. ``prediction`` says what ``predicted_ttft_ms`` rests on
    (``measured``, ``estimated``, or ``none`` with None). ``note`` is empty or says what the caller should know.
    ``why`` tells why this exit, ``planned_depth`` which one the budget was predicted to allow before any ran, and
    ``deadline_met`` whether its times were kept; both are None without a budget. ``predicted_ms`` and
    ``actual_ms`` are by stage: ``preprocess``, the vision graphs, ``prefill`` and ``decode`` (predicted: one
    token's; actual: all of them), and the actual ones begin with ``wait``, the time until it was this ask's turn. The
    predicted ones are medians, corrected by what was known then, so they don't add up to ``predicted_ttft_ms``, which is
    at the budget's quantile; both leave out the waiting.
    """

    text: str
    finish_reason: str
    exit_depth: int
    certified: bool
    predicted_ttft_ms: float | None
    prediction: str
    ttft_ms: float
    total_ms: float
    note: str = ""
    why: str = ""
    planned_depth: int | None = None
    deadline_met: bool | None = None
    predicted_ms: dict[str, float] = field(default_factory=dict)
    actual_ms: dict[str, float] = field(default_factory=dict)
