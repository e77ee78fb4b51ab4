"""Exit states and answers against transformers' own `vision_feature_layer=d`, at every depth."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from edgesafe.align.model import exit_states, greedy, load, pixel_values, prompt_ids
from edgesafe.errors import InputError


def _picture() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((64, 64))


def _oracle(llava, pixels, depth):
    with torch.no_grad():
        out = llava.model.model.get_image_features(pixel_values=pixels, vision_feature_layer=depth).pooler_output
    return out[0]


def _mine(llava, pixels, depth):
    with torch.no_grad():
        return llava.model.model.multi_modal_projector(exit_states(llava, pixels)[depth])[0]


def test_exit_states_equal_transformers_at_every_depth(llava):
    pixels = pixel_values(llava, [_picture()])
    for depth in range(1, llava.n_blocks + 1):
        torch.testing.assert_close(_mine(llava, pixels, depth), _oracle(llava, pixels, depth), rtol=1e-5, atol=1e-5)


def test_a_depth_off_by_one_is_seen(llava):
    pixels = pixel_values(llava, [_picture()])
    for depth in range(1, llava.n_blocks):
        assert not torch.allclose(_mine(llava, pixels, depth + 1), _oracle(llava, pixels, depth), rtol=1e-2, atol=1e-2)


def test_greedy_answers_equal_transformers_generate(llava):
    prompts = ["What is this?", "How do I make the object on the left? Thanks."]
    pixels = pixel_values(llava, [_picture(), _picture().rotate(90)])
    got = greedy(llava, [prompt_ids(llava, p) for p in prompts], exit_states(llava, pixels)[llava.reference_depth], 8)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt_ids(llava, prompt)])
        out = llava.model.generate(input_ids=ids, pixel_values=pixels[i : i + 1], max_new_tokens=8, do_sample=False)
        want = llava.processor.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert got[i] == want


def test_no_checkpoint_is_an_input_error(tmp_path):
    with pytest.raises(InputError):
        load(tmp_path)
