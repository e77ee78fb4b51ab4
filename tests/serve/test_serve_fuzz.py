"""The check of mutated requests fails where the server is wrong; the slice itself is among the others of `make fuzz`."""

from __future__ import annotations

import fuzz
import pytest

from edgesafe import Session
from edgesafe.serve import chat, chat_request, sources
from edgesafe.serve.wire import Reply, api_error
from mutants import wrong

pytestmark = pytest.mark.enable_socket


@pytest.fixture
def failures(handmade, tmp_path):
    """Runs so many cases against a server of this process: the details of those that failed."""
    with Session.open(handmade) as session:

        def run(count):
            made = [fuzz.one("request", number, session, handmade, tmp_path) for number in range(count)]
            return [case["detail"] for case in made if case["outcome"] == "FAILED"]

        _, server = fuzz._served(session, tmp_path)
        yield run
        server.shutdown()
        server.server_close()


def test_nothing_fails_as_it_stands(failures):
    assert failures(40) == []


def test_a_followed_link_is_seen(failures, monkeypatch):
    edit = ("os.O_RDONLY | os.O_NOFOLLOW", "os.O_RDONLY")
    monkeypatch.setattr(sources, "_descriptor", wrong(sources._descriptor, edit))
    assert any("opened" in detail and "secret.png" in detail for detail in failures(150))


def test_a_bug_is_seen(failures, monkeypatch, capsys):
    edit = ("except (ValueError, RecursionError)", "except RecursionError")
    monkeypatch.setattr(chat, "read_chat", wrong(chat_request.read_chat, edit))
    assert any("500" in detail or "AssertionError" in detail for detail in failures(80))


def test_another_form_of_error_is_seen(failures, monkeypatch):
    def text(self, status, error, headers=None):
        self.json(status, {"error": api_error(error, status)["message"]})

    monkeypatch.setattr(Reply, "error", text)
    assert failures(10) != []


def test_a_refused_whole_request_is_seen(failures, monkeypatch):
    edit = ("1 <= len(rows)", "2 <= len(rows)")
    monkeypatch.setattr(chat_request, "read_messages", wrong(chat_request.read_messages, edit))
    assert any("to plain" in detail for detail in failures(100))
