"""`edgesafe ship --plan`: operations against torch's own counter, what lacks refused, and nothing written."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edgesafe import machine
from edgesafe.align.memory import LIBRARIES_MIB
from edgesafe.align.settings import ADAMW, FULL, AlignConfig
from edgesafe.align.sizes import read_headers, read_sizes
from edgesafe.checkpoint.exit_model import exit_states, load
from edgesafe.cli import main
from edgesafe.errors import InputError
from edgesafe.ship_plan import plan as plan_module
from edgesafe.ship_plan.costs import Rates, count, measure_rates, update_seconds
from edgesafe_export.skeleton import open_sketch

ONE = Rates(1.0, math.inf)  # its seconds are operations


def tree(folder: Path) -> list[tuple[str, int]]:
    return sorted((path.as_posix(), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def counted(run) -> int:
    counter = FlopCounterMode(display=False)
    # The counter knows no formula of the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return int(counter.get_total_flops())


def test_operations_are_those_that_torch_counts_in_transformers_own_model(tiny_llava):
    llava, config = load(tiny_llava), AlignConfig(tune=FULL, optimizer=ADAMW, batch_size=3, reference_rows=2)
    costs = count(open_sketch(tiny_llava), read_sizes(tiny_llava, read_headers(tiny_llava)[0], config))
    side = llava.geometry.image_size
    for depth in (1, costs.reference):
        assert counted(lambda d=depth: exit_states(llava, torch.zeros(2, 3, side, side), d)) == 2 * costs.tower(depth)

    def read(rows: int, tokens: int, answered: int) -> torch.Tensor:
        states = llava.language(inputs_embeds=torch.randn(rows, tokens, llava.geometry.text_width)).last_hidden_state
        return llava.model.lm_head(states[:, -answered:]).sum()

    assert counted(lambda: read(2, 40, 7)) == 2 * costs.reading(40, 7)
    for name, weight in llava.model.named_parameters():
        weight.requires_grad_("vision" not in name)
    update = update_seconds(costs, ONE, config, 40, 7, 0) - 5 * costs.head
    # Nobody asks for the gradient of the first block's input.
    assert counted(lambda: read(5, 40, 7).backward()) == pytest.approx(update, rel=0.1)
    checkpointed = dataclasses.replace(config, gradient_checkpointing=True)
    assert update_seconds(costs, ONE, checkpointed, 40, 7, 0) - update == pytest.approx(5 * (costs.reading(40, 7) + costs.head))


def test_a_rate_is_one_that_a_machine_can_have():
    rates = measure_rates(64, 128, torch.float32, 0.02)
    assert 1e8 < rates.operations < 1e13 and 1e8 < rates.moved < 1e12


@pytest.fixture
def plan(tiny_llava, tmp_path, monkeypatch, capsys):
    """The plan of the tiny model as JSON, with options more; says how the command ended."""
    monkeypatch.setattr(plan_module, "measure_rates", lambda *_: Rates(1e11, 1e10))

    def make(*more: str) -> tuple[int, dict, str]:
        words = ["ship", str(tiny_llava), "--device", "rpi5", "--out", str(tmp_path / "out"), "--plan", "--json", *more]
        code = main(words)
        said = capsys.readouterr()
        return code, json.loads(said.out), said.err

    return make


def test_every_step_is_counted_and_nothing_is_written(plan, rows, tiny_llava, tmp_path):
    before = tree(tmp_path), tree(tiny_llava), tree(rows)
    code, own, _ = plan("--data", str(rows))
    assert code == 0 and [s["name"] for s in own["steps"]] == ["rows", "evaluate", "maps", "align", "export", "certify"]
    assert own["seconds"] == pytest.approx(sum(s["seconds"] for s in own["steps"])) and own["short"] == []
    by_name = {s["name"]: s for s in own["steps"]}
    assert min(by_name[name]["memory_mib"] for name in ("evaluate", "maps", "align")) > LIBRARIES_MIB
    assert (tree(tmp_path), tree(tiny_llava), tree(rows)) == before


def test_the_preset_is_counted_without_a_network_and_too_little_memory_is_refused(plan, tmp_path, monkeypatch):
    (settings := tmp_path / "c.toml").write_text('method = "l-ppo"\noptimizer = "adamw"\nsteps = 2\nreference_rows = 0\n')
    monkeypatch.setattr(machine, "free_mib", lambda: 300.0)
    code, made, said = plan("--preset", "public", "--config", str(settings))
    assert code == InputError.exit_code and "of memory, 0.29 GiB are free" in said
    assert "831 of the suite" in made["steps"][0]["what"] and "531 answers of the model" in made["steps"][0]["what"]
    # What an update of this method takes is not counted, and the plan says so.
    assert next(s for s in made["steps"] if s["name"] == "align")["seconds"] is None
    assert any("l-ppo" in note for note in made["notes"])
