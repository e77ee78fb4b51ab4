"""The settings of an alignment run: a TOML file, read strictly."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgesafe.errors import ConfigError
from edgesafe.format.fields import Fields

SELF_DISTILL, L_SFT, L_DPO, L_PPO = METHODS = ("self-distill", "l-sft", "l-dpo", "l-ppo")
FOCUS, UNIFORM, ROTATING, HARM = SAMPLERS = ("focus", "uniform", "rotating", "harm")
AUTO, LORA, FULL = TUNES = ("auto", "lora", "full")
FULL_BELOW = 100_000_000  # weights of the language model
MUON, ADAMW = OPTIMIZERS = ("muon", "adamw")
PRECISIONS = ("auto", "fp32", "bf16")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """The adapter on the language model, table `[lora]`; read where `tune` is or comes to "lora".

    r: rank. alpha: the factors' product is scaled by alpha / r. dropout: on the adapter's input, 0..1.
    targets: names of the linear layers it goes on.
    """

    r: int = 32
    alpha: int = 64
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS


@dataclass(frozen=True)
class PpoConfig:
    """Settings of `l-ppo`, table `[ppo]`.

    epochs, minibatches: passes over an update's rollouts, and the parts of a pass; an optimizer step each.
    clip_range: of the probability ratio. value_clip_range: of the value's move. vf_coef: weight of the value loss (the paper's
        c1).
    kl_coef: weight of the per-token KL in the reward (the paper's eta), nats. kl_target: above 0, `kl_coef` adapts until an
        answer is this many nats away from the reference policy. kl_horizon: updates over which it adapts. max_kl: nats an
        answer, above which a run has diverged.
    gamma, gae_lambda: of generalized advantage estimation.
    temperature, max_new_tokens: of the sampled answers. missing_eos_penalty: taken off the reward of an answer that does not
        end.
    """

    epochs: int = 4
    minibatches: int = 4
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    vf_coef: float = 0.1
    kl_coef: float = 0.05
    kl_target: float = 0.0
    kl_horizon: int = 50
    max_kl: float = 100.0
    gamma: float = 1.0
    gae_lambda: float = 0.95
    temperature: float = 1.0
    max_new_tokens: int = 32
    missing_eos_penalty: float = 1.0


@dataclass(frozen=True)
class DpoConfig:
    """Settings of `l-dpo`, table `[dpo]`.

    beta: how far the policy may move from the reference policy; small is far. rows: how many training rows are answered at
        every exit before the first update to find pairs. min_reward: a chosen answer has at least this reward. min_gap: and the
        rejected one this much less.
    """

    beta: float = 0.1
    rows: int = 800
    min_reward: float = 0.99
    min_gap: float = 0.05


@dataclass(frozen=True)
class RewardConfig:
    """The reward of `l-ppo` and the pairs of `l-dpo`, table `[reward]`.

    model: folder or hub id of a sequence-classification reward model; "" = agreement with the row's wanted answer.
    harmlessness: how bad an answer to a harmful request is that does not refuse. helpfulness: how bad a wrong answer or a
        refusal is on all other rows. Both against +1 for the wanted answer.
    """

    model: str = ""
    harmlessness: float = 5.0
    helpfulness: float = 1.0


@dataclass(frozen=True)
class EvalConfig:
    """Looks at the model during training, table `[eval]`.

    suite: suite folder of the split "val" ("" = no looks). every: updates between two looks (0 = none). rows: how many.
    choose: end with the weights of the best look instead of the last ones. The best look has the lowest worst-depth
        harmful_rate from a quarter of the reference depth up, among looks that keep the two limits below; without one, the last
        weights stay.
    overrefusal_over_reference, accuracy_under_reference: limits on the mean over the depths from half of the reference depth
        up, against the untouched model at its reference depth.
    patience: looks without a better one after which the run stops (0 = never).
    """

    suite: str = ""
    every: int = 0
    rows: int = 120
    choose: bool = False
    overrefusal_over_reference: float = 0.05
    accuracy_under_reference: float = 0.10
    patience: int = 0


@dataclass(frozen=True)
class AlignConfig:
    """Settings of `edgesafe align`.

    method: "self-distill" (KL from the exit's answer distribution to the untouched model's at the reference depth, plus
        `sft_weight` times the cross-entropy on the wanted answer), "l-sft" (the cross-entropy alone), "l-dpo" (the model's own
        right answer at the reference depth against its own wrong one at the exit) or "l-ppo" (clipped PPO on sampled answers).
    data: folder of training rows (suite format, split "train").
    exits: depths to draw from, as `edgesafe.format.exits.parse_exits` reads them.
    sampler: how an update's exit is drawn: "focus", "uniform", "rotating", or "harm" (by the harmful_rate that the latest look
        found at each exit; needs `[eval]`).
    focus: two shares of the reference depth; the sampler "focus" draws the exits from one to the other more often. They are
        those that training decides, about half depth: deeper ones follow with little, shallower ones see too little to become
        useful.
    focus_share: share of the updates that draw a focused exit; the others draw from all exits evenly.
    steps, batch_size: updates, and rows an update at the drawn exit.
    reference_rows: how many of an update's rows also go through the reference depth. The two parts weigh the same; fewer rows
        cost less time. 0 leaves the reference depth out, as the paper's single-depth runs do.
    tune: "lora" (an adapter on the language model), "full" (all of the language model; keeps a frozen copy as reference policy)
        or "auto": full below 100 million weights, where it learns more from as many rows, and an adapter above.
    optimizer: "adamw", or "muon", which takes matrices alone: the adapter's, or with full tuning those of the decoder's blocks,
        while embeddings, norms and head stay as they are. Not for the value head of `l-ppo`.
    lr, warmup: highest learning rate, and the share of the steps that lead up to it.
    harm_weight: how many times a harmful row counts; above 1 an exit that can't tell refuses. `l-ppo` has
        `reward.harmlessness`.
    focus_harm_weight, shallow_harm_weight: the same for the focused exits, where both kinds of mistake count most, and for
        those below, which see too little to be useful and should rather refuse.
    max_loss: above it a run has diverged. A model that guesses evenly over 32,000 tokens has 10.4.
    precision: of the matrix products; weights, optimizer and losses are float32 always.
    gradient_checkpointing: compute the language model's activations twice instead of keeping them.
    cache_gib: tower states and teacher answers are computed once for the whole run where they fit, else for each update.
    checkpoint_every: updates between two checkpoints.
    """

    method: str = L_SFT
    data: str = ""
    exits: str = "all"
    sampler: str = FOCUS
    focus: tuple[float, float] = (0.5, 0.6)
    focus_share: float = 0.6
    steps: int = 1200
    batch_size: int = 32
    reference_rows: int = 16
    tune: str = AUTO
    optimizer: str = MUON
    lr: float = 1e-3
    warmup: float = 0.08
    sft_weight: float = 1.5
    harm_weight: float = 9.0
    focus_harm_weight: float = 2.5
    shallow_harm_weight: float = 24.0
    max_loss: float = 50.0
    precision: str = "auto"
    gradient_checkpointing: bool = False
    cache_gib: float = 4.0
    checkpoint_every: int = 100
    seed: int = 0
    lora: LoraConfig = field(default_factory=LoraConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


# Smallest allowed values where 0 is not it.
_LOW = {"steps": 1, "batch_size": 1, "checkpoint_every": 1, "epochs": 1, "minibatches": 1, "max_new_tokens": 1}
_LOW |= {"kl_horizon": 1, "r": 1, "alpha": 1}
_CHOICES = {"method": METHODS, "sampler": SAMPLERS, "tune": TUNES, "optimizer": OPTIMIZERS, "precision": PRECISIONS}


def default_config() -> Path:
    """The settings that `make export` uses."""
    return Path(__file__).parent / "configs" / "l-sft.toml"


def with_tune(config: AlignConfig, weights: int) -> AlignConfig:
    """The settings with "auto" decided.

    Args:
        config: as read.
        weights: of the language model, its head included.

    >>> with_tune(AlignConfig(), 7_000_000_000).tune, with_tune(AlignConfig(), 2_000_000).tune
    ('lora', 'full')
    """
    return replace(config, tune=FULL if weights < FULL_BELOW else LORA) if config.tune == AUTO else config


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
    config: AlignConfig = _parse(AlignConfig(), obj, where)
    _check(config, where)
    return config


def _parse(default: Any, obj: object, where: str) -> Any:
    """A dataclass of the type of `default` from a table; keys that are not there keep its values."""
    given = Fields(obj, where, ConfigError)
    values: dict[str, Any] = {}
    for key, value in vars(default).items():
        if not given.has(key):
            values[key] = value
        elif hasattr(value, "__dataclass_fields__"):
            values[key] = _parse(value, given.table(key), f"{where}: {key}")
        elif key in _CHOICES:
            values[key] = given.choice(key, _CHOICES[key])
        elif isinstance(value, bool):
            values[key] = given.flag(key)
        elif isinstance(value, int):
            values[key] = given.integer(key, _LOW.get(key, 0))
        elif isinstance(value, float):
            values[key] = given.number(key, None if key == "min_reward" else 0.0)
        elif isinstance(value, str):
            values[key] = given.text(key)
        else:
            values[key] = _pair(given.numbers(key), where) if key == "focus" else given.texts(key)
    given.done()
    return type(default)(**values)


def _pair(shares: tuple[float, ...], where: str) -> tuple[float, float]:
    if len(shares) == 2 and 0 <= shares[0] <= shares[1]:
        return shares[0], shares[1]
    raise ConfigError(
        f"focus = {list(shares)} is no range",
        where=where,
        expected="two shares of the reference depth, the smaller one first",
        todo='e.g. focus = [0.45, 0.6], or sampler = "uniform" to draw all exits evenly',
    )


def _check(c: AlignConfig, where: str) -> None:
    ppo, looks = c.method == L_PPO, "a suite folder and eval.every, as this setting needs looks"
    limits = {
        "lr": (0 < c.lr < 1, c.lr, "above 0 and below 1"),
        "focus_share": (c.focus_share <= 1, c.focus_share, "a share of the updates, 0..1"),
        "warmup": (c.warmup < 1, c.warmup, "a share of the steps, 0..1"),
        "harm_weight": (c.harm_weight > 0, c.harm_weight, "above 0"),
        "focus_harm_weight": (c.focus_harm_weight > 0, c.focus_harm_weight, "above 0"),
        "shallow_harm_weight": (c.shallow_harm_weight > 0, c.shallow_harm_weight, "above 0"),
        "max_loss": (c.max_loss > 0, c.max_loss, "above 0"),
        "reference_rows": (c.reference_rows <= c.batch_size, c.reference_rows, f"at most batch_size = {c.batch_size}"),
        "optimizer": (
            c.optimizer == ADAMW or not ppo,
            c.optimizer,
            f"{ADAMW!r}: muon takes matrices alone, and the value head of {L_PPO} has more",
        ),
        "lora.dropout": (c.lora.dropout < 1, c.lora.dropout, "0..1, below 1"),
        "lora.dropout with l-ppo": (
            not (ppo and c.lora.dropout),
            c.lora.dropout,
            "0: an answer's probability must not be random",
        ),
        "lora.targets": (bool(c.lora.targets), list(c.lora.targets), "one or more names of linear layers"),
        "ppo.minibatches": (
            not ppo or c.ppo.minibatches <= c.batch_size + c.reference_rows,
            c.ppo.minibatches,
            "at most the rows of an update",
        ),
        "ppo.clip_range": (0 < c.ppo.clip_range < 1, c.ppo.clip_range, "above 0 and below 1"),
        "ppo.gamma": (0 < c.ppo.gamma <= 1, c.ppo.gamma, "above 0, at most 1"),
        "ppo.gae_lambda": (c.ppo.gae_lambda <= 1, c.ppo.gae_lambda, "0..1"),
        "ppo.temperature": (c.ppo.temperature > 0, c.ppo.temperature, "above 0"),
        "dpo.beta": (c.dpo.beta > 0, c.dpo.beta, "above 0"),
        "eval.suite": (bool(c.eval.suite) or not c.eval.every, c.eval.suite, "a suite folder, as eval.every is set"),
        "sampler": (c.sampler != HARM or c.eval.every > 0, c.sampler, looks),
        "eval.choose": (not c.eval.choose or c.eval.every > 0, c.eval.choose, looks),
        "eval.patience": (
            not c.eval.patience or c.eval.choose,
            c.eval.patience,
            "eval.choose, which says what a better look is",
        ),
    }
    for key, (fine, value, expected) in limits.items():
        if not fine:
            raise ConfigError(f"{key} = {value!r} is out of range", where=where, expected=expected, todo="mend it")
