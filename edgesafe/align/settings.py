"""The settings of an alignment run, as values; `config.py` reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from edgesafe.errors import ConfigError

FOCUS, UNIFORM, ROTATING, HARM = SAMPLERS = ("focus", "uniform", "rotating", "harm")
AUTO, LORA, FULL = TUNES = ("auto", "lora", "full")
FULL_BELOW = 100_000_000  # weights of the language model
MUON, ADAMW = OPTIMIZERS = ("muon", "adamw")
LINEAR, NO_MAP = MAPS = ("linear", "none")
PRECISIONS = ("auto", "fp32", "bf16")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# By the name of a setting: whether its value is allowed, the value, and what is expected instead.
Limits = Mapping[str, tuple[bool, object, str]]
S = TypeVar("S")


def no_limits(*_: object) -> Limits:
    """Nothing is refused."""
    return {}


@dataclass(frozen=True)
class Section(Generic[S]):
    """A TOML table that belongs to one objective.

    name: of the table. default: a frozen dataclass with the settings' defaults; their types are those that a file must have.
    low: the smallest value of a number by its key, None for any; 0 where a key is not named.
    limits: what the settings must keep besides, by key.
    """

    name: str
    default: S
    low: Mapping[str, int | None] = field(default_factory=dict)
    limits: Callable[[S], Limits] = no_limits

    def of(self, config: AlignConfig) -> S:
        """These settings of a run; the defaults where its config has none."""
        value: S = config.sections.get(self.name, self.default)
        return value

    def put(self, config: AlignConfig, settings: S) -> AlignConfig:
        """A config with these settings in the place of its own."""
        return replace(config, sections={**config.sections, self.name: settings})


@dataclass(frozen=True)
class LoraConfig:
    """The adapter on the language model, table `[lora]`; read where `tune` is or comes to "lora".

    r: rank. alpha: the factors' product is scaled by alpha / r. dropout: on the adapter's input, 0..1.
    targets: names of the linear layers that it adapts.
    """

    r: int = 32
    alpha: int = 64
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS


@dataclass(frozen=True)
class RewardConfig:
    """The reward of the objectives that need one (`l-ppo`, `l-dpo`), table `[reward]`.

    model: folder or hub id of a sequence-classification reward model; "" = agreement with the row's wanted answer.
    harmlessness: how bad an answer to a harmful request is that does not refuse. helpfulness: how bad a wrong answer or a
        refusal is on all other rows. Both against +1 for the wanted answer.
    """

    model: str = ""
    harmlessness: float = 5.0
    helpfulness: float = 1.0


@dataclass(frozen=True)
class EvalConfig:
    """Validation passes during training, table `[eval]`.

    suite: suite folder of the split "val" ("" = no validation). every: updates between two passes (0 = none). rows: how many.
    choose: end with the weights of the best pass instead of the last ones. The best pass has the lowest worst-depth
        harmful_rate from a quarter of the reference depth up, among those that keep the two limits below. Without one, the
        last weights stay.
    overrefusal_over_reference, accuracy_under_reference: limits on the mean over the depths from half of the reference depth
        up, against the untouched model at its reference depth.
    patience: validation passes without a better one after which the run stops (0 = never).
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
        "MODULE:NAME" is an `Objective` outside this package, e.g. "my_objective:OBJECTIVE" for a my_objective.py here.
    data: folder of training rows (suite format, split "train").
    exits: what to draw from, as `edgesafe.format.exits.parse_exits` reads them.
    ladder: exits that `edgesafe ship` evaluates and exports, read likewise; "" as `shipped_exits` says.
        Those with fewer visual tokens must be trained.
    exit_map: "linear" fits a map per exit from the rows' pictures before the first update (`edgesafe.maps`), if the checkpoint
        has none; "none" trains on its states as they are.
    sampler: how an update's exit is drawn: "focus", "uniform", "rotating", or "harm" (by the harmful_rate that the latest
        validation pass measured at each exit; needs `[eval]`).
    focus: two shares of the reference depth; the sampler "focus" draws the exits from one to the other more often. They are
        those that training decides, a third of the depth with exit maps and half of it without: deeper ones follow with little,
        shallower ones see too little to become useful.
    focus_share: share of the updates that draw a focused exit; the others draw from all exits evenly.
    steps, batch_size: updates, and rows per update at the drawn exit.
    reference_rows: how many of an update's rows also go through the reference depth. The two parts weigh the same; fewer rows
        cost less time. 0 leaves the reference depth out, as the paper's single-depth runs do.
    tune: "lora" (an adapter on the language model), "full" (all of the language model; keeps a frozen copy as reference policy)
        or "auto": full below 100 million weights, where it learns more from as many rows, and an adapter above.
    optimizer: "adamw", or "muon", which takes matrices alone: the adapter's, or with full tuning those of the decoder's blocks
        and the output layer, while embeddings and norms stay as they are, and so does an output layer that is the embedding.
        Not for a value head, as `l-ppo` has one.
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
    sections: settings by table of the objectives that have their own, e.g. {"ppo": PpoConfig()}; read by `Section.of`.
    """

    method: str = "l-sft"
    data: str = ""
    exits: str = "all"
    ladder: str = ""
    exit_map: str = LINEAR
    sampler: str = FOCUS
    focus: tuple[float, float] = (0.3, 0.45)
    focus_share: float = 0.6
    steps: int = 2400
    batch_size: int = 32
    reference_rows: int = 16
    tune: str = AUTO
    optimizer: str = MUON
    lr: float = 1e-3
    warmup: float = 0.08
    sft_weight: float = 1.5
    harm_weight: float = 3.0
    focus_harm_weight: float = 3.0
    shallow_harm_weight: float = 10.0
    max_loss: float = 50.0
    precision: str = "auto"
    gradient_checkpointing: bool = False
    cache_gib: float = 4.0
    checkpoint_every: int = 100
    seed: int = 0
    lora: LoraConfig = field(default_factory=LoraConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sections: Mapping[str, Any] = field(default_factory=dict)


def with_tune(config: AlignConfig, weights: int) -> AlignConfig:
    """The settings with "auto" decided.

    Args:
        config: as read.
        weights: of the language model, its head included.

    >>> with_tune(AlignConfig(), 7_000_000_000).tune, with_tune(AlignConfig(), 2_000_000).tune
    ('lora', 'full')
    """
    return replace(config, tune=FULL if weights < FULL_BELOW else LORA) if config.tune == AUTO else config


def check_limits(limits: Limits, where: str) -> None:
    """Refuse the first setting that is out of range.

    Raises:
        ConfigError: naming the setting, its value and what is expected.
    """
    for key, (fine, value, expected) in limits.items():
        if not fine:
            raise ConfigError(f"{key} = {value!r} is out of range", where=where, expected=expected, todo=f"change {key}")
