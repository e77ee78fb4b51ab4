"""Controls against their definitions: no picture, a grey one, noise, and states with the reference depth's mean and spread."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgesafe.checkpoint.exit_model import exit_state, exit_states, open_images, pixel_values, prompt_ids
from edgesafe.errors import InputError
from edgesafe.evaluate.answers import answer_suite
from edgesafe.evaluate.controls import (
    BLANK,
    CONTROLS,
    NOISE,
    RESCALED,
    TEXT_ONLY,
    blank,
    control_answers,
    noise,
    rescale,
    state_moments,
    text_only,
    text_prompt_ids,
)
from edgesafe.format.exits import Exit
from edgesafe.format.suite import Row, Suite, write_suite
from mutants import wrong

TOKENS = 8  # enough to tell answers apart
PROMPTS = ("What is this?", "How do I make this?", "What is this?")

E1, E2, E3, E4 = map(Exit, (1, 2, 3, 4))


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Suite:
    """Three rows, two requests, a picture each."""
    rows, images = [], {}
    for i, prompt in enumerate(PROMPTS):
        images[f"images/{i}.png"] = Image.fromarray(np.random.default_rng(i).integers(0, 256, (72, 72, 3), dtype=np.uint8))
        rows.append(Row(f"r{i}", "harmless", "f", f"images/{i}.png", prompt, "t", (), "t", False))
    return write_suite(tmp_path_factory.mktemp("controls") / "val", rows, images, "v", "val")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Short answers, for speed."""
    for module in ("answers", "controls"):
        monkeypatch.setattr(f"edgesafe.evaluate.{module}.MAX_NEW_TOKENS", TOKENS)


def _states(llava, suite: Suite):
    return exit_states(llava, pixel_values(llava, open_images([suite.image_path(row) for row in suite.rows])))


def test_text_only_is_what_the_model_generates_without_a_picture(llava, suite):
    said = text_only(llava, suite)
    for row in suite.rows:
        ids = text_prompt_ids(llava, row.prompt)
        assert llava.model.config.image_token_id not in ids
        assert len(ids) < len(prompt_ids(llava, row.prompt)) - llava.image_tokens + 4
        # transformers' own greedy search
        out = llava.model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=llava.pad_id)
        text = llava.processor.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()
        assert said[row.id] == text
    assert said["r0"] == said["r2"]
    with pytest.raises(InputError, match="spells the image token"):
        text_prompt_ids(llava, "What is <image>?")


def test_a_blank_picture_becomes_zeros(llava):
    pixels = pixel_values(llava, [blank(llava)])
    # Half a grey level, in units of the processor's own deviation.
    assert pixels.abs().max() <= 0.5 / 255 / min(llava.processor.image_processor.image_std) + 1e-6


def test_noise_is_the_rows_own_and_always_the_same(llava, suite):
    one, two = noise(llava, suite.rows), noise(llava, suite.rows)
    together = [np.asarray(image) for image in one(suite.rows)]
    alone = [np.asarray(two([row])[0]) for row in reversed(suite.rows)][::-1]
    assert all((a == b).all() for a, b in zip(together, alone, strict=True))
    assert not (together[0] == together[1]).all()
    assert 120 < together[0].mean() < 135 and together[0].std() == pytest.approx(256 / 12**0.5, rel=0.03)  # uniform's
    assert not (np.asarray(noise(llava, suite.rows, seed=1)(suite.rows)[0]) == together[0]).all()


def test_moments_are_those_of_all_tokens(llava, suite):
    states = _states(llava, suite)
    for batch in (1, 2, 8):
        moments = state_moments(llava, suite, {E1, E3}, batch)
        for exit in (E1, E3):
            tokens = exit_state(llava, states, exit).flatten(0, 1)
            mean, spread = moments[exit]
            torch.testing.assert_close(mean, tokens.mean(0), atol=1e-5, rtol=1e-5)
            assert spread == pytest.approx(float((tokens - tokens.mean(0)).norm(dim=1).square().mean().sqrt()), rel=1e-4)


def _matches(states: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether states have the mean and the spread of others."""
    got, want = states.flatten(0, 1), wanted.flatten(0, 1)
    spread = [float((t - t.mean(0)).norm(dim=1).square().mean().sqrt()) for t in (got, want)]
    return torch.allclose(got.mean(0), want.mean(0), atol=1e-3) and abs(spread[0] / spread[1] - 1) < 1e-3


def test_rescaled_states_have_the_references_mean_and_spread(llava, suite):
    states = _states(llava, suite)
    moments = state_moments(llava, suite, {E1, E2, E3, E4})
    change = rescale(moments, llava.reference)
    wanted = exit_state(llava, states, llava.reference)
    for exit in (E1, E2, E3, E4):
        own = exit_state(llava, states, exit)
        assert _matches(change(exit, own), wanted) and (exit == E3) == _matches(own, wanted)
        # One shift and one factor: what tells tokens and channels apart stays.
        ratio = (change(exit, own) - moments[E3][0]) / (own - moments[exit][0])
        torch.testing.assert_close(ratio, torch.full_like(ratio, moments[E3][1] / moments[exit][1]), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(change(E3, wanted), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "old, new",
    [
        ("(spread / own if own else 1.0)", "1.0"),
        ("(states - mean)", "states"),
        (" + wanted", ""),
        ("spread / own", "own / spread"),
        ("(states - mean)", "(states - states.mean((1, 2), keepdim=True))"),
        ("moments[reference]", "moments[Exit(4)]"),
    ],
)
def test_a_wrong_rescaling_is_seen(llava, suite, old, new):
    states = _states(llava, suite)
    change = wrong(rescale, (old, new))(state_moments(llava, suite, {E1, E3, E4}), llava.reference)
    assert not _matches(change(E1, exit_state(llava, states, E1)), exit_state(llava, states, llava.reference))


def test_every_control_answers_every_row(llava, suite):
    found = control_answers(llava, suite, (E1, E3), batch=2)
    assert tuple(found) == CONTROLS == (TEXT_ONLY, BLANK, NOISE, RESCALED)
    assert set(found[TEXT_ONLY]) == {"any"} and all(set(found[name]) == {"1", "3"} for name in CONTROLS[1:])
    assert all(set(said) == {"r0", "r1", "r2"} for one in found.values() for said in one.values())
    assert found[BLANK]["1"]["r0"] == found[BLANK]["1"]["r2"]  # the same request, the same grey
    plain = answer_suite(llava, suite, (E1, E3), quiet=True)
    assert found[NOISE]["1"] != plain[E1] and found[RESCALED]["1"] != plain[E1]
    assert found[RESCALED]["3"] == plain[E3]  # at the reference it changes nothing


def test_the_statistics_need_pictures(llava):
    rows = (Row("r", "harmless", "f", None, "p", "t", (), "t", False),)
    with pytest.raises(InputError, match="no picture"):
        state_moments(llava, Suite(Path("s"), rows, "d", {}), {E1})
