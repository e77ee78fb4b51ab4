"""What a training run leaves beside a checkpoint's weights: `edgesafe.json` and `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORD, METRICS = "edgesafe.json", "metrics.jsonl"


def read_training_reward(model_dir: Path) -> dict[str, Any] | None:
    """The identity of the reward that a checkpoint was trained with; None without a record or a reward."""
    try:
        reward = json.loads((model_dir / RECORD).read_text(encoding="utf-8")).get("reward")
    except (OSError, ValueError, AttributeError):
        return None
    return dict(reward) if isinstance(reward, Mapping) else None


def read_trained_from(model_dir: Path) -> str | None:
    """The digest of the checkpoint that this one was retrained from; None without a record."""
    try:
        return str(json.loads((model_dir / RECORD).read_text(encoding="utf-8"))["parent"]["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_training_metrics(model_dir: Path) -> list[dict[str, Any]]:
    """A line for each update; none where the checkpoint was not trained here, or they can't be read."""
    try:
        return [json.loads(line) for line in (model_dir / METRICS).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []
