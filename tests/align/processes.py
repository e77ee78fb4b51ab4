"""Runs `edgesafe align` in a process of its own, or as one of several: `torchrun ... tests/align/processes.py JOBS.json`.

JOBS.json is a list of jobs: "argv" is the command, "break" a name of BREAKS, "stop" the update that raises, "kill" the
optimizer step before which SIGKILL comes. Several runs in one start, because starting two interpreters with torch takes longer
than the runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml

import edgesafe.align
from edgesafe.align import train as train_module
from edgesafe.align.objectives import l_dpo, l_ppo
from edgesafe.align.trainer import Trainer
from edgesafe.cli import main

CONFIGS = Path(edgesafe.align.__file__).parent / "configs" / "accelerate"
BREAKS = {
    "every process's mean counts the same": (Trainer, "share", lambda self, weight: torch.ones(())),
    "all processes take the first one's rows": (Trainer, "mine", lambda self, rows: list(rows[:: self.world])),
    "advantages whitened a process": (l_ppo, "_moments", lambda *_: None),
}


class _Stopped(Exception):
    """What stands for a run that was cut."""


def run(job: dict) -> None:
    """One job; raises where the command fails."""
    with pytest.MonkeyPatch.context() as patch:
        # No answer of random weights is good enough to be chosen.
        patch.setattr(l_dpo, "is_pair", lambda chosen, rejected, config: chosen > rejected)
        if job.get("break"):
            patch.setattr(*BREAKS[job["break"]])
        if job.get("stop"):
            real = train_module._update

            def cut(t, features, exit, rows, number):
                if number == job["stop"]:
                    raise _Stopped
                return real(t, features, exit, rows, number)

            patch.setattr(train_module, "_update", cut)
        if job.get("kill"):
            step, steps = Trainer.descend, []

            def killed(self, loss, place):
                steps.append(1)
                if len(steps) == job["kill"]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(self, loss, place)

            patch.setattr(Trainer, "descend", killed)
        try:
            code = main(job["argv"])
        except _Stopped:
            return
        if code:
            sys.exit(code)


def deal_out() -> None:
    """Make accelerate use FSDP on CPUs, which it keeps for GPUs: its own code, over gloo, with the shipped settings."""
    from accelerate import DistributedType, PartialState

    settings = yaml.safe_load((CONFIGS / "fsdp.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    for key, value in settings.items():
        os.environ[key.upper().replace("LAYER_CLS", "CLS")] = str(value)
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    if "--shard" in sys.argv:
        deal_out()
    for each in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run(each)
