"""Several questions about one picture: the answers of ask, the work of one picture."""

from __future__ import annotations

import numpy as np
import pytest

from edgesafe import Session
from edgesafe.errors import InputError, UncertifiedExitError
from edgesafe.runtime.conversation import Conversation
from edgesafe.runtime.graph import OrtGraph
from handmade import ANSWER, FEATURES
from mutants import wrong

BLACK = np.zeros((8, 8, 3), np.uint8)
# "U " is 2 tokens and " " after the picture 1.
PICTURE_END = 2 + FEATURES + 1


@pytest.fixture
def session(handmade) -> Session:
    return Session.open(handmade)


def test_the_picture_is_run_once_and_its_prefix_read_once(session, monkeypatch):
    ran, advance = [], OrtGraph.advance
    monkeypatch.setattr(OrtGraph, "advance", lambda self, state: ran.append(1) or advance(self, state))
    talk = session.conversation(BLACK)
    assert talk.exit_depth == 2
    answers = [talk.ask("what?")]
    assert (len(ran), talk.reused_tokens) == (3, 0)
    answers.append(talk.ask("where is it?"))
    # "what?" and "where is it?" begin with the same two letters.
    assert (len(ran), talk.reused_tokens) == (3, PICTURE_END + 2)
    answers.append(talk.ask("where is it?"))
    # All but the last token, which is read again for its logits.
    assert talk.reused_tokens == PICTURE_END + len("where is it? A:") - 1
    assert [a.text for a in answers] == [ANSWER] * 3 and all(a.certified and a.exit_depth == 2 for a in answers)
    assert "no time was predicted" in answers[1].note and answers[1].predicted_ttft_ms is None


def test_the_cache_is_the_one_that_a_new_prompt_would_make(session):
    from edgesafe.runtime.tokenizer import encode_prompt

    talk = session.conversation(BLACK, exit_depth=1)
    for prompt in ("what?", "where?", "w"):
        talk.ask(prompt, max_new_tokens=3)
    _, cache = session.prefill(session.vision_states(BLACK, [1])[1], encode_prompt(session.tokenizer, session.manifest, "w"))
    talk._reader.rewind(cache["past_key_values.0.key"].shape[2])
    np.testing.assert_array_equal(talk._reader._cache["past_key_values.0.key"], cache["past_key_values.0.key"])


def test_a_conversation_that_forgets_to_rewind_is_seen(session, monkeypatch):
    monkeypatch.setattr(Conversation, "_continue", wrong(Conversation._continue, ("self._reader.rewind(kept)", "pass")))
    with pytest.raises(AssertionError):
        test_the_cache_is_the_one_that_a_new_prompt_would_make(session)


def test_an_uncertified_exit_is_refused_as_by_ask(session):
    with pytest.raises(UncertifiedExitError):
        session.conversation(BLACK, exit_depth=3)
    answer = session.conversation(BLACK, exit_depth=3, allow_uncertified=True).ask("what?")
    assert not answer.certified and "NOT certified" in answer.note


def test_an_answer_that_was_left_in_the_middle_can_not_go_on(session):
    talk = session.conversation(BLACK)
    first, unread = talk.stream("what?"), talk.stream("why?")
    assert next(unread)
    with pytest.raises(InputError, match="another question"):
        next(first)
    assert talk.ask("where?").text == ANSWER
    with pytest.raises(InputError, match="another question"):
        list(unread)


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"prompt": ""}, {"prompt": "x" * 200}, {"sampling": 1}])
def test_bad_questions(session, options):
    talk = session.conversation(BLACK)
    with pytest.raises(InputError):
        talk.ask(**{"prompt": "what?", **options})
    assert talk.ask("what?").text == ANSWER


def test_a_bad_picture_is_refused_at_once(session):
    with pytest.raises(InputError):
        session.conversation(None)
    with pytest.raises(InputError):
        session.conversation(BLACK, 700)
