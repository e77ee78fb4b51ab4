"""Every family seen from its exits: states, logits and answers against transformers' own, one tile a picture."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from edgesafe.align.data import Example, collate
from edgesafe.align.objectives.ppo import PpoConfig
from edgesafe.align.policy import target_modules
from edgesafe.align.settings import AlignConfig, LoraConfig
from edgesafe.align.train import align
from edgesafe.checkpoint.exit_model import (
    answer_ids,
    answer_logits,
    exit_state,
    exit_states,
    greedy,
    load,
    pixel_values,
    project,
    prompt_ids,
)
from edgesafe.errors import UnsupportedModelError
from edgesafe.format.exits import Exit
from tiny_families import DINOV2, NAMES, TILE, make_tiny

PROMPTS = ("What is this?", "How do I make it? Thanks.")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints by name, each loaded once."""
    made = {}

    def model(name: str):
        if name not in made:
            made[name] = load(make_tiny(name, tmp_path_factory.mktemp("tiny") / name.replace(" ", "-")))
        return made[name]

    return model


@pytest.fixture(params=NAMES)
def llava(request, models):
    return models(request.param)


@pytest.fixture
def pixels(llava):
    picture = Image.linear_gradient("L").convert("RGB").resize((40, 70))
    return pixel_values(llava, [picture, picture.rotate(90)])


def _cut_tower(llava, depth: int):
    """The tower with no more than `depth` blocks, and a way back."""
    encoder = llava.model.get_submodule(llava.recipe.tower).encoder
    blocks = encoder.layers
    encoder.layers = blocks[:depth]
    return lambda: setattr(encoder, "layers", blocks)


@torch.no_grad()
def _oracle(llava, pixels, ids: list[int], depth: int) -> torch.Tensor:
    """Logits [S, V] of the whole transformers model, the picture's features put in by transformers itself.

    Its own forward wants more tiles than one from the families with a canvas, so these get their features by its parts.
    """
    exit_states(llava, pixels)  # transformers hooks the blocks that are there when states are first asked for: all of them
    back = _cut_tower(llava, depth)
    try:
        inner = llava.model.model
        if llava.recipe.cut == "grid":
            return llava.model(input_ids=torch.tensor([ids]), pixel_values=pixels[None]).logits[0]
        state = inner.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        features = inner.multi_modal_projector(state[:, 1:] if llava.recipe.extra_tokens else state)
        features = torch.cat([features[0], inner.image_newline[None]])
        embeds = llava.model.get_input_embeddings()(torch.tensor([ids]))
        embeds[0, torch.tensor(ids) == llava.model.config.image_token_id] = features
        return llava.model(inputs_embeds=embeds).logits[0]
    finally:
        back()


@torch.no_grad()
def _mine(llava, pixels, example: Example, depth: int) -> torch.Tensor:
    batch = collate([example], llava.pad_id)
    return answer_logits(llava, batch.ids, batch.where, exit_state(llava, exit_states(llava, pixels), Exit(depth)))[0]


def test_answer_logits_are_transformers_at_every_depth_and_no_other(llava, pixels, tmp_path):
    example = Example(tmp_path, tuple(prompt_ids(llava, PROMPTS[0])), tuple(answer_ids(llava, "It is.")), False)
    ids = [*example.prompt, *example.answer]
    for depth in range(1, llava.n_blocks + 1):
        want = _oracle(llava, pixels[:1], ids, depth)[len(example.prompt) - 1 : -1]
        torch.testing.assert_close(_mine(llava, pixels[:1], example, depth), want, **CLOSE)
        other = depth + 1 if depth < llava.n_blocks else depth - 1
        assert not torch.allclose(_mine(llava, pixels[:1], example, other), want, rtol=1e-2, atol=1e-2)


def test_a_picture_is_one_tile_and_takes_its_tokens(llava, pixels):
    assert pixels.shape == (2, 3, TILE, TILE)
    ids = prompt_ids(llava, PROMPTS[0])
    features = project(llava, exit_state(llava, exit_states(llava, pixels), Exit(1)))
    assert ids.count(llava.model.config.image_token_id) == llava.image_tokens == features.shape[1]


def test_greedy_answers_of_a_batch_are_those_of_one(llava, pixels):
    states = exit_state(llava, exit_states(llava, pixels), llava.reference)
    prompts = [prompt_ids(llava, p) for p in PROMPTS]
    both = greedy(llava, prompts, states, 6)
    assert both == [greedy(llava, [p], states[i : i + 1], 6)[0] for i, p in enumerate(prompts)]


def test_adapters_go_into_the_language_model_alone(llava):
    found = target_modules(llava, ("q_proj", "down_proj"))
    assert len(found) == 2 * 2 and all(name.startswith(llava.recipe.decoder) for name in found)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("smolvlm", {"method": "l-sft", "tune": "lora"}),
        (DINOV2, {"method": "l-sft", "tune": "full"}),
        ("idefics3", {"method": "self-distill", "tune": "full"}),
        ("llava_onevision", {"method": "l-ppo", "tune": "full", "optimizer": "adamw"}),
        ("llava_next mistral", {"method": "l-ppo", "tune": "lora", "optimizer": "adamw"}),
    ],
)
def test_only_the_language_model_moves(rows, tmp_path, name, changes):
    folder = make_tiny(name, tmp_path / "m")
    base = AlignConfig(data=str(rows), steps=2, batch_size=4, reference_rows=2, checkpoint_every=3, lr=5e-3, precision="fp32")
    sections = {"ppo": PpoConfig(epochs=1, minibatches=1, max_new_tokens=4, kl_target=1.0)}
    out = align(
        folder, dataclasses.replace(base, lora=LoraConfig(r=4, alpha=8), sections=sections, **changes), tmp_path / "out"
    )
    before, after = (load_file(f / "model.safetensors") for f in (folder, out))
    assert before.keys() == after.keys()
    moved = {weight for weight in before if not torch.equal(before[weight], after[weight])}
    assert moved and all(part not in weight for weight in moved for part in ("vision", "connector", "projector", "newline"))
    assert load(out).recipe.model_type == name.split()[0]


def test_a_member_that_keeps_cls_is_refused(tmp_path):
    folder = make_tiny("llava_next", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision_feature_select_strategy": "full"}))
    with pytest.raises(UnsupportedModelError):
        load(folder)
