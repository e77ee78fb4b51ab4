"""The line that says how an answer came about, and the options that are said once for all ways to ask."""

from __future__ import annotations

import dataclasses
import doctest
import inspect

import numpy as np
import pytest

from edgesafe import Budget, Session
from edgesafe.errors import BundleError, InputError
from edgesafe.format.exits import Exit
from edgesafe.runtime import answer as answer_module
from edgesafe.runtime.answer import Answer, describe
from edgesafe.runtime.conversation import AskOptions, Conversation, Options
from edgesafe.runtime.sampling import Sampling
from edgesafe.runtime.turns import Cancel
from handmade import ANSWER, make_bundle
from mutants import wrong

BLACK = np.zeros((8, 8, 3), np.uint8)
MADE = Answer(
    "a cat", "stop", Exit(6), True, 2.31, "estimated", 23.1, 108.9, reference=Exit(12), estimated_for="Raspberry Pi 5, 8 GB"
)
HINT = "run `edgesafe measure`"
NOTHING = {"prediction": "none", "predicted_ttft_ms": None}


def made(**changes) -> str:
    return describe(dataclasses.replace(MADE, **changes))


def test_the_issue_s_own_line():
    line = f"exit 6 of 12, certified; first token after 23 ms (estimated at least 2 ms for a Raspberry Pi 5; {HINT})"
    assert made() == line + "; 109 ms in all, ended by stop"


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"certified": False}, "exit 6 of 12, NOT CERTIFIED; "),
        ({"prediction": "measured", "predicted_ttft_ms": 22.4}, "(predicted 22 ms by a measurement on this machine); "),
        ({**NOTHING, "note": "x: run edgesafe measure"}, f"(nothing predicts it here; {HINT})"),
        ({**NOTHING, "note": "the picture was read before"}, "after 23 ms; 109 ms in all"),
        ({"finish_reason": "deadline"}, "ended by deadline"),
        ({"estimated_for": "NVIDIA Jetson Orin Nano, 8 GB (CPU)"}, "for an NVIDIA Jetson Orin Nano; "),
        ({"estimated_for": "Samsung Galaxy S24 (Snapdragon 8 Gen 3)"}, "for a Samsung Galaxy S24; "),
        ({"estimated_for": "an own board"}, "for an own board; "),
        ({"estimated_for": "this machine"}, "for this machine; "),
        ({"estimated_for": "(?)"}, "for the device; "),
        ({"ttft_ms": 0.44, "predicted_ttft_ms": 0.0}, "first token after 0.4 ms (estimated at least 0.0 ms"),
        ({"reference": None}, "exit 6, certified"),
        ({"deadline_met": True, "why": "predicted to fit"}, "\nbudget kept; this exit because predicted to fit"),
        ({"deadline_met": False, "why": "the shallowest"}, "\nbudget MISSED; this exit because the shallowest"),
        ({"note": "first; second"}, "\nnote: first; second"),
        ({"note": "latency.json was ignored; estimated: run edgesafe measure"}, "\nnote: latency.json was ignored"),
    ],
)  # fmt: skip
def test_what_the_line_says(changes, shown):
    assert shown in made(**changes)


def test_what_is_said_once_is_not_said_again_as_a_note():
    assert "note" not in made(note="the time was estimated for it, not measured: run edgesafe measure")
    assert made().count("edgesafe measure") == 1


def test_doctests():
    assert doctest.testmod(answer_module).attempted >= 3 and doctest.testmod(answer_module).failed == 0


def test_an_estimate_names_its_device_and_a_measurement_none(tmp_path, measured):
    with Session.open(make_bundle(tmp_path / "b", device="rpi5").root) as session:
        answer = session.ask(BLACK, "what?", Budget(10_000))
    assert (answer.reference, answer.prediction) == (Exit(3), "estimated")
    assert answer.estimated_for.startswith("Raspberry Pi 5") and "for a Raspberry Pi 5; run" in describe(answer)
    talk = Session.open(measured[0]).conversation(BLACK)
    first, later = talk.ask("what?"), talk.ask("why?")
    assert (first.prediction, first.estimated_for, later.prediction) == ("measured", "", "none")
    assert "on this machine" in describe(first) and "nothing predicts" not in describe(later)


def test_all_ways_to_ask_take_the_same_options():
    names = {"exit", "max_image_tokens", "allow_uncertified", "max_new_tokens", "sampling", "cancel", "progress"}
    assert AskOptions.__annotations__.keys() == names
    assert {field.name for field in dataclasses.fields(Options)} == names | {"budget"}
    for way in (Session.ask, Session.stream, Session.ask_async, Session.conversation):
        assert way.__annotations__["options"] == "Unpack[AskOptions]"
        parameters = list(inspect.signature(way).parameters)
        assert parameters[1] == "image" and parameters[-2:] == ["budget", "options"]
    for way in (Conversation.ask, Conversation.stream, Options.for_question):
        assert "Unpack[QuestionOptions]" in way.__annotations__.values()


def test_a_word_that_is_no_option_is_a_type_error(handmade):
    with Session.open(handmade) as session:
        for way in (session.ask, session.stream, session.ask_async):
            with pytest.raises(TypeError, match="max_tokens"):
                way(BLACK, "what?", max_tokens=3)
        with pytest.raises(TypeError, match="max_tokens"):
            session.conversation(BLACK, max_tokens=3)
        talk = session.conversation(BLACK)
        for word in ("exit", "allow_uncertified", "budget", "max_tokens"):
            for way in (talk.ask, talk.stream):
                with pytest.raises(TypeError, match=word):
                    way("what?", **{word: 1})
        assert talk.ask("what?").text == session.ask(BLACK, "what?").text == ANSWER


def a_conversation_hands_its_options_on(handmade):
    """Those that a question doesn't name are the conversation's."""
    cancel, told = Cancel(), []
    with Session.open(handmade) as session:
        talk = session.conversation(
            BLACK, max_new_tokens=1, sampling=Sampling(stop=("1",)), cancel=cancel, progress=told.append, exit=1
        )
        assert talk.ask("what?").text == "Z" and talk.ask("what?", max_new_tokens=9).text == "Zé"
        assert talk.ask("what?", max_new_tokens=9, sampling=Sampling()).text == ANSWER and told
        count = len(told)
        assert talk.ask("what?", progress=None).text == "Z" and len(told) == count
        cancel.cancel()
        assert talk.ask("what?", cancel=Cancel()).text == "Z"
        with pytest.raises(Exception, match="cancelled"):
            talk.ask("what?")


def test_a_conversation_hands_its_options_on(handmade):
    a_conversation_hands_its_options_on(handmade)


def test_that_check_fails_where_it_forgets_them(handmade, monkeypatch):
    monkeypatch.setattr(Options, "for_question", wrong(Options.for_question, ("replace(self,", "replace(Options(),")))
    with pytest.raises(AssertionError):
        a_conversation_hands_its_options_on(handmade)


def test_an_exit_is_named_by_itself_its_depth_or_its_text(handmade):
    session = Session.open(handmade)
    for exit in (Exit(1), 1, "1"):
        assert session.ask(BLACK, "what?", exit=exit).exit == Exit(1)
        assert list(session.vision_states(BLACK, [exit])) == [Exit(1)]
        talk = session.conversation(BLACK, exit=exit)
        assert talk.ask("what?").exit == talk.exit == Exit(1)
    for exit, error in ((9, BundleError), ("1@4", BundleError), ("01", InputError), (True, InputError), (None, InputError)):
        with pytest.raises(error, match="exit"):
            session.vision_states(BLACK, [1, exit])
