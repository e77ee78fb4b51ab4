"""The settings of an alignment run: a TOML file, read strictly."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgesafe.errors import ConfigError
from edgesafe.records import Fields

SELF_DISTILL, SFT = "self-distill", "sft"
METHODS = (SELF_DISTILL, SFT)
PRECISIONS = ("auto", "fp32", "bf16")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """The adapter on the language model, table `[lora]`.

    r: rank. alpha: the factors' product is scaled by alpha / r. dropout: on the adapter's input, 0..1.
    targets: names of the linear layers it goes on.
    """

    r: int = 32
    alpha: int = 64
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS


@dataclass(frozen=True)
class EvalConfig:
    """Looks at the model during training, table `[eval]`; they change nothing about the run.

    suite: suite folder of the split "val" ("" = no looks). every: updates between two looks (0 = none). rows: how many.
    """

    suite: str = ""
    every: int = 0
    rows: int = 120


@dataclass(frozen=True)
class AlignConfig:
    """Settings of `edgesafe align`.

    method: "self-distill" (KL from the exit's answer distribution to the untouched model's at the reference depth, plus
        `sft_weight` times the cross-entropy on the wanted answer) or "sft" (the cross-entropy alone).
    data: folder of training rows (suite format, split "train").
    exits: depths to draw from, as `edgesafe.exits.parse_exits` reads them.
    focus: two shares of the reference depth; the exits from one to the other are drawn more often. They are those that training
        decides, about half depth: deeper ones follow with little, shallower ones see too little to become useful.
    focus_share: share of the updates that draw a focused exit; the others draw from all exits evenly.
    steps, batch_size: updates, and rows an update at the drawn exit.
    reference_rows: how many of an update's rows also go through the reference depth, 1..batch_size. The two parts weigh the
        same; fewer rows cost less time.
    lr, warmup: highest learning rate, and the share of the steps that lead up to it.
    harm_weight: how many times a harmful row counts; above 1 an exit that can't tell refuses.
    max_loss: above it a run has diverged. A model that guesses evenly over 32,000 tokens has 10.4.
    precision: of the matrix products; weights, optimizer and losses are float32 always.
    cache_gib: tower states and teacher answers are computed once for the whole run where they fit, else for each update.
    checkpoint_every: updates between two checkpoints.
    """

    method: str = SELF_DISTILL
    data: str = ""
    exits: str = "all"
    focus: tuple[float, float] = (0.45, 0.6)
    focus_share: float = 0.8
    steps: int = 800
    batch_size: int = 32
    reference_rows: int = 8
    lr: float = 2e-3
    warmup: float = 0.08
    sft_weight: float = 1.0
    harm_weight: float = 5.0
    max_loss: float = 50.0
    precision: str = "auto"
    cache_gib: float = 4.0
    checkpoint_every: int = 100
    seed: int = 0
    lora: LoraConfig = field(default_factory=LoraConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def default_config() -> Path:
    """The settings that `make export` uses."""
    return Path(__file__).parent / "configs" / "self-distill.toml"


def read_config(path: Path, **override: Any) -> AlignConfig:
    """Read a TOML file into an AlignConfig.

    Args:
        path: the file.
        override: top-level values that win over the file's (None is ignored).

    Raises:
        ConfigError: no such file, bad TOML, an unknown key, a value of the wrong type or out of range.
    """
    try:
        obj = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            "the alignment config can't be read", where=str(path), expected="a TOML file", todo=str(error)
        ) from error
    return parse_config({**obj, **{k: v for k, v in override.items() if v is not None}}, str(path))


def parse_config(obj: Mapping[str, Any], where: str) -> AlignConfig:
    """The settings in a decoded TOML table; a key that is not there keeps its default.

    >>> parse_config({"steps": 10, "lora": {"r": 4}}, "example").lora.r
    4
    >>> parse_config({"step": 10}, "example")
    Traceback (most recent call last):
    edgesafe.errors.ConfigError: unknown key 'step', did you mean 'steps'? (example). Expected: ...
    """
    top = _with_defaults(AlignConfig(), obj, where)
    lora, watch = (
        _with_defaults(d, top.table(n), f"{where}: {n}") for d, n in ((LoraConfig(), "lora"), (EvalConfig(), "eval"))
    )
    config = AlignConfig(
        method=top.choice("method", METHODS),
        data=top.text("data"),
        exits=top.text("exits"),
        focus=_pair(top.numbers("focus"), where),
        focus_share=top.number("focus_share", 0.0),
        steps=top.integer("steps", 1),
        batch_size=top.integer("batch_size", 1),
        reference_rows=top.integer("reference_rows", 1),
        lr=top.number("lr", 0.0),
        warmup=top.number("warmup", 0.0),
        sft_weight=top.number("sft_weight", 0.0),
        harm_weight=top.number("harm_weight", 0.0),
        max_loss=top.number("max_loss", 0.0),
        precision=top.choice("precision", PRECISIONS),
        cache_gib=top.number("cache_gib", 0.0),
        checkpoint_every=top.integer("checkpoint_every", 1),
        seed=top.integer("seed"),
        lora=LoraConfig(lora.integer("r", 1), lora.integer("alpha", 1), lora.number("dropout", 0.0), lora.texts("targets")),
        eval=EvalConfig(watch.text("suite"), watch.integer("every"), watch.integer("rows", 1)),
    )
    for fields in (top, lora, watch):
        fields.done()
    _check(config, where)
    return config


def _with_defaults(default: Any, obj: object, where: str) -> Fields:
    """The table's fields, those that are not there from the defaults."""
    given = Fields(obj, where, ConfigError)
    inner = {key: vars(value) if hasattr(value, "__dataclass_fields__") else value for key, value in vars(default).items()}
    return Fields({**inner, **given.obj}, where, ConfigError)


def _pair(shares: tuple[float, ...], where: str) -> tuple[float, float]:
    if len(shares) == 2 and 0 <= shares[0] <= shares[1]:
        return shares[0], shares[1]
    raise ConfigError(
        f"focus = {list(shares)} is no range",
        where=where,
        expected="two shares of the reference depth, the smaller one first",
        todo="e.g. focus = [0.45, 0.6], or focus_share = 0 to draw all exits evenly",
    )


def _check(c: AlignConfig, where: str) -> None:
    limits = {
        "lr": (0 < c.lr < 1, c.lr, "above 0 and below 1"),
        "focus_share": (c.focus_share <= 1, c.focus_share, "a share of the updates, 0..1"),
        "warmup": (c.warmup < 1, c.warmup, "a share of the steps, 0..1"),
        "harm_weight": (c.harm_weight > 0, c.harm_weight, "above 0"),
        "max_loss": (c.max_loss > 0, c.max_loss, "above 0"),
        "reference_rows": (c.reference_rows <= c.batch_size, c.reference_rows, f"at most batch_size = {c.batch_size}"),
        "lora.dropout": (c.lora.dropout < 1, c.lora.dropout, "0..1, below 1"),
        "lora.targets": (bool(c.lora.targets), list(c.lora.targets), "one or more names of linear layers"),
        "eval.suite": (bool(c.eval.suite) or not c.eval.every, c.eval.suite, "a suite folder, as eval.every is set"),
    }
    for key, (fine, value, expected) in limits.items():
        if not fine:
            raise ConfigError(f"{key} = {value!r} is out of range", where=where, expected=expected, todo="mend it")
