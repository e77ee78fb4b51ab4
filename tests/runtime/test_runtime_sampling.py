"""Picking tokens: each function against transformers' own logits processors, and the answer's end by stop texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from edgesafe import Session
from edgesafe.errors import BundleError, InputError
from edgesafe.runtime import sampling
from edgesafe.runtime.sampling import Picker, Sampling
from edgesafe.runtime.tokenizer import TextStream
from handmade import ANSWER, make_tokenizer
from mutants import wrong

RNG = np.random.default_rng(11)
ROWS = [(RNG.standard_normal(50) * scale).astype(np.float32) for scale in (0.5, 3.0, 9.0)]
SAID = [3, 7, 7, 1, 3, 7, 7, 2, 3, 7]
BLACK = np.zeros((8, 8, 3), np.uint8)


def theirs(processor, row: np.ndarray) -> np.ndarray:
    return processor(torch.tensor([SAID]), torch.tensor(row)[None].clone())[0].numpy()


def check_against_transformers() -> None:
    for row in ROWS:
        for penalty in (0.7, 1.0, 1.3):
            np.testing.assert_array_equal(
                sampling.penalize(row, SAID, penalty), theirs(RepetitionPenaltyLogitsProcessor(penalty), row)
            )
        for n in (1, 2, 3):
            np.testing.assert_array_equal(sampling.ban_repeats(row, SAID, n), theirs(NoRepeatNGramLogitsProcessor(n), row))
        np.testing.assert_array_equal(row / np.float32(0.7), theirs(TemperatureLogitsWarper(0.7), row))
        for top_p in (0.05, 0.5, 0.9, 1.0):
            np.testing.assert_array_equal(sampling.nucleus(row, top_p), theirs(TopPLogitsWarper(top_p), row))


def test_logits_are_changed_as_transformers_changes_them():
    check_against_transformers()


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("penalize", ("row[ids] * penalty, row[ids] / penalty", "row[ids] / penalty, row[ids] / penalty")),
        ("ban_repeats", ("said[i + n - 1]", "said[i + n - 2]")),
        ("nucleus", ("share <= 1 - top_p", "share <= top_p")),
        ("nucleus", ("[dropped != order[-1]]", "")),
    ],
)
def test_wrong_versions_are_seen(monkeypatch, name, edit):
    monkeypatch.setattr(sampling, name, wrong(getattr(sampling, name), edit))
    with pytest.raises((AssertionError, IndexError)):
        check_against_transformers()
        # The last one differs only where the share is lost in rounding: 1 - 1e-17 is 1.
        assert np.isfinite(sampling.nucleus(np.array([0.0, 50.0]), 1e-17)).any()


def test_draws_follow_the_probabilities_and_the_seed():
    logits = np.log(np.array([[[0.1, 0.6, 0.3]]]))
    picks = [Picker(Sampling(temperature=1.0, seed=seed), []).pick(logits) for seed in range(3000)]
    share = np.bincount(picks, minlength=3) / len(picks)
    # Three standard deviations of a binomial share at n = 3000 are below 0.027.
    np.testing.assert_allclose(share, [0.1, 0.6, 0.3], atol=0.03)
    assert picks[:50] == [Picker(Sampling(temperature=1.0, seed=seed), []).pick(logits) for seed in range(50)]
    cold = [Picker(Sampling(temperature=0.05, seed=seed), []).pick(logits) for seed in range(50)]
    assert set(cold) == {1}
    assert {Picker(Sampling(temperature=1.0, top_p=0.5, seed=seed), []).pick(logits) for seed in range(50)} == {1}


def test_what_was_said_counts_for_the_next_pick():
    logits = np.array([[[1.0, 0.9, 0.0]]])
    picker = Picker(Sampling(repetition_penalty=1.5), [])
    assert [picker.pick(logits) for _ in range(2)] == [0, 1]
    # A prompt's ids count, and an image token's id may lie outside of the vocabulary.
    assert Picker(Sampling(repetition_penalty=1.5), [0, 99]).pick(logits) == 1
    assert logits.tolist() == [[[1.0, 0.9, 0.0]]]


def test_when_everything_is_banned_something_is_said_all_the_same():
    assert Picker(Sampling(no_repeat_ngram=1), [0, 1]).pick(np.array([[[0.0, 1.0]]])) == 1


def test_logits_that_are_not_finite_are_refused_before_any_draw():
    with pytest.raises(BundleError, match="finite"):
        Picker(Sampling(temperature=1.0), []).pick(np.array([[[1.0, np.inf]]]))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"seed": 1.5},
        {"no_repeat_ngram": True},
        {"stop": "."},
        {"stop": ("",)},
    ],
    ids=str,
)
def test_bad_options(options):
    with pytest.raises(InputError):
        Sampling(**options)


@pytest.mark.parametrize(
    ("stop", "text"),
    [(("1",), "Zé"), (("€.", "1"), "Zé"), (("1€!",), ANSWER), (("Z",), ""), ((), ANSWER)],
)
def test_an_answer_ends_before_the_first_stop_text_and_shows_no_part_of_it(handmade, stop, text):
    stream = Session.open(handmade).stream(BLACK, "what?", sampling=Sampling(stop=stop))
    assert "".join(stream) == text
    assert (stream.answer.text, stream.answer.finish_reason) == (text, "stop")


def test_a_stop_text_ends_the_decoding_too(handmade):
    session = Session.open(handmade)
    read = []
    reader = session.reader(8)
    kind = type(reader)
    original = kind.read_token
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "read_token", lambda self, token: read.append(token) or original(self, token))
        session.ask(BLACK, "what?", sampling=Sampling(stop=("Z",)))
    assert read == []


def test_a_held_back_beginning_of_a_stop_text_is_shown_at_the_end():
    stream = TextStream(make_tokenizer(), stop=("xyz",))
    assert [stream.push(ord(c)) for c in "axy"] == ["a", "", ""]
    assert stream.finish() == "xy" and stream.text == "axy" and not stream.ended


def test_drawn_answers_are_the_same_for_the_same_seed(handmade):
    session = Session.open(handmade)
    hot = Sampling(temperature=5.0, seed=4)
    said = [session.ask(BLACK, "what?", sampling=hot, max_new_tokens=6).text for _ in range(2)]
    assert said[0] == said[1] != ANSWER
