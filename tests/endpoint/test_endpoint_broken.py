"""A server that misbehaves in each way: an error of the tree that names it, answers kept, and the same command continues."""

from __future__ import annotations

import json
import time

import pytest

import misbehaving as ways
from edgesafe import cli
from edgesafe.endpoint import ask, client
from edgesafe.endpoint.address import Address
from edgesafe.endpoint.client import Again, Client
from edgesafe.endpoint.kept import read_run
from edgesafe.errors import EndpointError, EndpointUnavailableError
from misbehaving import completion, make_suite, raw, status

pytestmark = pytest.mark.enable_socket
REFUSED, DOWN = EndpointError.exit_code, EndpointUnavailableError.exit_code
FILTER = {"error": {"message": "blocked", "code": "content_filter"}}


def choices(obj):
    return raw(json.dumps(obj).encode())


# What the server does, the exit code, and what the message must say.
ENDS = {
    "key": (status(401), REFUSED, "refuses the key: 401: no"),
    "forbidden": (status(403), REFUSED, "refuses the key: 403"),
    "not found": (status(404, {"detail": "Not Found"}), REFUSED, "404: Not Found"),
    "bad request": (status(400), REFUSED, "refuses the request with 400: no"),
    "too large": (status(413), REFUSED, "refuses the request with 413"),
    "redirect": (status(307, Location="http://example.org/v1"), REFUSED, "sends elsewhere, to http://example.org/v1"),
    "moved": (status(301), REFUSED, "sends elsewhere, to nowhere"),
    "web page": (raw(b"<!doctype html><title>Welcome</title>", "text/html; charset=utf-8"), REFUSED, "a web page came back"),
    "web page called JSON": (raw(b"  <html></html>"), REFUSED, "a web page came back"),
    "stream": (raw(b'data: {"choices": []}\n\n', "text/event-stream"), REFUSED, "streams, which it was not asked to"),
    "endless": (lambda handler: handler.reply(b"[" * 400), REFUSED, "the reply does not end"),
    "server error": (status(500), DOWN, "answers 500: no, 6 times"),
    "bad gateway with a page": (
        lambda h: h.reply(b"<html>502</html>", 502, "text/html"),
        DOWN,
        "answers 502: <html>502</html>",
    ),
    "busy": (status(429), DOWN, "answers 429: no, 6 times"),
    "busy for an hour": (status(429, Retry_After="3600"), DOWN, "asks to wait 1 h 00 min"),
    "not JSON": (raw(b'{"choices": [{"mess'), DOWN, "the reply is not JSON (19 bytes, status 200), 6 times"),
    "nothing": (raw(b""), DOWN, "the reply is not JSON (0 bytes, status 200)"),
    "deep JSON": (raw(b"[" * 390), DOWN, "the reply is not JSON"),
    "a list": (choices([]), DOWN, "JSON, but not an object"),
    "no choices": (choices({"choices": []}), DOWN, "no choice with a message"),
    "null choices": (choices({"choices": None}), DOWN, "no choice with a message"),
    "a choice of text": (choices({"choices": ["yes"]}), DOWN, "no choice with a message"),
    "no message": (choices({"choices": [{"text": "an older API"}]}), DOWN, "no choice with a message"),
    "a number": (choices(completion(7)), DOWN, "content is not a text"),
    "an error with 200": (choices({"error": {"message": "overloaded\x1b[2J"}}), DOWN, "holds an error: overloaded [2J"),
    "cut": (ways.cut, DOWN, "the reply ends after"),
    "cut within a chunk": (ways.cut_chunk, DOWN, "the reply ends after"),
    "gone": (ways.gone, DOWN, "the connection failed"),
    "silent": (ways.silent, DOWN, "no whole reply came within 0.1 s"),
    "dripping": (ways.dripping, DOWN, "no whole reply came within 0.1 s"),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(client, "MAX_REPLY", 395)


@pytest.mark.parametrize("name", ENDS)
def test_a_broken_server_is_named_keeps_the_answers_and_continues(server, words, texts, tmp_path, capsys, name):
    way, code, message = ENDS[name]
    server.script = [ways.well] * 2
    server.always = way
    late = {"timeout": "0.1"} if message.startswith("no whole") else {}
    assert cli.main(words(**late)) == code
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and "\x1b" not in err
    assert server.url in err and ", row " in err and "2 of 6 answers are kept" in err and "the same command continues" in err
    kept = read_run(tmp_path / "run").kept
    assert len(kept) == 2 and not (tmp_path / "run/endpoint.json").exists()
    server.always, before = ways.well, len(server.seen)
    assert cli.main(words()) == 0
    assert len(server.seen) - before == 4 and len(read_run(tmp_path / "run").kept) == 6
    assert kept.items() <= read_run(tmp_path / "run").kept.items()


def test_what_passes_is_not_worth_a_word(server, words, tmp_path):
    """Every passing fault once, in front of a good answer or another fault: no answer is lost or asked twice."""
    faults = [way for name, (way, code, _) in ENDS.items() if code == DOWN and "hour" not in name]
    server.script = [way for one, other in zip(faults[::2], faults[1::2], strict=False) for way in (one, other, ways.well)]
    assert cli.main(words(timeout="0.1", suite=str(make_suite(tmp_path / "suite", harmless=9).root))) == 0
    assert len(server.seen) == 12 + len(faults) // 2 * 2 and len(read_run(tmp_path / "run").kept) == 12


def test_a_server_that_is_not_there(words, capsys):
    assert cli.main(words(endpoint="http://127.0.0.1:9/v1")) == DOWN
    assert "the server can't be reached: Connection refused" in capsys.readouterr().err


def test_retry_after_is_kept_and_counts_as_no_try(server, words, monkeypatch):
    times: list[float] = []

    def timed(way):
        return lambda handler: (times.append(time.monotonic()), way(handler))

    monkeypatch.setattr(ask, "TRIES", 2)
    busy = timed(status(429, {}, Retry_After="0.2"))
    server.script = [timed(ways.well), busy, busy, busy, timed(status(500)), timed(ways.well)]
    assert cli.main(words()) == 0
    assert all(later - earlier >= 0.2 for earlier, later in zip(times[1:4], times[2:5], strict=True))


def test_a_server_that_refuses_is_asked_once_however_many_threads_there_are(server, words):
    server.always = status(401)
    assert cli.main(words(parallel="6")) == REFUSED
    assert len(server.seen) == 1


def test_a_filter_of_the_server_is_a_refusal_and_counted(server, words, tmp_path, capsys):
    finish = {"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]}
    refusal = {"choices": [{"message": {"content": None, "refusal": ways.REFUSAL}, "finish_reason": "stop"}]}
    server.answer = lambda body: ways.REFUSAL
    server.script = [status(400, FILTER), choices(finish), choices(refusal)]
    assert cli.main([*words(), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["counts"]["filtered"] == 2 and shown["counts"]["empty"] == 0
    assert shown["harmful"]["k"] == 0 and shown["overrefusal"]["k"] == 3


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", ""),
        (None, ""),
        ([{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}], "ab"),
        ("half \ud83d", "half ?"),
        ("line\u2028break", "line\u2028break"),
    ],
)
def test_odd_contents_are_kept_as_texts(server, content, text):
    server.always = choices(completion(content))
    assert Client(Address.parse(server.url), None, 5).chat({"messages": [{"content": "x"}]}).text == text


def test_wrong_counts_of_tokens_are_no_counts(server):
    server.always = choices({**completion("a"), "usage": {"prompt_tokens": True, "completion_tokens": -1}})
    said = Client(Address.parse(server.url), None, 5).chat({"messages": [{"content": "x"}]})
    assert (said.prompt_tokens, said.completion_tokens) == (None, None)


def test_a_date_in_retry_after(server):
    server.always = status(503, Retry_After="Mon, 01 Jan 2024 00:00:00 GMT")
    with pytest.raises(Again) as raised:
        Client(Address.parse(server.url), None, 5).chat({"messages": []})
    assert raised.value.after_s == 0.0
