"""`edgesafe plan`: bytes against what is written, times against hand arithmetic, and what can't be interactive said so."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from random_checkpoint import find_config, make_checkpoint

from edgesafe.cli import main
from edgesafe.device import load_device
from edgesafe.errors import InputError
from edgesafe.format import graph_io
from edgesafe.format.exits import Exit
from edgesafe_export import export as export_module
from edgesafe_export.estimate import GIB, calibration_bytes, calibration_seconds, export_bytes, graph_specs, text_bytes
from edgesafe_export.plan import _smaller, check_room, choose_ladder, describe, make_plan
from edgesafe_export.quantize import matrices, quantize, weight_bytes
from edgesafe_export.skeleton import open_sketch
from edgesafe_export.stream import scheme_of

RPI5 = load_device("rpi5")


def _plan(folder: Path, device=RPI5, exits=None, **schemes):
    sketch = open_sketch(folder)
    chosen = {"vision": device.vision_scheme, "text": device.text_scheme, **schemes}
    return make_plan(sketch, folder, folder.name, device, choose_ladder(sketch, exits), "chain", chosen)


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory) -> Path:
    """LLaVA-1.5-7B's config and headers; its weights have a length and no content."""
    folder = tmp_path_factory.mktemp("seven") / "llava-1.5-7b"
    return make_checkpoint(find_config("llava-1.5-7b"), folder, empty=True)


SCHEMES = [("int8-dynamic", "int4-block32"), ("fp32", "int8-block32"), ("int8-dynamic", "int4-block128"), ("fp32", "fp32")]
SCHEMES += [("fp32", "mixed-gptq")]


def test_a_block_s_operations_are_its_matrices_and_attention_s_two_products(trained_job):
    sketch = open_sketch(trained_job.model_dir)
    vision, tokens = sketch.family.model.config.vision_config, sketch.family.geometry.tokens
    width, inner = vision.hidden_size, vision.intermediate_size
    matrices = 2 * tokens * (4 * width * width + 2 * width * inner)
    spec = graph_specs(sketch, (Exit(1), Exit(2)), "chain", "fp32", "fp32")[graph_io.segment_path(1, 2)]
    assert spec.flops == matrices + 2 * (2 * tokens * tokens * width)


def _inputs(model: onnx.ModelProto, name: str) -> int:
    return next(tensor.dims[0] for tensor in model.graph.initializer if tensor.name == name)


@pytest.mark.parametrize("schemes", SCHEMES)
def test_bytes_are_within_two_per_cent_of_those_written(trained_job, trained_parts, tmp_path, schemes):
    sketch = open_sketch(trained_job.model_dir)
    planned = graph_specs(sketch, trained_job.ladder, "chain", *schemes)
    sums = {name: torch.eye(_inputs(model, name)) for model, _ in trained_parts.values() for name in matrices(model)}
    made = {p: (quantize(m, scheme_of(p, *schemes), hessians=sums), spec) for p, (m, spec) in trained_parts.items()}
    assert planned.keys() == made.keys()
    for path, (proto, spec) in made.items():
        assert planned[path].weight_bytes == pytest.approx(weight_bytes(proto), rel=0.02), path
        assert planned[path].flops == spec.flops, path
    export_module.write(trained_job, tmp_path / "b", made, {"vision": schemes[0], "text": schemes[1]}, {})
    written = sum(f.stat().st_size for f in (tmp_path / "b").rglob("*") if f.is_file() and "suite" not in f.parts)
    exits = ",".join(map(str, trained_job.ladder))
    plan = _plan(trained_job.model_dir, exits=exits, vision=schemes[0], text=schemes[1])
    assert plan.bundle_bytes == pytest.approx(written, rel=0.02)


def test_seven_billion_weights_on_a_pi_are_not_interactive(seven_billion):
    plan = _plan(seven_billion, text="int4-block32")
    assert plan.weights == 7_063_427_072  # transformers' own count of the published config
    assert [e.exit.depth for e in plan.exits] == [3, 6, 9, 12, 14, 17, 20, 23] and plan.reference == Exit(23)
    # 6.6 billion decoder weights (7.06 without the tower, the projector and the embedding), two operations each, over the
    # prompt, at 187 GOP/s: 42 s and more.
    least = 2 * 6.6e9 * plan.prompt_tokens / 187e9
    assert 576 < plan.prompt_tokens < 640
    assert least < plan.exits[0].ttft_ms / 1e3 < 1.1 * least
    assert plan.fits is False and plan.check == "pieces"
    # int4 in blocks of 32 with float16 scales and zero points is 0.578 bytes a weight, the head's and the table's 8 bits 1.03.
    assert plan.bundle_bytes == pytest.approx(0.578 * 6.476e9 + 2 * 1.031 * 0.131e9 + 0.313e9, rel=0.02)
    text = describe(plan)
    assert "not interactive on Raspberry Pi 5" in text and "SmolVLM-256M" in text and "beyond the budget of 10 s" in text
    assert plan.token_ms > 1e3 * 0.578 * 6.476e9 / 10e9  # the weights of a token, read once
    # From rates that were measured the same times are no floors: some 42 s fit or not where the budget is a third off.
    for budget_ms, within in ((30_000, "no"), (42_500, "perhaps"), (60_000, "yes")):
        about = describe(replace(plan, measured_on="a board", budget_ms=budget_ms))
        assert "first token s, about" in about and "measured on a board" in about
        assert [row.split()[-1] for row in about.splitlines()[2:10]] == [within] * 8


# transformers' own count of the published configs' weights, blocks, reference depth, and tiles of a picture of 640 x 480:
# SmolVLM makes it 2048 x 1536, twelve tiles of 512 and the whole; the others see a canvas of 2 x 2 tiles and the whole.
PUBLISHED = {
    "llava-1.6-mistral-7b": (7_566_747_648, 24, 23, 5),
    "llava-onevision-0.5b": (893_675_552, 26, 26, 5),
    "smolvlm-256m": (256_484_928, 12, 12, 13),
    "smolvlm2-500m": (507_482_304, 12, 12, 13),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_are_planned(tmp_path, name):
    plan = _plan(make_checkpoint(find_config(name), tmp_path / name, empty=True))
    assert (plan.weights, plan.n_blocks, plan.reference.depth, plan.tiles) == PUBLISHED[name]
    assert plan.check == "pieces"


@pytest.mark.parametrize(("title", "name"), [("SmolVLM-256M", "smolvlm-256m"), ("SmolVLM-500M", "smolvlm2-500m")])
def test_what_is_said_to_fit_is_what_is_planned_for_it(tmp_path, title, name):
    folder = make_checkpoint(find_config(name), tmp_path / name, empty=True)
    pictures = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**pictures, "do_image_splitting": False}))
    plan = _plan(folder)
    assert plan.tiles == 1 and plan.fits
    said = dict(_smaller(RPI5))[f"{title}, one tile"]
    assert said == pytest.approx(plan.exits[-1].ttft_ms, rel=0.1)


def test_the_command_reads_headers_alone(seven_billion, capsys):
    # The weights' bytes are holes: had they been read, they would be zeros, and a shard of 5 GB takes longer than this test.
    assert main(["plan", str(seven_billion), "--device", "rpi5", "--json", "--text-scheme", "int4-block64"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["quantization"] == {"vision": "int8-dynamic", "text": "int4-block64"}
    # The exporting process opens the finished bundle too, beside torch: about half a GiB more than a device needs.
    assert plan["bundle_bytes"] < 4.5e9 and plan["run_gib"] < plan["export_gib"] < 6.5
    assert plan["fits"] is False and [e["exit"] for e in plan["exits"]] == ["3", "6", "9", "12", "14", "17", "20", "23"]
    assert main(["plan", str(seven_billion), "--device", "rpi5"]) == 0
    assert "first token s, at least" in capsys.readouterr().out


def test_calibration_s_memory_and_disk_are_in_the_plan(seven_billion):
    plain, calibrated = (_plan(seven_billion, text=scheme) for scheme in ("int4-block32", "int4-gptq"))
    # Of seven matrices of a layer one has 11,008 inputs and six 4,096; four of the largest's size stand beside them all.
    sketch, hessians = open_sketch(seven_billion), 4 * (5 * 11_008**2 + 6 * 4_096**2)
    assert calibration_bytes(sketch, "int4-gptq") == (hessians, 2 * 4 * 20_480 * 4_096)
    assert calibration_bytes(sketch, "int4-block32") == calibration_bytes(sketch, "fp32") == (0, 0)
    needed = [export_bytes(sketch, False, 0, scheme) for scheme in ("int4-gptq", "int4-block32")]
    assert needed[0] - needed[1] == hessians and calibrated.export_gib >= needed[0] / 2**30 - 0.01
    # Measured by the matrix: 161 s of rounding a layer; and 20,480 tokens through 202 million weights twice, at 90 GFLOP/s.
    assert calibration_seconds(sketch, "int4-gptq") == pytest.approx(32 * (161 + 184 + 100), rel=0.1)
    assert [("hours of one core" in " ".join(plan.notes)) for plan in (plain, calibrated)] == [False, True]
    assert calibrated.disk_gib - plain.disk_gib == pytest.approx(2 * 4 * 20_480 * 4_096 / 2**30, abs=0.02)
    assert calibrated.bundle_bytes == plain.bundle_bytes


def test_a_head_that_is_the_embedding_counts_once(tmp_path):
    folder = make_checkpoint(find_config("llava-onevision-0.5b"), tmp_path / "tied", empty=True)
    sketch = open_sketch(folder)
    assert sketch.family.tied
    specs = graph_specs(sketch, choose_ladder(sketch, None), "chain", "fp32", "int4-gptq")
    table = specs[graph_io.EMBED_PATH].weight_bytes
    assert text_bytes(sketch, specs, "int4-gptq") == specs[graph_io.DECODER_PATH].weight_bytes > table > 0
    rows, width = sketch.family.embed_tokens().weight.shape
    assert width == 896 and table == rows * width * (1 + 2 / 64)  # a float16 scale per 64 weights


def test_a_small_model_fits_its_budget_and_is_compared_whole(trained_job):
    plan = _plan(trained_job.model_dir)
    assert plan.fits is True and plan.check == "whole model" and len(plan.notes) == 1


def test_auto_says_what_a_larger_scheme_adds_and_has_disk_for_every_attempt(seven_billion):
    auto, first, last = (_plan(seven_billion, text=scheme) for scheme in ("auto", "int4-gptq", "int8-block32"))
    more = last.exits[-1].bytes - first.exits[-1].bytes
    assert auto.exits == first.exits and auto.notes[:-2] == first.notes[:-1]
    assert auto.notes[-2].endswith(f"auto takes up to int8-block32: {more / 1e9:.2g} GB more")
    # Pieces of mixed-gptq, with at least as many bytes as int4-gptq's, and of int8-block32.
    assert auto.disk_gib - first.disk_gib > (last.exits[-1].bytes + more) / GIB > 6


def test_a_profile_without_figures_predicts_no_time(trained_job):
    plan = _plan(trained_job.model_dir, load_device("host"))
    assert plan.fits is None and all(e.ttft_ms is None for e in plan.exits) and "lacks a figure" in plan.notes[0]


def test_room_is_asked_of_the_disk_that_is_written_to(trained_job, tmp_path, monkeypatch):
    plan = replace(_plan(trained_job.model_dir), disk_gib=1.0, export_gib=0.0)
    (tmp_path / "full").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "full" / "bundle")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**29 if "full" in str(path) else 2**40))
    check_room(plan, tmp_path / "new" / "bundle")
    for out in (tmp_path / "link", tmp_path / "full" / "new" / "bundle"):
        with pytest.raises(InputError, match="needs 1.0 GiB on the disk, 0.5 GiB are free"):
            check_room(plan, out)
