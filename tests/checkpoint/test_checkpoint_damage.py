"""Damaged and odd checkpoint folders: an error of ours from align's loader and from export's, and what it says to do works."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgesafe.checkpoint.exit_model import load
from edgesafe.checkpoint.load import read_checkpoint
from edgesafe.checkpoint.recipe import load_recipes
from edgesafe.cli import main
from edgesafe.errors import ConfigError, EdgesafeError, InputError
from edgesafe_export.skeleton import open_sketch
from tiny_families import make_tiny

FILES = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
DAMAGE = {"list": b"[]", "number": b"3", "bytes": b"\xff\xfe\x00\x80", "object": b"{}", "deep": b"[" * 10**5, "cut": None}
VALUES = {"null": None, "text": "x", "zero": 0, "negative": -1, "list": [], "object": {}}


def _tried(folder: Path) -> list[EdgesafeError]:
    """What the two loaders refuse; every other exception fails the test."""
    found = []
    for loader in (load, open_sketch):
        try:
            loader(folder)
        except EdgesafeError as error:
            assert error.what and error.where and error.expected + error.todo
            found.append(error)
    return found


@pytest.mark.parametrize("damage", [*DAMAGE, "deleted", "a folder"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_an_error_of_ours(folder, name, damage):
    path = folder / name
    whole = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "deleted":
        path.write_bytes(DAMAGE[damage] if DAMAGE[damage] is not None else whole[: len(whole) // 2])
    errors = _tried(folder)
    left_out = name == "generation_config.json" and damage in ("deleted", "a folder", "object")
    assert len(errors) == 2 or left_out or "tokenizer" in name


@pytest.mark.parametrize("value", [*VALUES, "gone"])
@pytest.mark.parametrize("family", ["llava", "smolvlm"])
def test_an_odd_value_in_the_config_is_an_error_of_ours(tiny_llava, tmp_path, family, value):
    folder = tmp_path / "m"
    shutil.copytree(tiny_llava, folder) if family == "llava" else make_tiny(family, folder)
    whole = json.loads((folder / "config.json").read_text())
    for part, key in [
        (None, "model_type"),
        (None, "text_config"),
        (None, "vision_config"),
        ("text_config", "hidden_size"),
        ("text_config", "num_hidden_layers"),
        ("text_config", "vocab_size"),
        ("vision_config", "model_type"),
        ("vision_config", "hidden_size"),
        ("vision_config", "num_attention_heads"),
    ]:
        config = copy.deepcopy(whole)
        entries = config[part] if part else config
        if value == "gone":
            del entries[key]
        else:
            entries[key] = VALUES[value]
        (folder / "config.json").write_text(json.dumps(config))
        assert _tried(folder) or part, key


def test_config_json_that_says_too_little_says_so(folder):
    for text, match in (
        ("[]", "holds a list.*config.json"),
        ("{", "not JSON.*config.json"),
        ("{}", "names no model_type.*config.json"),
        ('{"model_type": 3}', "names no model_type"),
        ('{"model_type": "llava"}', "no usable text_config"),
        ('{"model_type": "llava", "text_config": {}, "vision_config": []}', "no usable vision_config"),
    ):
        (folder / "config.json").write_text(text)
        for loader in (load, open_sketch):
            with pytest.raises(InputError, match=match):
                loader(folder)


def test_a_path_that_is_not_utf8_and_the_link_that_the_error_names(tiny_llava, tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(tiny_llava, folder)
    for loader in (load, open_sketch):
        with pytest.raises(InputError, match=r"path is not UTF-8 .*caf\\xe9.*ln -s"):
            loader(folder)
    # On the command line the path is a setting.
    assert main(["plan", str(folder), "--device", "rpi5"]) == ConfigError.exit_code and "not UTF-8" in capsys.readouterr().err
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert load(link).n_blocks == open_sketch(link).family.geometry.n_blocks


def test_a_file_and_a_folder_that_is_not_there(tmp_path, tiny_llava):
    for path, match in (
        (tiny_llava / "config.json", "this is a file.*name the folder"),
        (tmp_path / "x.gguf", "GGUF"),
        (tmp_path / "nowhere", "no such folder.*hf download"),
    ):
        for loader in (load, open_sketch):
            with pytest.raises(InputError, match=match):
                loader(path)


# What an error says to do, done.


def _follow(error: InputError, after: str, **names: Path) -> None:
    """Run the expressions of an error's last part from `after` on."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    known = {"PeftModel": PeftModel, "AutoModelForImageTextToText": AutoModelForImageTextToText, "AutoProcessor": AutoProcessor}
    said = re.findall(r"\w+\.from_pretrained\(.*?\.save_pretrained\(OUT\)", error.todo.partition(after)[2])
    assert len(said) == 2
    for expression in said:
        eval(expression, known | names)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(folder, tuple(load_recipes()))[1].named_parameters())


@pytest.fixture
def adapter(tiny_llava, tmp_path) -> Path:
    """A LoRA adapter of the tiny checkpoint, as peft writes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32)
    found = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    found.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def _refusal(folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        load(folder)
    return caught.value


def test_an_adapter_beside_weights_merged_as_the_error_says(folder, adapter, tmp_path):
    from transformers import LlavaForConditionalGeneration

    before = _weights(folder)
    for path in adapter.glob("adapter_*"):
        shutil.copy(path, folder)
    merged = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)  # with the adapter put in
    error = _refusal(folder)
    for path in folder.glob("adapter_*"):
        path.unlink()
    _follow(error, "merge it first", BASE=folder, ADAPTER=adapter, DIR=folder, OUT=tmp_path / "merged")
    after = _weights(tmp_path / "merged")
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[n], before[n]) for n in after)
    ids, ours = torch.tensor([[5, 6, 7]]), load(tmp_path / "merged").model
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_alone_names_its_base_and_is_merged_as_the_error_says(tiny_llava, adapter, tmp_path):
    error = _refusal(adapter)
    assert str(tiny_llava) in error.what
    _follow(error, "merge it first", BASE=tiny_llava, ADAPTER=adapter, DIR=tiny_llava, OUT=tmp_path / "merged")
    assert load(tmp_path / "merged").n_blocks


def test_pickled_weights_converted_as_the_error_says(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    want = _weights(folder)
    (folder / "model.safetensors").unlink()
    _follow(_refusal(folder), "convert them", DIR=folder, OUT=tmp_path / "out")
    got = _weights(tmp_path / "out")
    assert all(torch.equal(got[name], want[name]) for name in want)
