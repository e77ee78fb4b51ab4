"""A run: what it is made from, the policy that changes, and one step down a loss on one or many processes."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from edgesafe.align.config import LORA, MUON, AlignConfig
from edgesafe.align.data import Batch, Example, collate
from edgesafe.align.features import Features
from edgesafe.align.sampler import focused_exits
from edgesafe.align.watch import Watch
from edgesafe.checkpoint.exit_model import ExitModel, answer_hidden, autocast, put_language
from edgesafe.errors import ConfigError, DivergedError


class Policy(nn.Module):
    """The model as training calls it, in one module, because data-parallel wrappers act on the forward of what they wrap.

    value_head: linear, from the last hidden state before each answer token to one figure; `l-ppo` alone has it.
    """

    def __init__(self, llava: ExitModel, *, value: bool) -> None:
        super().__init__()
        self.llava, self.model = llava, llava.model
        width = llava.model.config.text_config.hidden_size
        self.value_head = nn.Linear(width, 1) if value else None
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(self, ids: Tensor, where: Tensor, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [B, A, V] at answer positions and values [B, A] (None without a value head); see `model.answer_hidden`."""
        hidden = answer_hidden(self.llava, ids, where, states)
        values = None if self.value_head is None else self.value_head(hidden).squeeze(-1).float()
        return self.model.lm_head(hidden), values


@dataclass
class Trainer:
    """What a run is made from, and what changes in it.

    policy: what `accelerator` prepared; it wraps `llava.model`, in which `peft` (None for full tuning) sits in place.
    frozen: the untouched language model and head, for full tuning alone. params: what is trained.
    state: small figures that a resumed run needs beside weights and optimizer.
    tokens: positions that the language model has processed; a backward pass counts as two forward ones.
    """

    llava: ExitModel
    accelerator: Accelerator
    policy: Any
    peft: Any
    frozen: tuple[nn.Module, nn.Module] | None
    config: AlignConfig
    examples: list[Example]
    exits: tuple[int, ...]
    params: list[nn.Parameter]
    optimizer: Any
    identity: dict[str, Any]
    watch: Watch | None
    state: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    pairs: dict[int, list[Any]] = field(default_factory=dict)
    reward: Any = None

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def sharded(self) -> bool:
        """Whether FSDP has dealt the weights out among the processes."""
        return isinstance(self.policy, FSDPModule)

    def mine(self, rows: Sequence[Any]) -> list[Any]:
        """This process's rows of an update."""
        return list(rows[self.accelerator.process_index :: self.world])

    def total(self, value: Tensor) -> Tensor:
        """The sum of a figure over all processes."""
        return self.accelerator.reduce(value.detach(), "sum") if self.world > 1 else value.detach()

    def share(self, weight: Tensor) -> Tensor:
        """What a mean over this process's rows is multiplied by, so that the mean over processes is the mean over all rows.

        weight: the sum of this process's weights.
        """
        weight = weight.detach().float()
        return weight * self.world / self.total(weight).clamp(min=1e-12)

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Examples as a batch on the run's device."""
        return collate(examples, self.llava.pad_id).to(self.llava.device)

    def states(self, features: Features, rows: Sequence[int], depths: Sequence[int]) -> Tensor:
        """Exit states [B, P, W] of each row at its depth, on the run's device."""
        return torch.stack([features.states[at] for at in zip(rows, depths, strict=True)]).float().to(self.llava.device)

    def harm_weights(self, depths: Sequence[int]) -> Tensor:
        """How many times a harmful row counts at each depth [B]."""
        config, focused = self.config, focused_exits(self.config, self.exits, self.llava.reference_depth)
        weights = [
            config.focus_harm_weight
            if depth in focused
            else (config.shallow_harm_weight if depth < min(focused) else config.harm_weight)
            for depth in depths
        ]
        return torch.tensor(weights, device=self.llava.device)

    def forward(self, batch: Batch, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """The policy's logits and values; counts tokens as for a forward pass, and for a backward one where there will be
        one."""
        self.tokens += batch.ids.numel() * (3 if torch.is_grad_enabled() else 1)
        with autocast(self.config.precision, self.llava.device.type):
            logits, values = self.policy(batch.ids, batch.where, states)
        return logits.float(), values

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Whole weights in every process for as long as the block lasts, where FSDP has dealt them out.

        For what calls parts of the model by themselves, or one process oftener than another, as sampling does.
        """
        parts = [module for module in self.policy.modules() if isinstance(module, FSDPModule)]
        if parts:
            self.policy._get_fsdp_state()._lazy_init()  # else the part that is called first takes itself for the whole
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(part is not self.policy, recurse=False)

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """The model as it was before the run (the reference policy), for as long as the block lasts."""
        if self.peft is not None:
            with self.peft.disable_adapter():
                yield
            return
        llava = self.llava
        own = llava.language, llava.model.lm_head
        put_language(llava, *(self.frozen or own))
        try:
            yield
        finally:
            put_language(llava, *own)

    def descend(self, loss: Tensor, place: str) -> dict[str, float]:
        """One optimizer step; nothing moves where the loss or its gradient is beyond bounds.

        Args:
            loss: this process's share of the loss; the mean over processes is the loss.
            place: which update and depth this is, for the error.

        Raises:
            DivergedError: a loss or gradient that is not finite, or a loss beyond `config.max_loss`.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        norm = float(self.accelerator.clip_grad_norm_(self.params, 1.0))
        value = float(self.total(loss)) / self.world
        if not (math.isfinite(value) and math.isfinite(norm)) or value > self.config.max_loss:
            raise DivergedError(
                f"loss {value:g}, gradient norm {norm:g} at {place}",
                expected=f"a finite loss of at most {self.config.max_loss:g}",
                todo="run again with a lower lr",
            )
        self.optimizer.step()
        return {"loss": value, "grad_norm": norm}


def make_policy(
    llava: ExitModel, config: AlignConfig, *, value: bool
) -> tuple[Policy, Any, tuple[nn.Module, nn.Module] | None]:
    """Make the language model trainable, the tower and the projector stay frozen.

    Returns:
        The policy; the peft model around `llava.model` (None for full tuning); the frozen language model and head (for full
        tuning alone: an adapter can be turned off instead).

    Raises:
        ConfigError: an adapter target that the language model does not have.
    """
    language = llava.language
    if config.gradient_checkpointing:
        language.gradient_checkpointing_enable({"use_reentrant": False})
    if config.tune != LORA:
        frozen = copy.deepcopy(language).requires_grad_(False), copy.deepcopy(llava.model.lm_head).requires_grad_(False)
        for name, weight in language.named_parameters():
            weight.requires_grad_(config.optimizer != MUON or (name.startswith("layers.") and weight.ndim == 2))
        llava.model.lm_head.requires_grad_(config.optimizer != MUON)
        return Policy(llava, value=value), None, frozen
    import peft

    lora = config.lora
    wrapped = peft.get_peft_model(
        llava.model,
        peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            bias="none",
            target_modules=target_modules(llava, lora.targets),
        ),
    )
    return Policy(llava, value=value), wrapped, None


def target_modules(llava: ExitModel, targets: tuple[str, ...]) -> list[str]:
    """Full names of the language model's layers that end in one of `targets`; the tower has layers of the same names.

    Raises:
        ConfigError: a target that the language model does not have.
    """
    inside = [name for name, _ in llava.model.named_modules() if f"{llava.recipe.decoder}." in name]
    for target in targets:
        if not any(name.split(".")[-1] == target for name in inside):
            raise ConfigError(
                f"the language model has no layer {target!r}",
                where="lora.targets",
                expected="names of its linear layers",
                todo="q_proj, k_proj, v_proj, o_proj, gate_proj, ...",
            )
    return [name for name in inside if name.split(".")[-1] in targets]


def make_optimizer(config: AlignConfig, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that a config asks for; no weight decay."""
    if config.optimizer == MUON:
        return torch.optim.Muon(params, lr=config.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return torch.optim.AdamW(params, lr=config.lr, weight_decay=0.0)


def learning_rate(config: AlignConfig, number: int) -> float:
    """Linear warm-up, then a cosine to a tenth.

    >>> learning_rate(AlignConfig(steps=100, warmup=0.1, lr=1e-3), 9)
    0.001
    """
    warm = max(1, round(config.steps * config.warmup))
    if number < warm:
        return config.lr * (number + 1) / warm
    along = (number - warm) / max(1, config.steps - warm)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * along)))
