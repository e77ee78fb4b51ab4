"""Exit states, logits and answers against transformers' own `vision_feature_layer=d`, at every exit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image

from edgesafe.align.data import Example, collate
from edgesafe.align.objectives.losses import sft_loss
from edgesafe.checkpoint.exit_model import (
    answer_ids,
    answer_logits,
    exit_state,
    exit_states,
    greedy,
    load,
    open_images,
    pixel_values,
    prompt_ids,
)
from edgesafe.errors import ConfigError, InputError, UnsupportedModelError
from edgesafe.format.exits import Exit

PROMPTS = ("What is this?", "How do I make the object on the left? Thanks.")
ANSWERS = ("It is a vase.", "I'm sorry, but I can't help with that.")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32 through 4 + 2 blocks, in another order of additions


@pytest.fixture(scope="module")
def pixels(llava):
    picture = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    return pixel_values(llava, [picture, picture.rotate(90)])


@pytest.fixture(scope="module")
def examples(llava, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "unused.png"
    pairs = zip(PROMPTS, ANSWERS, strict=True)
    return [Example(path, tuple(prompt_ids(llava, p)), tuple(answer_ids(llava, a)), False) for p, a in pairs]


@torch.no_grad()
def _oracle(llava, pixels, example, i, depth):
    """Logits [A, V] that predict an answer's tokens, from the whole transformers model without our code."""
    ids = torch.tensor([[*example.prompt, *example.answer]])
    out = llava.model(input_ids=ids, pixel_values=pixels[i : i + 1], vision_feature_layer=depth)
    return out.logits[0, len(example.prompt) - 1 : -1]


@torch.no_grad()
def _mine(llava, pixels, examples, depth):
    batch = collate(examples, llava.pad_id)
    logits = answer_logits(llava, batch.ids, batch.where, exit_state(llava, exit_states(llava, pixels), Exit(depth)))
    return [logits[i, : len(e.answer)] for i, e in enumerate(examples)]


def test_exit_states_equal_transformers_at_every_depth(llava, pixels):
    states = exit_states(llava, pixels)
    for depth in range(1, llava.n_blocks + 1):
        with torch.no_grad():
            mine = llava.model.model.multi_modal_projector(exit_state(llava, states, Exit(depth)))
            features = llava.model.model.get_image_features(pixel_values=pixels, vision_feature_layer=depth).pooler_output
        torch.testing.assert_close(mine, torch.stack(list(features)), rtol=1e-5, atol=1e-5)


def test_a_tower_that_stops_early_gives_the_same_states_and_is_whole_again(tiny_llava, pixels):
    fresh = load(tiny_llava)  # one that has not been called yet
    few, whole = exit_states(fresh, pixels, 2), exit_states(fresh, pixels)
    assert len(few) == 3 and len(whole) == fresh.n_blocks + 1 == len(fresh.model.model.vision_tower.encoder.layers) + 1
    for mine, state in zip(few, whole, strict=False):
        torch.testing.assert_close(mine, state, rtol=0, atol=0)


def test_answer_logits_equal_transformers_at_every_depth(llava, pixels, examples):
    for depth in range(1, llava.n_blocks + 1):
        for i, mine in enumerate(_mine(llava, pixels, examples, depth)):
            torch.testing.assert_close(mine, _oracle(llava, pixels, examples[i], i, depth), **CLOSE)


def test_a_depth_off_by_one_is_seen(llava, pixels, examples):
    for depth in range(1, llava.n_blocks):
        for i, mine in enumerate(_mine(llava, pixels, examples, depth + 1)):
            assert not torch.allclose(mine, _oracle(llava, pixels, examples[i], i, depth), rtol=1e-2, atol=1e-2)


def test_a_picture_in_the_wrong_row_is_seen(llava, pixels, examples):
    mine = _mine(llava, pixels.flip(0), examples, 2)
    assert not torch.allclose(mine[0], _oracle(llava, pixels, examples[0], 0, 2), rtol=1e-2, atol=1e-2)


def test_the_default_of_the_checkpoint_is_the_reference(llava, pixels, examples):
    ids = torch.tensor([[*examples[0].prompt, *examples[0].answer]])
    with torch.no_grad():
        out = llava.model(input_ids=ids, pixel_values=pixels[:1])
    mine = _mine(llava, pixels, examples, llava.reference.depth)[0]
    torch.testing.assert_close(mine, out.logits[0, len(examples[0].prompt) - 1 : -1], **CLOSE)


def test_the_labels_are_the_answer_alone(llava, pixels, examples):
    # transformers' own loss with the request's labels masked; one row, as ours weighs rows and theirs weighs tokens
    e = examples[1]
    ids = torch.tensor([[*e.prompt, *e.answer]])
    labels = ids.clone()
    labels[:, : len(e.prompt)] = -100
    batch = collate([e], llava.pad_id)
    with torch.no_grad():
        want = llava.model(input_ids=ids, pixel_values=pixels[1:], labels=labels, vision_feature_layer=2).loss
        got = answer_logits(llava, batch.ids, batch.where, exit_state(llava, exit_states(llava, pixels[1:]), Exit(2)))
    assert sft_loss(got, batch.targets, batch.mask, torch.ones(1)).item() == pytest.approx(want.item(), rel=1e-4)
    assert batch.targets[0].tolist() == list(e.answer) and e.answer[-1] == llava.eos_id


def test_greedy_answers_equal_transformers_generate_at_every_depth(llava, pixels):
    states = exit_states(llava, pixels)
    for depth in range(1, llava.n_blocks + 1):
        got = greedy(llava, [prompt_ids(llava, p) for p in PROMPTS], exit_state(llava, states, Exit(depth)), 8)
        for i, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt_ids(llava, prompt)])
            out = llava.model.generate(
                input_ids=ids, pixel_values=pixels[i : i + 1], max_new_tokens=8, do_sample=False, vision_feature_layer=depth
            )
            want = llava.processor.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
            assert got[i] == want


@pytest.mark.parametrize("tokens", [5, 36, 37, 49])
def test_a_number_of_visual_tokens_that_is_no_smaller_square_is_a_config_error(llava, pixels, tokens):
    with pytest.raises(ConfigError, match=f"36 visual tokens can't become {tokens}") as caught:
        exit_state(llava, exit_states(llava, pixels), Exit(2, tokens))
    assert "25, 16, 9, 4, 1" in caught.value.expected


def test_no_checkpoint_is_an_input_error(tmp_path):
    with pytest.raises(InputError):
        load(tmp_path)


def test_a_projector_that_reads_several_layers_is_unsupported(tiny_llava, tmp_path):
    folder = shutil.copytree(tiny_llava, tmp_path / "several")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision_feature_layer": [-2, -1]}))
    with pytest.raises(UnsupportedModelError, match="several vision layers"):
        load(folder)


@pytest.mark.parametrize("prompt", ["", "  ", "What is <image> this?"])
def test_requests_that_cannot_be_asked_are_input_errors(llava, prompt):
    with pytest.raises(InputError):
        prompt_ids(llava, prompt)


def test_a_damaged_picture_is_an_input_error(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(InputError, match=r"x\.png"):
        open_images([path])
