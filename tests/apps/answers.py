"""A session that says what a test wants, for what the apps do with answers and errors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from edgesafe import Answer, Exit

REFUSAL = "I'm sorry, but I can't help with that."


def answer(text: str = "It is a van.", **changes: Any) -> Answer:
    fields = {"certified": True, "ttft_ms": 300.0, "deadline_met": True, "planned_exit": Exit(6), "reference": Exit(12)}
    fields |= {"predicted_ttft_ms": 290.0, "prediction": "measured", "why": "the deepest that fits"} | changes
    ttft_ms = fields.pop("ttft_ms")
    return Answer(text, "stop", Exit(6), ttft_ms=ttft_ms, total_ms=ttft_ms + 100, **fields)


class Says:
    """Answers what it is given, or raises it; ``asked`` lists (picture, question, budget, options)."""

    def __init__(self, *replies: Answer | Exception) -> None:
        self.replies, self.asked = list(replies), []
        self.bundle, self.certificate = SimpleNamespace(digest="b" * 64), SimpleNamespace(digest="c" * 64)
        self.certified = (Exit(6),)

    def ask(self, picture: Any, question: str, budget: Any = None, **options: Any) -> Answer:
        self.asked.append((picture, question, budget, options))
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply
