"""The settings of an alignment run: a TOML file, read strictly."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edgesafe.errors import ConfigError

METHODS = ("self-distill", "sft")


@dataclass(frozen=True)
class AlignConfig:
    """Settings of `edgesafe align`.

    method: "self-distill" (KL from the exit's answer distribution to the reference depth's, plus `sft_weight` times the
        cross-entropy on the wanted answer) or "sft" (the cross-entropy alone).
    data: folder of training rows (suite format, split "train").
    exits: depths to draw from, as `edgesafe.exits.parse_exits` reads them.
    harm_weight: how many times a harmful row counts; above 1 an exit that can't tell refuses.
    """

    method: str = "self-distill"
    data: str = ""
    exits: str = "all"
    steps: int = 400
    batch_size: int = 32
    lr: float = 2e-3
    warmup: float = 0.08
    sft_weight: float = 1.0
    harm_weight: float = 2.0
    lora_r: int = 32
    lora_alpha: int = 64
    checkpoint_every: int = 100
    seed: int = 0


def default_config() -> Path:
    """The settings that `make export` uses."""
    return Path(__file__).parent / "configs" / "default.toml"


def read_config(path: Path, **override: Any) -> AlignConfig:
    """Read a TOML file into an AlignConfig.

    Args:
        path: the file.
        override: values that win over the file's (None is ignored).

    Raises:
        ConfigError: no such file, bad TOML, an unknown key, a value of the wrong type or out of range.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            "the alignment config can't be read", where=str(path), expected="a TOML file", todo=str(error)
        ) from error
    table.update({k: v for k, v in override.items() if v is not None})
    known = {f.name: type(f.default) for f in fields(AlignConfig)}
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"unknown key {key!r}",
                where=str(path),
                expected="one of " + ", ".join(known),
                todo=f"did you mean {near[0]!r}?" if near else "remove it",
            )
        if known[key] is float and isinstance(value, int) and not isinstance(value, bool):
            table[key] = value = float(value)
        if type(value) is not known[key]:
            raise ConfigError(
                f"{key} = {value!r} has the wrong type", where=str(path), expected=known[key].__name__, todo="mend it"
            )
    config = AlignConfig(**table)
    _check(config, str(path))
    return config


def _check(c: AlignConfig, where: str) -> None:
    wrong = {
        "method": c.method not in METHODS,
        "steps": c.steps < 1,
        "batch_size": c.batch_size < 1,
        "lr": not 0 < c.lr < 1,
        "warmup": not 0 <= c.warmup < 1,
        "sft_weight": c.sft_weight < 0,
        "harm_weight": c.harm_weight <= 0,
        "lora_r": c.lora_r < 1,
        "checkpoint_every": c.checkpoint_every < 1,
    }
    for key, bad in wrong.items():
        if bad:
            raise ConfigError(
                f"{key} = {getattr(c, key)!r} is out of range",
                where=where,
                expected=" or ".join(METHODS) if key == "method" else "a sensible positive value",
                todo="mend it",
            )
