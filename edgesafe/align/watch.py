"""Looks at a model while it trains: rates on a few rows of a validation suite, for the metrics and for people's eyes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgesafe.align.config import EvalConfig
from edgesafe.certify.tally import tally
from edgesafe.checkpoint.exit_model import ExitModel
from edgesafe.errors import ConfigError
from edgesafe.evaluate.evaluate import answers
from edgesafe.format.suite import CLASSES, Suite, read_suite


@dataclass(frozen=True)
class Watch:
    """The rows and depths to look at."""

    suite: Suite
    depths: tuple[int, ...]

    def look(self, llava: ExitModel) -> dict[str, dict[str, float]]:
        """Rates by depth, e.g. {"6": {"harmful": 0.02, "overrefusal": 0.0, ...}}; the model is left in evaluation mode."""
        llava.model.eval()
        said = answers(llava, self.suite, self.depths, quiet=True)
        return {str(d): {name: round(r.rate, 4) for name, r in tally(self.suite.rows, said[d]).items()} for d in self.depths}

    def worst_harm(
        self,
        seen: Mapping[str, Mapping[str, float]],
        before: Mapping[str, float],
        limits: EvalConfig,
        reference_depth: int,
    ) -> float | None:
        """Harmful_rate of the worst depth from a quarter of the reference depth up; None where a utility limit is broken.

        Args:
            seen: what `look` returned.
            before: rates of the untouched model at its reference depth.
            limits: on over-refusal and accuracy, means over the depths from half of the reference depth up.
            reference_depth: of the model.
        """
        useful = [rates for depth, rates in seen.items() if 2 * int(depth) >= reference_depth]
        refused, right = (sum(r[key] for r in useful) / len(useful) for key in ("overrefusal", "accuracy"))
        if refused > before["overrefusal"] + limits.overrefusal_over_reference:
            return None
        if right < before["accuracy"] - limits.accuracy_under_reference:
            return None
        return max(rates["harmful"] for depth, rates in seen.items() if 4 * int(depth) >= reference_depth)


def open_watch(config: EvalConfig, depths: Sequence[int]) -> Watch | None:
    """The watch that a config asks for.

    Raises:
        ConfigError: the suite is one that results are reported on; choosing settings by it would spoil them.
    """
    if not config.every:
        return None
    suite = read_suite(Path(config.suite))
    if suite.split not in ("train", "val"):
        raise ConfigError(
            f"split {suite.split!r} is not for looking at during training",
            where="eval.suite",
            expected="a suite of split 'val'",
            todo="write one with `edgesafe reference data --split val`",
        )
    stride = max(1, len(suite.rows) // config.rows)
    seen = {row.cls for row in spread(suite.rows, stride)[: config.rows]}
    if missing := [cls for cls in CLASSES if cls not in seen]:
        raise ConfigError(
            f"no {' and no '.join(missing)} rows to look at",
            where="eval.suite",
            expected="rows of every class: a rate of none is 0, and every look would seem perfect",
            todo="raise eval.rows, or use another suite",
        )
    return Watch(replace(suite, rows=spread(suite.rows, stride)[: config.rows]), tuple(sorted(set(depths))))


def spread(rows: Sequence[Any], stride: int) -> tuple[Any, ...]:
    """Every stride-th row, so that all families are in.

    >>> spread("abcdefg", 3)
    ('a', 'd', 'g')
    """
    return tuple(rows[::stride])
