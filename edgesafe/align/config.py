"""Reads the settings of an alignment run from a TOML file, strictly: what is unknown or out of range is refused."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from edgesafe.align.objectives.table import find_objective, sections_of
from edgesafe.align.settings import (
    ADAMW,
    HARM,
    MAPS,
    OPTIMIZERS,
    PRECISIONS,
    SAMPLERS,
    TUNES,
    AlignConfig,
    Limits,
    S,
    check_limits,
)
from edgesafe.align.trainer import Objective
from edgesafe.errors import ConfigError
from edgesafe.format.exits import Exit
from edgesafe.format.fields import Fields

# What may name the exits that ship.
LADDER, OPTION = "exits.ladder", "--exits"
# Smallest allowed values where 0 is not it; an objective's section brings its own.
_LOW = {"steps": 1, "batch_size": 1, "checkpoint_every": 1, "r": 1, "alpha": 1}
_CHOICES = {"exit_map": MAPS, "sampler": SAMPLERS, "tune": TUNES, "optimizer": OPTIMIZERS, "precision": PRECISIONS}


def default_config() -> Path:
    """The settings that `make export` uses."""
    return Path(__file__).parent / "configs" / "l-sft.toml"


def read_config(path: Path, **override: Any) -> AlignConfig:
    """Read a TOML file into an AlignConfig.

    Args:
        path: the file.
        override: top-level values that win over the file's (None is ignored).

    Raises:
        ConfigError: no such file, bad TOML, an unknown key or method, a value of the wrong type or out of range.
    """
    try:
        obj = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            "the alignment config can't be read", where=str(path), expected="a TOML file", todo=str(error)
        ) from error
    # Flat first: a value for one key of `[exits]` must neither lose to the file's nor take the file's other key with it.
    return parse_config({**_with_exits(obj, str(path)), **{k: v for k, v in override.items() if v is not None}}, str(path))


def parse_config(obj: Mapping[str, Any], where: str) -> AlignConfig:
    """The settings in a decoded TOML table; a key that is not there keeps its default.

    The sections of all shipped objectives are read, whatever the method is, so that one file can serve several methods.

    >>> parse_config({"steps": 10, "lora": {"r": 4}}, "example").lora.r
    4
    >>> parse_config({"step": 10}, "example")
    Traceback (most recent call last):
    edgesafe.errors.ConfigError: unknown key 'step', did you mean 'steps'? (example). Expected: ...
    """
    given, default = Fields(_with_exits(obj, where), where, ConfigError), AlignConfig()
    objective = find_objective(given.text("method") if given.has("method") else default.method, where)
    sections = {s.name: _section(given, s.name, s.default, s.low) for s in sections_of(objective)}
    config = _read(given, default, _LOW, sections=sections)
    _check(config, objective, where)
    return config


def _with_exits(obj: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The table `[exits]` as the keys `exits`, `ladder` and `exit_map`; a text alone says which exits are trained.

    `tokens = [9, 4]` adds every exit of `train` with so many visual tokens.
    """
    if not isinstance(obj.get("exits"), Mapping):
        return obj
    table = Fields(obj["exits"], f"{where}: exits", ConfigError)
    flat = {key: obj[key] for key in obj if key != "exits"}
    for name, key in (("train", "exits"), ("ladder", "ladder"), ("map", "exit_map")):
        if table.has(name):
            flat[key] = table.text(name)
    if table.has("tokens"):
        depths = str(flat.get("exits", AlignConfig().exits))
        counts = table.integers("tokens")
        if "@" in depths or not all(count > 0 for count in counts):
            raise ConfigError(
                f"tokens is {list(counts)} and train is {depths!r}",
                where=f"{where}: exits",
                expected="numbers of visual tokens above 0, and depths alone in train",
                todo="or write all exits in train, such as 1-12,6@9",
            )
        fewer = [f"{part}@{count}" for count in counts for part in depths.split(",")]
        flat["exits"] = ",".join([depths, *fewer])
    table.done()
    return flat


def shipped_exits(config: AlignConfig) -> str | None:
    """What `edgesafe ship` exports if told no exits: the ladder, or the trained exits where some have fewer visual tokens.

    None stands for every depth, of which a large tower's bundle has some.
    """
    return config.ladder or (config.exits if "@" in config.exits else None)


def check_trained(ladder: Iterable[Exit], trained: Collection[Exit], where: str) -> None:
    """Refuse to ship an exit with fewer visual tokens that is not trained: its refusals are no depth's.

    Args:
        ladder: what would ship.
        trained: what the training draws.
        where: what names the ladder.

    Raises:
        ConfigError: There is one.
    """
    if missing := [str(exit) for exit in ladder if exit.visual_tokens and exit not in trained]:
        raise ConfigError(
            f"not trained: {', '.join(missing)}",
            where=where,
            expected="of exits with fewer visual tokens only those that [exits] train names",
            todo="leave them out here, or add them there and align again",
        )


def recorded(config: AlignConfig) -> dict[str, Any]:
    """The settings as a record holds them: sections beside the tables, folders by name, which no machine's paths are in.

    The ladder, which changes nothing of the training, is left out.
    """
    values = asdict(config)
    del values["sections"], values["ladder"]
    values |= {s.name: asdict(s.of(config)) for s in sections_of(find_objective(config.method))}
    values["data"], values["eval"]["suite"] = Path(config.data).name, Path(config.eval.suite).name
    if Path(config.reward.model).is_dir():
        values["reward"]["model"] = Path(config.reward.model).name
    return values


def _section(given: Fields, name: str, default: S, low: Mapping[str, int | None]) -> S:
    """The settings in a table of its own; the defaults where there is none."""
    return _read(given.child(name), default, low) if given.has(name) else default


def _read(given: Fields, default: S, low: Mapping[str, int | None], **known: Any) -> S:
    """A dataclass of the type of `default` from a table; `known` values are taken as they are, missing keys keep theirs."""
    values = {key: value for key, value in vars(default).items() if key not in known}
    read = {key: _value(given, key, value, low) if given.has(key) else value for key, value in values.items()}
    given.done()
    return type(default)(**known, **read)


def _value(given: Fields, key: str, default: Any, low: Mapping[str, int | None]) -> Any:
    """One setting, of the type of its default."""
    if is_dataclass(default):
        return _section(given, key, default, low)
    if key in _CHOICES:
        return given.choice(key, _CHOICES[key])
    if isinstance(default, bool):
        return given.flag(key)
    least = low.get(key, 0)
    if isinstance(default, int):
        return given.integer(key, -(2**63) if least is None else least)
    if isinstance(default, float):
        return given.number(key, least)
    if isinstance(default, str):
        return given.text(key)
    return _pair(given.numbers(key), given.where) if key == "focus" else given.texts(key)


def _pair(shares: tuple[float, ...], where: str) -> tuple[float, float]:
    if len(shares) == 2 and 0 <= shares[0] <= shares[1]:
        return shares[0], shares[1]
    raise ConfigError(
        f"focus = {list(shares)} is not a range",
        where=where,
        expected="two shares of the reference depth, the smaller one first",
        todo='e.g. focus = [0.45, 0.6], or sampler = "uniform" to draw all exits evenly',
    )


def _check(c: AlignConfig, objective: Objective, where: str) -> None:
    """The general limits, those of every objective's section, and those of the chosen objective."""
    check_limits(_training_limits(c, objective), where)
    for section in sections_of(objective):
        limits = section.limits(section.of(c))
        check_limits({f"{section.name}.{key}": limit for key, limit in limits.items()}, where)
    check_limits(_validation_limits(c), where)
    check_limits(objective.limits(c, 1), where)


def _training_limits(c: AlignConfig, objective: Objective) -> Limits:
    return {
        "lr": (0 < c.lr < 1, c.lr, "above 0 and below 1"),
        "focus_share": (c.focus_share <= 1, c.focus_share, "a share of the updates, 0..1"),
        "warmup": (c.warmup < 1, c.warmup, "a share of the steps, 0..1"),
        "harm_weight": (c.harm_weight > 0, c.harm_weight, "above 0"),
        "focus_harm_weight": (c.focus_harm_weight > 0, c.focus_harm_weight, "above 0"),
        "shallow_harm_weight": (c.shallow_harm_weight > 0, c.shallow_harm_weight, "above 0"),
        "max_loss": (c.max_loss > 0, c.max_loss, "above 0"),
        "reference_rows": (c.reference_rows <= c.batch_size, c.reference_rows, f"at most batch_size = {c.batch_size}"),
        "optimizer": (
            c.optimizer == ADAMW or not objective.has_value_head,
            c.optimizer,
            f"{ADAMW!r}: muon takes matrices alone, and the value head of {c.method} has more",
        ),
        "lora.dropout": (c.lora.dropout < 1, c.lora.dropout, "0..1, below 1"),
        "lora.targets": (bool(c.lora.targets), list(c.lora.targets), "one or more names of linear layers"),
    }


def _validation_limits(c: AlignConfig) -> Limits:
    needed, every = "a suite folder and eval.every, as this setting needs validation passes", c.eval.every > 0
    return {
        "eval.suite": (bool(c.eval.suite) or not every, c.eval.suite, "a suite folder, as eval.every is set"),
        "sampler": (c.sampler != HARM or every, c.sampler, needed),
        "eval.choose": (not c.eval.choose or every, c.eval.choose, needed),
        "eval.patience": (
            not c.eval.patience or c.eval.choose,
            c.eval.patience,
            "eval.choose, which says what a better validation pass is",
        ),
    }
