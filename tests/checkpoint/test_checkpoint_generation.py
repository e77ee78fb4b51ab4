"""generation_config: what changes transformers' greedy answers is refused, what doesn't is ignored, end tokens are honoured."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

from edgesafe.checkpoint.exit_model import exit_state, exit_states, greedy, load, pixel_values, prompt_ids
from edgesafe.checkpoint.generation import _NEUTRAL, check_generation, end_tokens
from edgesafe.errors import InputError, UnsupportedModelError
from edgesafe_export.family import load_family
from edgesafe_export.skeleton import open_sketch
from tiny_families import edit, make_tiny, picture

NEW = 12
# Each with a value that changes the tiny model's answer, which the test checks with transformers.
CHANGES = {
    "repetition_penalty": 1.9,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": "the answer's own tokens",
    "suppress_tokens": "the answer's own tokens",
    "begin_suppress_tokens": "the answer's own tokens",
    "forced_bos_token_id": None,
    "sequence_bias": "the answer's own tokens",
}
IGNORED = {"do_sample": True, "temperature": 0.2, "top_p": 0.3, "top_k": 3, "typical_p": 0.5, "min_p": 0.1, "max_length": 40}
NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "bad_words_ids": None, "min_length": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny("smolvlm", tmp_path_factory.mktemp("tiny") / "smolvlm", seed=2)  # whose answer has several tokens


@pytest.fixture(scope="module")
def exits(folder):
    return load(folder)


def _generated(exits, **settings) -> list[int]:
    """Greedy ids of transformers under a generation_config."""
    ids = torch.tensor([prompt_ids(exits, "What is this?")])
    pixels = pixel_values(exits, [picture()])
    asked = GenerationConfig(**{**exits.model.generation_config.to_diff_dict(), **settings})
    asked.max_new_tokens, asked.do_sample = NEW, False
    out = exits.model.generate(
        input_ids=ids, pixel_values=pixels[None], attention_mask=torch.ones_like(ids), generation_config=asked
    )
    return out[0, ids.shape[1] :].tolist()


def _value(exits, key: str):
    plain = _generated(exits)
    own = {"bad_words_ids": [[plain[0]]], "sequence_bias": [[[plain[0]], -99.0]]}
    return own.get(key, [plain[0]]) if CHANGES[key] == "the answer's own tokens" else CHANGES[key]


@pytest.mark.parametrize("key", [key for key, value in CHANGES.items() if value is not None])
def test_what_changes_greedy_answers_is_refused_before_training_and_export(exits, folder, tmp_path, key):
    value = _value(exits, key)
    assert _generated(exits, **{key: value}) != _generated(exits)  # transformers says that it does
    copy = edit(shutil.copytree(folder, tmp_path / "m"), "generation_config.json", **{key: value})
    for read in (load, load_family, open_sketch):
        with pytest.raises(UnsupportedModelError, match=f"{key} is .*generation_config.json.*remove '{key}'"):
            read(copy)


def test_settings_of_sampling_and_neutral_ones_are_ignored_as_transformers_ignores_them(exits, folder, tmp_path):
    copy = edit(shutil.copytree(folder, tmp_path / "m"), "generation_config.json", **IGNORED, **NEUTRAL)
    other = load(copy)
    assert _generated(exits, **IGNORED, **NEUTRAL) == _generated(exits)
    states = exit_state(other, exit_states(other, pixel_values(other, [picture()])), other.reference)
    want = other.processor.tokenizer.decode(_generated(exits), skip_special_tokens=True).strip()
    assert greedy(other, [prompt_ids(other, "What is this?")], states, NEW) == [want]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"min_new_tokens": 3},
        {"min_length": 9},
        {"encoder_repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 2},
        {"forced_bos_token_id": 5},
        {"forced_eos_token_id": 5},
        {"exponential_decay_length_penalty": (5, 1.1)},
        {"guidance_scale": 2.0},
        {"penalty_alpha": 0.6},
        {"stop_strings": ["."]},
        {"max_time": 3.0},
        {"dola_layers": "high"},
        {"token_healing": True},
        {"cache_implementation": "quantized"},
    ],
    ids=str,
)
def test_every_other_setting_that_greedy_decoding_reads_is_refused(settings):
    check_generation(SimpleNamespace())
    with pytest.raises(UnsupportedModelError, match=next(iter(settings))):
        check_generation(SimpleNamespace(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"bad_words_ids": []},
        {"sequence_bias": []},
        {"stop_strings": []},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 1},
        {"use_mtp": True},
    ],
    ids=str,
)
def test_what_transformers_own_generate_fails_on_is_refused_before_it_does(exits, settings):
    with pytest.raises((ValueError, AttributeError)):
        _generated(exits, **settings)
    with pytest.raises(UnsupportedModelError, match=next(iter(settings))):
        check_generation(SimpleNamespace(**settings))


def test_no_setting_of_transformers_greedy_decoding_is_forgotten():
    """Every number or list that its logits processors and stopping criteria read before sampling is refused, or known here."""
    source = inspect.getsource(GenerationMixin._get_logits_processor).partition("if generation_config.do_sample:")[0]
    source += inspect.getsource(GenerationMixin._get_stopping_criteria)
    read = set(re.findall(r"generation_config\.([a-z]\w+)", source))
    lengths = {
        "max_length",
        "max_new_tokens",
        "use_cache",
        "remove_invalid_values",
        "is_assistant",
        "assistant_confidence_threshold",
    }
    assert read - set(_NEUTRAL) <= lengths


def test_all_end_tokens_end_an_answer_in_align_as_in_transformers(exits, folder, tmp_path):
    plain = _generated(exits)
    end = next(i for i in plain[1:] if i != plain[0])
    tokenizer_s = exits.processor.tokenizer.eos_token_id
    copy = edit(shutil.copytree(folder, tmp_path / "m"), "generation_config.json", eos_token_id=[end, tokenizer_s])
    other = load(copy)
    assert other.eos_ids == load_family(copy).eos_token_ids == (tokenizer_s, end) and other.eos_id == tokenizer_s
    states = exit_state(other, exit_states(other, pixel_values(other, [picture()])), other.reference)
    got = greedy(other, [prompt_ids(other, "What is this?")], states, NEW)
    # transformers' ids end with the token, which our text leaves out.
    want = _generated(exits, eos_token_id=[end, tokenizer_s])
    assert want[-1] == end and len(want) < len(plain)
    assert got == [other.processor.tokenizer.decode(want[:-1], skip_special_tokens=True).strip()]


def test_an_end_token_has_to_be_named():
    nothing = SimpleNamespace(eos_token_id=None)
    assert end_tokens(SimpleNamespace(eos_token_id=5), nothing) == (5,)
    assert end_tokens(SimpleNamespace(eos_token_id=[5, 2]), SimpleNamespace(eos_token_id=2)) == (2, 5)
    for named in (None, []):
        with pytest.raises(InputError, match="end token"):
            end_tokens(SimpleNamespace(eos_token_id=named), nothing)


@pytest.mark.parametrize("named", ["2", [5, "</s>"], [[2]], True, 2.5], ids=str)
def test_an_end_token_is_a_number(folder, tmp_path, named):
    copy = edit(shutil.copytree(folder, tmp_path / "m"), "generation_config.json", eos_token_id=named)
    for read in (load, load_family, open_sketch):
        with pytest.raises(InputError, match="end token .* is not a token's number.*eos_token_id"):
            read(copy)


def test_a_setting_in_config_json_is_seen_too(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "m")
    (copy / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "repetition_penalty": 1.3}))
    for read in (load, load_family, open_sketch):
        with pytest.raises(UnsupportedModelError, match="repetition_penalty"):
            read(copy)


def test_end_tokens_come_from_config_json_where_there_is_no_other_file(folder, exits, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "m")
    (copy / "generation_config.json").unlink(missing_ok=True)
    assert load(copy).eos_ids == load_family(copy).eos_token_ids == open_sketch(copy).family.eos_token_ids == exits.eos_ids


@pytest.mark.parametrize("text", ["{", "[1]", '{"max_length": "x", "eos_token_id": 1'])
def test_damaged_settings_are_an_input_error(folder, tmp_path, text):
    copy = shutil.copytree(folder, tmp_path / "m")
    (copy / "generation_config.json").write_text(text)
    for read in (load, open_sketch):
        with pytest.raises(InputError, match="generation_config.json"):
            read(copy)
