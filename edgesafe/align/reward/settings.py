"""Settings of a reward model's training; the command line shows their defaults without loading torch."""

from __future__ import annotations

from dataclasses import dataclass

from edgesafe.errors import ConfigError


@dataclass(frozen=True)
class RewardTraining:
    """Settings of a reward model's training.

    epochs: passes over the training pairs. lr: highest learning rate. batch_size: pairs an update.
    max_length: most tokens of a dialogue; a longer one is refused, not cut. seed: of the head, the order and the dropout.
    val_share: share of the prompts whose pairs validate; 0 keeps the last weights instead of the best.
    skip_bad: leave out lines that can't be used.
    """

    epochs: int = 1
    lr: float = 1e-5
    batch_size: int = 16
    max_length: int = 512
    val_share: float = 0.05
    seed: int = 0
    skip_bad: bool = False


def check(c: RewardTraining) -> None:
    """Refuse settings that are out of range.

    Raises:
        ConfigError: One is; it names the option.
    """
    limits = {
        "epochs": (c.epochs >= 1, c.epochs, "at least 1"),
        "lr": (0 < c.lr < 1, c.lr, "above 0 and below 1"),
        "batch-size": (c.batch_size >= 1, c.batch_size, "at least 1"),
        "max-length": (c.max_length >= 1, c.max_length, "at least 1"),
        "val-share": (0 <= c.val_share < 1, c.val_share, "a share of the prompts, 0..1"),
        "seed": (c.seed >= 0, c.seed, "at least 0"),
    }
    for key, (fine, value, expected) in limits.items():
        if not fine:
            raise ConfigError(f"--{key} = {value!r} is out of range", where=f"--{key}", expected=expected, todo="change it")
