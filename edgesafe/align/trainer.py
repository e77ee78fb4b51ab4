"""A run: what it is made from, the policy that changes, and one step down a loss on one or many processes.

An `Objective` says what the run works towards; `edgesafe.align.objectives` has them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from edgesafe.align.data import Batch, Example, collate
from edgesafe.align.features import Features
from edgesafe.align.reward.overlap import Reward
from edgesafe.align.sampler import focused_exits
from edgesafe.align.settings import AlignConfig, Limits, Section, no_limits
from edgesafe.align.sizes import Footprint, Lengths, Sizes, wanted_answers
from edgesafe.align.watch import Watch
from edgesafe.checkpoint.exit_model import ExitModel, autocast, decode, ids_at, put_language
from edgesafe.errors import DivergedError
from edgesafe.format.exits import Exit

# What updates draw from, by exit: items with their training row as `row`.
Pools = Mapping[Exit, Sequence[Any]]


def rows_only(t: Trainer) -> Pools | None:
    """Updates draw from the training rows at every exit; nothing has to be made first."""
    return None


@dataclass(frozen=True)
class Objective:
    """What a run works towards: all in which one `method` differs from another.

    name: what `method` in a config says. update: one update of the policy, from (run, features, exit, the drawn items of all
        processes, number of the update) to figures for the metrics. The items are row numbers, or what `prepare` made.
    needs_teacher: `Features.teacher` has the untouched model's answers at its reference. needs_reward: the run has a
        reward. has_value_head: the policy gives a value for each answer token too.
    prepare: called before the first update, and again by a resumed run, with the untouched model. It returns what updates draw
        from, by exit; each item has its training row as `row`. Exits that it leaves out are not trained. None: the
        training rows, at every exit.
    memory: from (settings, sizes of the model, lengths of the data, rows of an update in a process) to the memory plan.
    section: its own table in the config. limits: what a config with this method must keep besides, from (config, processes).
    """

    name: str
    update: Callable[[Trainer, Features, Exit, Sequence[Any], int], dict[str, float]]
    needs_teacher: bool = False
    needs_reward: bool = False
    has_value_head: bool = False
    prepare: Callable[[Trainer], Pools | None] = rows_only
    memory: Callable[[AlignConfig, Sizes, Lengths, int], Footprint] = wanted_answers
    section: Section[Any] | None = None
    limits: Callable[[AlignConfig, int], Limits] = no_limits


@dataclass
class Trainer:
    """What a run is made from, and what changes in it.

    policy: what `accelerator` prepared; it wraps `llava.model`, in which `peft` (None for full tuning) sits in place.
    frozen: the untouched language model and head, for full tuning alone. params: what is trained.
    state: small figures that a resumed run needs beside weights and optimizer.
    pools: what the objective's `prepare` returned. reward: where the objective needs one.
    tokens: positions that the language model has processed; a backward pass counts as two forward ones.
    """

    llava: ExitModel
    accelerator: Accelerator
    policy: Any
    peft: Any
    frozen: tuple[nn.Module, nn.Module] | None
    config: AlignConfig
    objective: Objective
    examples: list[Example]
    exits: tuple[Exit, ...]
    params: list[nn.Parameter]
    optimizer: Any
    identity: dict[str, Any]
    watch: Watch | None
    state: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    pools: Pools | None = None
    reward: Reward | None = None

    @property
    def world(self) -> int:
        """Processes of the run."""
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

    def at_exits(self, examples: Sequence[Example], exits: Sequence[Exit]) -> list[Example]:
        """Each example as its exit reads it: with fewer image tokens where the exit has fewer."""
        pairs = zip(examples, exits, strict=True)
        return [replace(e, prompt=tuple(ids_at(self.llava, e.prompt, exit))) for e, exit in pairs]

    def states(self, features: Features, rows: Sequence[int], exits: Sequence[Exit]) -> Tensor:
        """Exit states [B, P, W] of each row at its exit, on the run's device."""
        return torch.stack([features.states[at].float() for at in zip(rows, exits, strict=True)]).to(self.llava.device)

    def harm_weights(self, exits: Sequence[Exit]) -> Tensor:
        """How many times a harmful row counts at each exit [B]."""
        config, focused = self.config, focused_exits(self.config, self.exits, self.llava.reference)
        weights = [
            config.focus_harm_weight
            if exit in focused
            else (config.shallow_harm_weight if exit < min(focused) else config.harm_weight)
            for exit in exits
        ]
        return torch.tensor(weights, device=self.llava.device)

    def score(self, examples: Sequence[Example], answers: Sequence[Sequence[int]]) -> list[float]:
        """The reward of an answer (its ids) to each example's request."""
        assert self.reward is not None, f"{self.objective.name} does not say needs_reward"
        rows = [e.row for e in examples if e.row is not None]
        assert len(rows) == len(examples), "an example without its row can't be scored"
        return self.reward(rows, [decode(self.llava, ids) for ids in answers])

    def forward(self, batch: Batch, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """The policy's logits [B, A, V] and values [B, A]; counts the tokens, those of a backward pass to come too."""
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
            place: which update and exit this is, for the error.

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
