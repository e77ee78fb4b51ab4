"""Which replies are called certified by their length and their letters, in the early headers of a stream as at its end."""

from __future__ import annotations

import pytest

from edgesafe import Session
from edgesafe.runtime.scope import Scope
from serving import CHAT, JSON, chat, events, send, serving, user

pytestmark = pytest.mark.enable_socket


@pytest.fixture
def quick(handmade):
    with Session.open(handmade) as session, serving(session) as server:
        yield server


def test_an_answer_longer_than_was_certified_says_so(quick, monkeypatch):
    monkeypatch.setattr(quick.app.session, "scope", Scope(max_new_tokens=3))
    for length, certified, early in ((3, True, "true"), (4, False, "open")):
        assert chat(quick, max_tokens=length)[2]["edgesafe"]["certified"] is certified
        body = {"model": "handmade", "messages": [user()], "max_tokens": length, "stream": True}
        _, headers, data = send(quick, "POST", CHAT, body, JSON)
        assert headers["X-Edgesafe-Certified"] == early and events(data)[-2]["edgesafe"]["certified"] is certified


@pytest.mark.parametrize(("question", "inside"), [("what?", True), ("\u0447\u0442\u043e?", False), ("wh\u24d0t?", False)])
def test_a_question_in_other_letters_than_were_certified_says_so_at_once(quick, monkeypatch, question, inside):
    monkeypatch.setattr(quick.app.session, "scope", Scope(scripts=("latin",)))
    _, headers, reply = chat(quick, user(question))
    assert reply["edgesafe"]["certified"] is inside and headers["X-Edgesafe-Certified"] == str(inside).lower()
    body = {"model": "handmade", "messages": [user(question)], "stream": True}
    _, headers, data = send(quick, "POST", CHAT, body, JSON)
    assert headers["X-Edgesafe-Certified"] == str(inside).lower()
    assert events(data)[-2]["edgesafe"]["certified"] is inside
