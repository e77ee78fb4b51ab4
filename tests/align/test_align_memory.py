"""The memory that a run needs: hand arithmetic on the tiny model, what torch really saves, and what a process really took."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_checkpoint import find_config, make_checkpoint
from safetensors.torch import save_file

from edgesafe.align import memory
from edgesafe.align.config import read_config
from edgesafe.align.data import collate
from edgesafe.align.memory import Memory, describe, estimate
from edgesafe.align.objectives.ppo import PpoConfig
from edgesafe.align.policy import make_policy
from edgesafe.align.prepare import prepare
from edgesafe.align.settings import AlignConfig, EvalConfig, LoraConfig
from edgesafe.align.sizes import Lengths, read_headers, read_lengths, read_sizes
from edgesafe.checkpoint.exit_model import load
from edgesafe.errors import ConfigError, InputError

CONFIGS = Path(memory.__file__).parent / "configs"
MIB = 2**20
# The estimate is for people who choose a batch size. The worst figure measured is 1.22 (see `memory.estimate`).
FACTOR = 1.35


def _config(rows, **changes) -> AlignConfig:
    base = AlignConfig(
        data=str(rows), tune="lora", steps=6, batch_size=4, reference_rows=2, precision="fp32", lora=LoraConfig(r=4, alpha=8)
    )
    return dataclasses.replace(base, **changes)


def test_the_headers_give_every_weight_and_load_none(tiny_llava, llava):
    shapes, stored = read_headers(tiny_llava)
    assert sum(torch.Size(s).numel() for s in shapes.values()) == sum(p.numel() for p in llava.model.parameters())
    assert stored == (tiny_llava / "model.safetensors").stat().st_size


def test_weights_and_adapter_by_hand(tiny_llava, rows, llava):
    # A block of width 64, MLP 512, rank 4: q, k, v, o take 4 (64 + 64) = 512 each, gate, up, down 4 (64 + 512) = 2304 each:
    # 8960, two blocks 17920. Muon: adapter, gradient and one momentum, 4 bytes each.
    need = estimate(tiny_llava, _config(rows))
    assert need.trained == 17920 * 3 * 4 / MIB
    assert need.weights == sum(p.numel() for p in llava.model.parameters()) * 4 / MIB and need.frozen == 0
    # AdamW has two moments, a value head 64 + 1 values more, and the best look's copy is one more.
    ppo = _config(rows, method="l-ppo", optimizer="adamw")
    assert estimate(tiny_llava, ppo).trained == (17920 + 65) * 4 * 4 / MIB
    chosen = dataclasses.replace(ppo, eval=EvalConfig(choose=True))
    assert estimate(tiny_llava, chosen).trained == (17920 + 65) * 5 * 4 / MIB


def test_the_recipe_for_seven_billion_weights_fits_the_gpu_that_it_names(tmp_path):
    folder = make_checkpoint(find_config("llava-1.5-7b"), tmp_path / "m", empty=True)
    recipe = read_config(CONFIGS / "llava-1.5-7b.toml", data="rows-that-are-not-there")
    need = estimate(folder, recipe)
    assert need.weights == pytest.approx(7_063_427_072 * 4 / MIB)
    assert need.total / 1024 < 80e9 / 2**30
    assert estimate(folder, dataclasses.replace(recipe, gradient_checkpointing=False)).total / 1024 > 141e9 / 2**30


def test_full_tuning_keeps_a_copy_and_trains_all_of_the_language_model(tiny_llava, rows, llava):
    need = estimate(tiny_llava, _config(rows, tune="full", optimizer="adamw"))
    language = sum(p.numel() for p in llava.model.model.language_model.parameters()) + llava.model.lm_head.weight.numel()
    assert need.frozen == language * 4 / MIB and need.trained == 3 * language * 4 / MIB  # gradient, two moments


def test_full_tuning_by_muon_trains_the_matrices_of_the_blocks_and_the_output_layer(tiny_llava, rows):
    # Width 64, MLP 512: 4 x 64 x 64 and 3 x 64 x 512 a block, two blocks; gradient and one momentum.
    config = _config(rows, tune="full", lr=1e-3)
    output = 64 * read_headers(tiny_llava)[0]["language_model.lm_head.weight"][0]
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 512) + output
    assert estimate(tiny_llava, config).trained == 2 * matrices * 4 / MIB
    t = prepare(tiny_llava, config)
    assert sum(p.numel() for p in t.params) == matrices and {p.ndim for p in t.params} == {2}
    assert any(p is t.llava.model.lm_head.weight for p in t.params)
    assert not any(p is t.llava.language.get_input_embeddings().weight for p in t.params)


def test_muon_leaves_an_output_layer_alone_that_is_the_embedding(tiny_llava, rows):
    llava = load(tiny_llava)
    llava.model.lm_head.weight = llava.language.get_input_embeddings().weight
    config = _config(rows, tune="full", lr=1e-3)
    policy, _, _ = make_policy(llava, config, value=False)
    assert sum(p.numel() for p in policy.parameters() if p.requires_grad) == 2 * (4 * 64 * 64 + 3 * 64 * 512)
    make_policy(llava, dataclasses.replace(config, optimizer="adamw"), value=False)
    assert llava.model.lm_head.weight.requires_grad


def test_the_adapter_is_the_one_that_peft_makes(tiny_llava, rows):
    t = prepare(tiny_llava, _config(rows))
    shapes = {name: s for name, s in read_headers(tiny_llava)[0].items() if "vision" not in name and "projector" not in name}
    assert memory.trained_values(shapes, t.config) == sum(p.numel() for p in t.params)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_block_keeps_what_torch_saves_for_the_backward_pass(tiny_llava, rows, tune):
    t = prepare(tiny_llava, _config(rows, tune=tune, optimizer="adamw"))
    s = read_sizes(tiny_llava, read_headers(tiny_llava)[0], t.config)
    batch = t.batch(t.examples[:6])
    states = torch.randn(6, s.image_tokens, 32)
    fixed = {w.untyped_storage().data_ptr() for w in t.llava.model.parameters()}
    saved: dict[int, int] = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in fixed:
            saved.setdefault(storage.data_ptr(), storage.nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        t.llava.model.model.language_model(inputs_embeds=_inputs(t, batch, states), use_cache=False)
    real = sum(saved.values()) / 4 / batch.ids.numel() / s.blocks
    assert s.layer == pytest.approx(real, rel=0.05)
    for wrong in (s.layer - 4 * 64, s.layer + 4 * 64, s.layer - 512):  # a norm, a projection, an array of the MLP more or less
        assert wrong != pytest.approx(real, rel=0.05)


def _inputs(t, batch, states):
    from edgesafe.checkpoint.exit_model import embed

    return embed(t.llava, batch.ids, states)


def test_phases_by_hand(tiny_llava, rows):
    shapes, _ = read_headers(tiny_llava)
    config = _config(rows, method="l-ppo", optimizer="adamw", sections={"ppo": PpoConfig(minibatches=3, max_new_tokens=10)})
    s = read_sizes(tiny_llava, shapes, config)
    vocabulary = shapes["language_model.lm_head.weight"][0]
    # 72 px in patches of 12 are 36; keys and values of 64 in 2 blocks; a block keeps 4 x 64 + 4 x 64 + 4 x 512 + 7 x 4 = 2588.
    assert (s.image_tokens, s.kv, s.blocks, s.width, s.layer, s.vocabulary) == (36, 2 * 64 * 2, 2, 64, 2588, vocabulary)
    lengths = Lengths(request=60, answer=10, rows=48)
    phases = memory.working(s, config, lengths, 1)
    # (4 + 2) / 3 = 2 rows of 70 tokens, 2 blocks and one at work, and 5 arrays of logits.
    want = 4 * (memory.FRAGMENTED * 2 * 70 * 3 * 2588 + 2 * 5 * 10 * vocabulary)
    assert phases["an update"] == pytest.approx(want)
    twice = memory.working(s, dataclasses.replace(config, gradient_checkpointing=True), lengths, 1)
    assert twice["an update"] == pytest.approx(4 * (memory.FRAGMENTED * 2 * 70 * (2 * 64 + 2 * 2588) + 2 * 5 * 10 * vocabulary))
    halved = memory.working(
        s, dataclasses.replace(config, sections={"ppo": PpoConfig(minibatches=1, max_new_tokens=10)}), lengths, 2
    )
    assert halved["an update"] == pytest.approx(1.5 * want)  # 3 rows a process instead of 2
    longer = dataclasses.replace(lengths, answer=32)  # as many tokens as the answers of a pair may have
    dpo = memory.working(s, dataclasses.replace(config, method="l-dpo"), longer, 1)
    sft = memory.working(s, dataclasses.replace(config, method="l-sft"), longer, 1)
    # Two answers for each row, and the reference policy's logits.
    assert 2 * sft["an update"] < dpo["an update"] < 3 * sft["an update"]
    assert dpo["an update"] == memory.working(s, dataclasses.replace(config, method="l-dpo"), lengths, 1)["an update"]


def test_kept_features_stay_below_their_limit(tiny_llava, rows):
    config = _config(rows, method="l-sft", steps=10_000)
    # 48 rows at 4 exits and the reference depth, 36 patches of width 32, two bytes each.
    assert estimate(tiny_llava, config).cache == pytest.approx(48 * 5 * 36 * 32 * 2 / MIB)
    # Without a cache an update's own: 4 rows at its exit, 2 of them at the reference depth too.
    assert (config.batch_size, config.reference_rows) == (4, 2)
    assert estimate(tiny_llava, dataclasses.replace(config, cache_gib=0.0)).cache == pytest.approx((4 + 2) * 36 * 32 * 2 / MIB)


def test_lengths_are_those_of_the_rows_and_an_assumption_without_them(tiny_llava, rows, llava):
    t = prepare(tiny_llava, _config(rows))
    found = read_lengths(tiny_llava, t.config, 36)
    longest = collate(t.examples, 0).ids.shape[1]
    assert longest <= found.request + found.answer <= longest + 24 and found.rows == 48  # of different rows
    assumed = read_lengths(tiny_llava, AlignConfig(data="nowhere"), 36)
    assert assumed == Lengths(36 + 48 + 16, 24, 0)


def _bigger(folder: Path) -> Path:
    """Wide enough that activations and weights show beside the libraries."""
    from transformers import LlavaForConditionalGeneration

    from edgesafe.reference.recipe import Recipe, make_config
    from edgesafe.reference.tokenizer import write_processor

    processor = write_processor(folder)
    recipe = Recipe(blocks=4, vision_width=64, vision_heads=2, text_layers=8, text_width=512, text_heads=8)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(make_config(recipe, processor.tokenizer)).save_pretrained(folder)
    return folder


# VmHWM, because what getrusage says of a child starts at its parent's size.
_PEAK = """import sys
from pathlib import Path
from edgesafe.cli import main
code = main(sys.argv[1:])
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
sys.exit(code)
"""


def _align(model: Path, rows, folder: Path, batch_size: int) -> tuple[AlignConfig, float, list[str]]:
    """The settings of a run of `align`, the MiB that its process took at most, and what it said."""
    folder.mkdir()
    toml = f'method = "l-sft"\nsteps = 1\nbatch_size = {batch_size}\nreference_rows = 4\nprecision = "fp32"\ntune = "lora"\n'
    (folder / "c.toml").write_text(toml)
    argv = ["align", str(model), "--config", str(folder / "c.toml"), "--data", str(rows), "--out", str(folder / "out")]
    # One thread, since each has buffers of its own; and freed tensors go back at once. On glibc's heap the same update takes
    # between 780 and 1360 MiB, by which of its holes the next tensors happen to fit.
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"}
    child = subprocess.run([sys.executable, "-c", _PEAK, *argv], env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]
    config = read_config(folder / "c.toml", data=str(rows))
    return config, int(child.stdout.split()[-1]) / 1024, [line.strip() for line in child.stderr.splitlines()]


def test_the_estimate_grows_as_what_a_process_took(rows, tmp_path, monkeypatch):
    model = _bigger(tmp_path / "bigger")
    few, low, lines = _align(model, rows, tmp_path / "few", 8)
    many, high, _ = _align(model, rows, tmp_path / "many", 32)
    plans = [number for number, line in enumerate(lines) if line.startswith("needs about")]
    assert len(plans) == 1 and lines[plans[0]].startswith(estimate(model, few).line())
    assert plans[0] < next(number for number, line in enumerate(lines) if line.startswith("tower"))  # before any work
    monkeypatch.setattr(memory, "FRAGMENTED", 1.0)  # no holes in these processes
    least, most = estimate(model, few).total, estimate(model, many).total
    took, counted = high - low, most - least
    print(f"estimated {least:.0f} and {most:.0f} MiB, took {low:.0f} and {high:.0f} MiB")
    assert took > memory.LIBRARIES_MIB / 2  # there was something to estimate
    assert took / FACTOR < counted < took * FACTOR
    assert least > low and most > high  # nobody is promised less than the tensors alone take
    for wrong in (counted / 2, counted * 2):
        assert not took / FACTOR < wrong < took * FACTOR


def test_too_little_memory_is_said_and_processes_count():
    need = Memory(2048, 0, 0, 0, 1024, "an update", 0, libraries=0)
    assert "4.0 GiB are free" in describe(need, 4096.0) and "MORE" not in describe(need, 4096.0)
    assert "MORE than the 4.0 GiB" in describe(need, 4096.0, 2)
    assert describe(need, None) == need.line()
    assert Memory(2048, 0, 0, 0, 1, "x", 5000, libraries=0).total == 7048  # reading the file is the peak


def test_a_checkpoint_that_cannot_be_read_is_left_to_loading(tiny_llava, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 32)
    for folder, match in ((tmp_path, "damaged"), (tmp_path / "none", "no such folder")):
        with pytest.raises(InputError, match=match):
            estimate(folder, AlignConfig())
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    for config in (
        {"model_type": "llama"},
        {"text_config": {}, "vision_config": {"hidden_size": 8, "num_hidden_layers": 2, "patch_size": 0}},
        {"text_config": {}, "vision_config": {"hidden_size": 8, "num_hidden_layers": 2}},  # weights without an embedding
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=r"config\.json of a vision-language checkpoint"):
            estimate(tmp_path, AlignConfig())
    memory.say_need(tmp_path, AlignConfig())
    assert capsys.readouterr().err == ""
    assert load(tiny_llava)  # and one that can be read still is
