"""Makes a run: checks the settings against the processes, loads model, data and reward, and wraps the policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType

from edgesafe.align.config import LADDER, check_trained, recorded
from edgesafe.align.data import read_examples
from edgesafe.align.objectives.table import find_objective
from edgesafe.align.policy import make_optimizer, make_policy
from edgesafe.align.reward.open import open_reward
from edgesafe.align.reward.overlap import Reward
from edgesafe.align.settings import MUON, AlignConfig, check_limits, with_tune
from edgesafe.align.trainer import Objective, Trainer
from edgesafe.align.watch import open_watch
from edgesafe.checkpoint.exit_model import load
from edgesafe.checkpoint.geometry import check_exits
from edgesafe.checkpoint.load import bf16_is_fast
from edgesafe.errors import ConfigError
from edgesafe.format.exits import parse_exits
from edgesafe.format.files import digest_folder


def prepare(model_dir: Path, config: AlignConfig) -> Trainer:
    """Load model and data, and make the language model trainable without changing what it says.

    Raises:
        ConfigError: no data, exits or layers that the model does not have, or settings that don't suit the processes.
        InputError: the model or the data can't be used.
    """
    objective, config = find_objective(config.method), _with_precision(config)
    if not config.data:
        raise ConfigError("no training data", where="data", expected="a folder of training rows", todo="name one with --data")
    torch.manual_seed(config.seed)
    accelerator = _accelerator(config, objective)
    llava = load(model_dir)
    parts = (llava.language, llava.model.lm_head)
    config = with_tune(config, sum(p.numel() for part in parts for p in part.parameters()))
    # On CPUs the backward pass of sdpa is slower than the plain one in bfloat16, and faster in float32.
    slow = config.precision == "bf16" and accelerator.device.type == "cpu"
    llava.model.set_attn_implementation("eager" if slow else "sdpa")
    exits = parse_exits(config.exits, llava.n_blocks, None)
    check_exits(exits, llava.recipe, llava.geometry)
    if config.ladder:
        check_trained(parse_exits(config.ladder, llava.n_blocks), exits, LADDER)
    examples = read_examples(Path(config.data), llava)
    watch = open_watch(config.eval, (*exits, llava.reference))
    reward = open_reward(config.reward) if objective.needs_reward else None
    policy, peft, frozen = make_policy(llava, config, value=objective.has_value_head)
    optimizer = make_optimizer(config, [p for p in policy.parameters() if p.requires_grad])
    policy, optimizer = accelerator.prepare(policy, optimizer)
    for module in frozen or ():
        module.to(accelerator.device)
    return Trainer(
        llava=llava,
        accelerator=accelerator,
        policy=policy,
        peft=peft,
        frozen=frozen,
        config=config,
        objective=objective,
        examples=examples,
        exits=exits,
        params=[p for p in policy.parameters() if p.requires_grad],
        optimizer=optimizer,
        identity=_identity(model_dir, config, reward),
        watch=watch,
        reward=reward,
    )


def _with_precision(config: AlignConfig) -> AlignConfig:
    """The settings with the precision "auto" decided by this machine."""
    if config.precision != "auto":
        return config
    fast = torch.cuda.is_available() or bf16_is_fast()
    return replace(config, precision="bf16" if fast else "fp32")


def _identity(model_dir: Path, config: AlignConfig, reward: Reward | None) -> dict[str, Any]:
    """What a run is made from; one with another identity can't resume from its checkpoint."""
    return {
        "parent": {"kind": "checkpoint", "name": model_dir.name, "digest": digest_folder(model_dir)},
        "data": digest_folder(Path(config.data)),
        "config": recorded(config),
        **({} if reward is None else {"reward": reward.identity}),  # a folder of the same name may hold another model
    }


def _accelerator(config: AlignConfig, objective: Objective) -> Accelerator:
    """The processes of the run, checked against the settings."""
    # `precision` alone says what is computed in bfloat16, whatever the user's accelerate config has.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    _check_processes(config, objective, accelerator.num_processes)
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    _check_wrapper(accelerator.distributed_type, getattr(plugin, "fsdp_version", 0), config.optimizer)
    return accelerator


def _check_processes(config: AlignConfig, objective: Objective, processes: int) -> None:
    """Refuse settings by which a process gets more rows than another.

    All get as many rows, and some in each minibatch, so that they wait for each other equally often.
    """
    for key in ("batch_size", "reference_rows"):
        if getattr(config, key) % processes:
            raise ConfigError(
                f"{key} = {getattr(config, key)} does not divide among {processes} processes",
                where=key,
                expected=f"a multiple of {processes}",
                todo="change it, or start another number of processes",
            )
    check_limits(objective.limits(config, processes), f"{processes} processes")


def _check_wrapper(kind: str, version: int, optimizer: str) -> None:
    """Whole copies of the model, or FSDP of version 2, whose parts can be gathered for a while; Muon needs whole matrices."""
    if kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        return
    if kind != DistributedType.FSDP or version != 2 or optimizer == MUON:
        raise ConfigError(
            f"accelerate is set to {str(kind).rpartition('.')[2]} (version {version}), the optimizer is {optimizer}",
            where="accelerate",
            expected="data parallel, or FSDP of version 2 with adamw",
            todo='use the shipped configs/accelerate/fsdp.yaml and optimizer = "adamw"',
        )
