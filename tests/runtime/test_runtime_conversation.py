"""Several questions about one picture: the answers of ask, the work of one picture."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from edgesafe import Budget, Session
from edgesafe.errors import BusyError, CancelledError, ClosedError, InputError, UncertifiedExitError
from edgesafe.format.bundle import Bundle
from edgesafe.format.exits import Exit
from edgesafe.format.latency import stage_times, write_latency
from edgesafe.runtime import Cancel, Progress
from edgesafe.runtime.conversation import Conversation
from edgesafe.runtime.ort import OrtGraph
from engines import slow_session
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
    answers = [talk.ask("what?")]
    assert (len(ran), talk.reused_tokens, talk.exit) == (3, 0, Exit(2))
    answers.append(talk.ask("where is it?"))
    # "what?" and "where is it?" begin with the same two letters.
    assert (len(ran), talk.reused_tokens) == (3, PICTURE_END + 2)
    answers.append(talk.ask("where is it?"))
    # All but the last token, which is read again for its logits.
    assert talk.reused_tokens == PICTURE_END + len("where is it? A:") - 1
    assert [a.text for a in answers] == [ANSWER] * 3 and all(a.certified and a.exit == Exit(2) for a in answers)
    assert "no time was predicted" in answers[1].note and answers[1].predicted_ttft_ms is None


def test_the_cache_is_the_one_that_a_new_prompt_would_make(session):
    from edgesafe.runtime.tokenizer import encode_prompt

    talk = session.conversation(BLACK, exit=1)
    for prompt in ("what?", "where?", "w"):
        talk.ask(prompt, max_new_tokens=3)
    _, cache = session.prefill(
        session.vision_states(BLACK, [1])[Exit(1)], encode_prompt(session.tokenizer, session.manifest, "w")
    )
    talk._reader.rewind(cache["past_key_values.0.key"].shape[2])
    np.testing.assert_array_equal(talk._reader._cache["past_key_values.0.key"], cache["past_key_values.0.key"])


def test_a_conversation_that_forgets_to_rewind_is_seen(session, monkeypatch):
    monkeypatch.setattr(Conversation, "_continue", wrong(Conversation._continue, ("self._reader.rewind(kept)", "pass")))
    with pytest.raises(AssertionError):
        test_the_cache_is_the_one_that_a_new_prompt_would_make(session)


def test_an_uncertified_exit_is_refused_as_by_ask(session):
    with pytest.raises(UncertifiedExitError):
        session.conversation(BLACK, exit=3)
    answer = session.conversation(BLACK, exit=3, allow_uncertified=True).ask("what?")
    assert not answer.certified and "NOT certified" in answer.note


def test_a_question_waits_until_the_answer_before_it_has_ended(session):
    talk = session.conversation(BLACK)
    unread = talk.stream("what?")
    assert next(unread) == "Z"
    with pytest.raises(BusyError, match="itself"):
        talk.ask("why?")
    unread.close()
    assert talk.ask("where?").text == ANSWER


def test_questions_of_several_threads_are_answered_one_after_the_other(session):
    talk, prompts = session.conversation(BLACK), ["what?", "where is it?", "why?", "what is there?"]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(talk.ask, prompts * 3))
    assert [a.text for a in answers] == [ANSWER] * 12 and {a.exit for a in answers} == {Exit(2)}


def test_a_cancelled_question_leaves_the_conversation_as_good_as_before(session):
    talk, cancel = session.conversation(BLACK), Cancel()

    def stop(progress: Progress) -> None:
        cancel.cancel()

    with pytest.raises(CancelledError):
        talk.ask("what?", cancel=cancel, progress=stop)
    assert talk.exit is None and talk.ask("what?").text == ANSWER and talk.exit == Exit(2)
    later = Cancel()
    with pytest.raises(CancelledError):
        talk.ask("where?", cancel=later, progress=lambda p: later.cancel())
    assert talk.ask("w").text == ANSWER and talk.reused_tokens == PICTURE_END + 1


def test_a_closed_session_frees_what_a_conversation_kept(handmade):
    with Session.open(handmade) as session:
        talk = session.conversation(BLACK)
        talk.ask("what?")
        kept = weakref.ref(talk._reader)
    gc.collect()
    assert kept() is None
    with pytest.raises(ClosedError):
        talk.ask("what?")
    with pytest.raises(ClosedError):
        session.conversation(BLACK)


def test_the_first_question_s_clock_finds_the_exit_of_all(measured):
    # Planned: 2 blocks, 20 ms of 45. The first took 40, so there is no time for the second.
    session = slow_session(measured[0], block_ms=40)
    talk = session.conversation(BLACK, Budget(45))
    first = talk.ask("what?")
    assert (first.exit, first.planned_exit, first.deadline_met, first.ttft_ms) == (Exit(1), Exit(2), True, 40)
    second = talk.ask("why?")
    assert (second.exit, second.ttft_ms, second.deadline_met) == (Exit(1), 0, True)
    assert second.predicted_ttft_ms is None and list(second.actual_ms) == ["wait", "prefill", "decode"]


def test_total_ms_ends_a_later_answer_too(measured):
    root, table = measured
    text = {**table.text, "decode": [{"context": 10, **stage_times([5.0] * 5)}]}
    write_latency(Bundle.open(root), replace(table, text=text))
    # The first question pays 20 ms for the picture and 5 a token; the second 5 a token: 5 of 8 tokens end at 25 of 29 ms.
    talk = slow_session(root, step_ms=5).conversation(BLACK, Budget(total_ms=29))
    assert (talk.ask("what?").text, talk.exit) == ("Z", Exit(2))
    second = talk.ask("why?")
    assert (second.finish_reason, second.deadline_met) == ("deadline", True) and second.total_ms == pytest.approx(25)


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"prompt": ""}, {"prompt": "x" * 200}, {"sampling": 1}])
def test_bad_questions(session, options):
    talk = session.conversation(BLACK)
    with pytest.raises(InputError):
        talk.ask(**{"prompt": "what?", **options})
    assert talk.ask("what?").text == ANSWER


def test_a_bad_picture_is_refused_by_the_first_question_and_bad_options_at_once(session):
    with pytest.raises(InputError):
        session.conversation(None).ask("what?")
    with pytest.raises(InputError):
        session.conversation(BLACK, 700)
    assert session.ask(BLACK, "what?").text == ANSWER
