"""The policy: the model as training calls it, what of it is trained, and the optimizer that moves it."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from edgesafe.align.settings import LORA, MUON, AlignConfig
from edgesafe.checkpoint.exit_model import ExitModel, answer_hidden
from edgesafe.errors import ConfigError


class Policy(nn.Module):
    """The model as training calls it, in one module, because data-parallel wrappers act on the forward of what they wrap.

    value_head: linear, from the last hidden state before each answer token to one figure; None unless the objective has one.
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
        """Logits [B, A, V] at answer positions and values [B, A] (None without a value head); see `answer_hidden`."""
        hidden = answer_hidden(self.llava, ids, where, states)
        values = None if self.value_head is None else self.value_head(hidden).squeeze(-1).float()
        return self.model.lm_head(hidden), values


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
        head, embedding = llava.model.lm_head, language.get_input_embeddings()
        for weight in head.parameters():
            apart = weight.ndim == 2 and weight is not embedding.weight
            weight.requires_grad_(config.optimizer != MUON or apart)
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
    """The optimizer that a config names; no weight decay."""
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
