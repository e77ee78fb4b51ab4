"""Validation passes while a model trains: rates on a few rows of a suite, for the metrics and the choice of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgesafe.align.settings import EvalConfig
from edgesafe.certify.tally import tally
from edgesafe.checkpoint.exit_model import ExitModel
from edgesafe.errors import ConfigError
from edgesafe.evaluate.answers import answer_suite
from edgesafe.format.exits import Exit
from edgesafe.format.suite import CLASSES, Row, Suite, read_suite


@dataclass(frozen=True)
class Watch:
    """The rows and exits of a validation pass."""

    suite: Suite
    exits: tuple[Exit, ...]

    def validate(self, llava: ExitModel) -> dict[str, dict[str, float]]:
        """Rates by exit, e.g. {"6": {"harmful": 0.02, "overrefusal": 0.0, ...}}; the model is left in evaluation mode."""
        llava.model.eval()
        texts = answer_suite(llava, self.suite, self.exits, quiet=True)
        return {
            str(exit): {name: round(r.rate, 4) for name, r in tally(self.suite.counted, texts[exit]).items()}
            for exit in self.exits
        }

    def worst_harm(
        self,
        rates: Mapping[str, Mapping[str, float]],
        before: Mapping[str, float],
        limits: EvalConfig,
        reference: Exit,
    ) -> float | None:
        """Harmful_rate of the worst exit from a quarter of the reference's depth up; None where a utility limit is broken.

        Args:
            rates: what `validate` returned.
            before: rates of the untouched model at its reference.
            limits: on over-refusal and accuracy, means over the exits from half of the reference's depth up.
            reference: the model's reference exit.
        """
        useful = [at for exit, at in rates.items() if 2 * Exit.parse(exit).depth >= reference.depth]
        refused, right = (sum(r[key] for r in useful) / len(useful) for key in ("overrefusal", "accuracy"))
        if refused > before["overrefusal"] + limits.overrefusal_over_reference:
            return None
        if right < before["accuracy"] - limits.accuracy_under_reference:
            return None
        return max(at["harmful"] for exit, at in rates.items() if 4 * Exit.parse(exit).depth >= reference.depth)


def open_watch(config: EvalConfig, exits: Sequence[Exit]) -> Watch | None:
    """The watch that a config asks for.

    Raises:
        ConfigError: the suite is one that results are reported on; choosing settings by it would spoil them.
    """
    if not config.every:
        return None
    suite = read_suite(Path(config.suite))
    if suite.split not in ("train", "val"):
        raise ConfigError(
            f"split {suite.split!r} is not for validation during training",
            where="eval.suite",
            expected="a suite of split 'val'",
            todo="write one with `edgesafe reference data --split val`",
        )
    return Watch(replace(suite, rows=_some_rows(suite, config.rows)), tuple(sorted(set(exits))))


def _some_rows(suite: Suite, count: int) -> tuple[Row, ...]:
    """At most `count` rows, of every class."""
    rows = spread(suite.rows, max(1, len(suite.rows) // count))[:count]
    if missing := [cls for cls in CLASSES if cls not in {row.cls for row in rows}]:
        raise ConfigError(
            f"no {' and no '.join(missing)} rows to validate on",
            where="eval.suite",
            expected="rows of every class: a rate of none is 0, and every pass would seem perfect",
            todo="raise eval.rows, or use another suite",
        )
    return rows


def spread(rows: Sequence[Any], stride: int) -> tuple[Any, ...]:
    """Every stride-th row, so that all families are in.

    >>> spread("abcdefg", 3)
    ('a', 'd', 'g')
    """
    return tuple(rows[::stride])
