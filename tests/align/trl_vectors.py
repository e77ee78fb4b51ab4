"""Runs TRL's own PPO functions on fixed numbers and prints what they say; `trl_vectors.json` is the output.

    pip download --no-deps -d wheels trl==0.11.4 && pip download --no-deps -d wheels trl==1.16.0
    python tests/align/trl_vectors.py wheels > tests/align/trl_vectors.json

TRL is no test dependency: importing it takes datasets, pyarrow and pandas. So the functions are taken out of the wheels'
source and run as they are. 0.11.4's PPO trainer has its arithmetic in methods; 1.16.0 has no PPO, but GRPO's loss and k3.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch


def functions(wheel: Path, module: str, *names: str) -> dict[str, Any]:
    """Functions, methods and classes of a module in a wheel, by name, run from their source alone."""
    tree = ast.parse(zipfile.ZipFile(wheel).read(module))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names]
    space: dict[str, Any] = {"torch": torch, "np": np, "F": torch.nn.functional, "Optional": None | int}
    future = ast.ImportFrom(module="__future__", names=[ast.alias(name="annotations")], level=0)
    code = ast.fix_missing_locations(ast.Module(body=[future, *found], type_ignores=[]))
    exec(compile(code, f"{wheel.name}/{module}", "exec"), space)
    assert {node.name for node in found} == set(names), names
    return space


def draws() -> dict[str, torch.Tensor]:
    """Inputs: 3 answers of 5, 3 and 1 tokens padded to 5; rounded, so that the file holds exactly what TRL saw."""
    rng = np.random.default_rng(7)

    def normal(scale: float, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(0, scale, shape).round(3))

    logprobs = -normal(1.5, 3, 5).abs()
    return {
        "mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]),
        "scores": normal(1, 3),
        "logprobs": logprobs,
        "ref_logprobs": (logprobs + normal(0.5, 3, 5)).clamp(max=-0.001),
        "new_logprobs": (logprobs + normal(0.3, 3, 5)).clamp(max=-0.001),
        "values": normal(1, 3, 5),
        "new_values": normal(1, 3, 5),
        "logits": normal(2, 3, 5, 4),
        "targets": torch.from_numpy(rng.integers(0, 4, (3, 5))),
    }


def old(wheel: Path, x: dict[str, torch.Tensor], settings: dict[str, float]) -> dict[str, Any]:
    """0.11.4: rewards, advantages, returns, both losses, the KL controller."""
    core = functions(wheel, "trl/core.py", "masked_mean", "masked_var", "masked_whiten", "clip_by_value", "entropy_from_logits")
    ppo = functions(wheel, "trl/trainer/ppo_trainer.py", "compute_rewards", "_kl_penalty", "compute_advantages", "loss")
    ppo |= {name: core[name] for name in ("masked_mean", "masked_var", "masked_whiten", "clip_by_value", "entropy_from_logits")}
    ppo["flatten_dict"] = lambda stats: stats
    config = SimpleNamespace(kl_penalty="kl", whiten_rewards=False, vf_coef=1.0, ratio_threshold=10.0, **settings)
    me = SimpleNamespace(config=config, kl_ctl=SimpleNamespace(value=settings["kl_coef"]))
    me._kl_penalty = lambda *both: ppo["_kl_penalty"](me, *both)
    rewards, _, _ = ppo["compute_rewards"](me, x["scores"], x["logprobs"], x["ref_logprobs"], x["mask"])
    values, advantages, returns = ppo["compute_advantages"](me, x["values"], rewards, x["mask"])
    policy, value, stats = ppo["loss"](
        me, x["logprobs"], values, x["logits"], x["new_values"], x["new_logprobs"], x["mask"], advantages, returns
    )
    controller = functions(wheel, "trl/trainer/utils.py", "AdaptiveKLController")["AdaptiveKLController"](0.1, 6.0, 10)
    kl_coefs = []
    for kl in (9.0, 6.3, 5.1, 0.0):
        controller.update(kl, 1)
        kl_coefs.append(controller.value)
    return {
        "token_rewards": rewards,
        "whitened_advantages": advantages,
        "returns": returns,
        "policy_loss": policy,
        "value_loss": value,
        "clipfrac": stats["policy"]["clipfrac"],
        "masked_mean": core["masked_mean"](x["values"], x["mask"]),
        "masked_var": core["masked_var"](x["values"], x["mask"], unbiased=False),
        "kl_coefs": kl_coefs,
    }


def new(wheel: Path, x: dict[str, torch.Tensor], settings: dict[str, float], advantages: torch.Tensor) -> dict[str, Any]:
    """1.16.0: GRPO's token loss, a masked mean ("bnpo") of the clipped term and 0.7 times k3; log-probabilities."""
    utils = functions(wheel, "trl/trainer/utils.py", "selective_log_softmax", "nanmin", "nanmax")
    utils["is_triton_available"] = lambda: False
    space = functions(wheel, "trl/trainer/grpo_trainer.py", "_compute_loss")
    space |= {name: utils[name] for name in ("nanmin", "nanmax")}
    me = MagicMock()
    me._get_per_token_logps_and_entropies = lambda *_, **__: (x["new_logprobs"], torch.zeros_like(x["new_logprobs"]), None)
    me.configure_mock(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.7,
        loss_type="bnpo",
        epsilon_low=settings["cliprange"],
        epsilon_high=settings["cliprange"],
        use_vllm=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    me.args.configure_mock(delta=None, use_bias_correction_kl=False)
    me.accelerator.reduce = lambda value, reduction: value
    me.accelerator.gather = lambda value: value
    ids = torch.zeros(3, 5, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": x["mask"],
        "advantages": advantages,
        "old_per_token_logps": x["logprobs"],
        "ref_per_token_logps": x["ref_logprobs"],
    }
    loss = space["_compute_loss"](me, None, inputs)
    picked = utils["selective_log_softmax"](x["logits"], x["targets"], temperature=0.7)
    return {"clipped_plus_k3": loss, "k3": me._metrics["train"]["kl"][0], "token_logprobs": picked}


def plain(value: Any) -> Any:
    """Tensors as nested lists of rounded numbers."""
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return round(value, 9) if isinstance(value, float) else value


def main(folder: Path) -> None:
    """Print inputs and results."""
    settings = {"gamma": 0.97, "lam": 0.9, "cliprange": 0.2, "cliprange_value": 0.3, "kl_coef": 0.05}
    x = draws()
    before = old(folder / "trl-0.11.4-py3-none-any.whl", x, settings)
    after = new(folder / "trl-1.16.0-py3-none-any.whl", x, settings, before["whitened_advantages"])
    result = {"settings": settings, "inputs": x, "trl-0.11.4": before, "trl-1.16.0": after}
    lines = [f" {json.dumps(key)}: {json.dumps(plain(value))}" for key, value in result.items()]
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
