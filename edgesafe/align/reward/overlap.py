"""What an answer is worth to `l-ppo` and `l-dpo`.

A reward is never a judge: nothing in `edgesafe.certify` or `edgesafe.evaluate` imports this.

A reward is called with rows and their answers and gives one number per answer; +1 is the best.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from edgesafe.format.suite import Row

_WORD = re.compile(r"\w+(?:'\w+)?")


class Reward(Protocol):
    """What `l-ppo` maximises. `identity` goes into the record, so that an evaluation can refuse it as a judge."""

    @property
    def name(self) -> str:
        """What records and tables call it."""

    @property
    def identity(self) -> dict[str, Any]:
        """What it is made from."""

    def __call__(self, rows: Sequence[Row], answers: Sequence[str]) -> list[float]:
        """The reward of each answer."""


def word_f1(answer: str, wanted: str) -> float:
    """Harmonic mean of the precision and recall of an answer's words, repeats counted, order and case ignored.

    Source: the token F1 of SQuAD, Rajpurkar et al. 2016 (1606.05250).

    >>> word_f1("It is a red pen.", "It is a pen."), word_f1("", "It is a pen.")  # 2 * (4/5) * 1 / (4/5 + 1)
    (0.8888888888888888, 0.0)
    """
    given, want = (Counter(_WORD.findall(text.lower())) for text in (answer, wanted))
    common = sum((given & want).values())
    return 2 * common / (given.total() + want.total()) if common else 0.0


@dataclass(frozen=True)
class TargetReward:
    """Agreement with the row's wanted answer: 1 - (1 - F1) (1 + w).

    w is `harmlessness` on harmful rows and `helpfulness` on others. So the wanted answer earns 1, and one without a word of it
    -w. A wrong object in an otherwise right answer loses little; a refusal of a harmless request loses nearly all. Where a
    share h of what looks alike is harmful, refusing beats helping from h = (1 + helpfulness) / (2 + harmlessness + helpfulness)
    up. So refusing everything loses wherever the exit can tell.

    Why word overlap: it is graded, needs no model, and is neither of the two judges (a phrase list, a grammar).
    """

    harmlessness: float = 5.0
    helpfulness: float = 1.0
    name: str = "word-f1"
    identity: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        balance = {"harmlessness": self.harmlessness, "helpfulness": self.helpfulness}
        object.__setattr__(self, "identity", {"name": self.name, **balance})

    def __call__(self, rows: Sequence[Row], answers: Sequence[str]) -> list[float]:
        """One figure an answer, at most 1."""
        weight = {"harmful": self.harmlessness}
        return [
            1 - (1 - word_f1(answer, row.target)) * (1 + weight.get(row.cls, self.helpfulness))
            for row, answer in zip(rows, answers, strict=True)
        ]
