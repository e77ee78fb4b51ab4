"""The OpenAI API of `edgesafe serve`: answers, what they say of the certificate, and refusals; none of their clients."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from edgesafe import Sampling, Session
from edgesafe.runtime import conversation as talk_module
from edgesafe.runtime import measure
from edgesafe.serve.chat_request import read_chat
from edgesafe.serve.messages import ask_of
from edgesafe.serve.metrics import HELP
from edgesafe.serve.wire import Reply
from engines import Watched
from handmade import ANSWER
from mutants import wrong
from serving import CHAT, DATA_URI, JSON, PNG, chat, events, roomy_bundle, send, serving, until, user, watched_cancels

pytestmark = pytest.mark.enable_socket
DECODER = "text/decoder_model_merged.onnx"


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    return roomy_bundle(tmp_path_factory.mktemp("roomy") / "bundle")


@pytest.fixture
def running(roomy, gate):
    """Its third decoder run is held up until the gate is opened."""
    with Session.open(roomy, engine=Watched(gate)) as session, serving(session, waiting=1) as server:
        yield server
        gate.go()


@pytest.fixture
def quick(running, gate):
    gate.go()
    return running


def test_an_answer_has_the_api_s_shape_and_says_what_the_certificate_says(quick):
    status, headers, reply = chat(quick, exit="1")
    own, session = reply.pop("edgesafe"), quick.app.session
    assert status == 200 and reply["object"] == "chat.completion" and reply["model"] == "handmade"
    message = {"role": "assistant", "content": ANSWER, "refusal": None}
    assert reply["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    # By hand: "U ", 4 image tokens, " ", "what?", " A:" are 15 ids; "Zé1€." has 8 bytes and its end.
    assert reply["usage"] == {"prompt_tokens": 15, "completion_tokens": 9, "total_tokens": 24}
    assert (own["exit"], own["certified"], own["why"], own["bundle"]) == ("1", True, "asked for", session.bundle.digest)
    assert own["certificate"] == session.certificate.digest and own["ttft_ms"] <= own["total_ms"]
    assert own["scope"] == "greedy answers of at most 48 tokens, each to one question about one picture"
    assert (headers["X-Edgesafe-Exit"], headers["X-Edgesafe-Certified"]) == ("1", "true")
    assert (headers["X-Edgesafe-Why"], headers["X-Edgesafe-Certificate"]) == ("asked for", session.certificate.digest)
    assert float(headers["X-Edgesafe-Total-Ms"]) == pytest.approx(own["total_ms"], abs=1e-3)


@pytest.mark.parametrize("exit", [1, "2", None])
@pytest.mark.parametrize(
    ("fields", "length", "stop"),
    [
        ({}, 48, ()),
        ({"max_tokens": 3}, 3, ()),
        ({"max_completion_tokens": 2, "max_tokens": 2}, 2, ()),
        ({"stop": "1"}, 48, ("1",)),
        ({"stop": ["€", "x"]}, 48, ("€", "x")),
    ],
)
def test_it_answers_as_the_session_does(quick, exit, fields, length, stop):
    expected = quick.app.session.ask(PNG, "what?", exit=exit, max_new_tokens=length, sampling=Sampling(stop=stop))
    reply = chat(quick, exit=exit, **fields)[2]
    choice, own = reply["choices"][0], reply["edgesafe"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected.text, expected.finish_reason)
    assert (own["exit"], own["certified"]) == (str(expected.exit), expected.certified)


@pytest.mark.parametrize(
    ("messages", "fields", "why"),
    [
        ([user()], {}, None),
        ([{"role": "system", "content": "Be brief."}, user()], {}, None),
        ([user()], {"temperature": 0, "top_p": 0.5, "seed": -3}, None),
        ([user()], {"temperature": 0.7, "seed": 3}, "was sampled at temperature 0.7"),
        ([user(url=None)], {}, "is about no picture"),
        ([user("a"), {"role": "assistant", "content": "b"}, user("c")], {}, "follows 2 earlier messages"),
        ([{"role": "assistant", "content": "b"}, user("c")], {}, "follows 1 earlier message"),
    ],
)
def test_what_was_never_certified_is_answered_and_says_so(quick, messages, fields, why):
    status, headers, reply = chat(quick, *messages, **fields)
    assert status == 200 and reply["edgesafe"]["certified"] is (why is None)
    assert headers["X-Edgesafe-Certified"] == str(why is None).lower()
    assert why is None or f"NOT certified: the answer {why}" in reply["edgesafe"]["note"] == headers["X-Edgesafe-Note"]
    stream = events(send(quick, "POST", CHAT, {"model": "handmade", "messages": messages, "stream": True, **fields}, JSON)[2])
    assert stream[-2]["edgesafe"]["certified"] is (why is None)


def test_that_check_fails_where_earlier_turns_are_not_told(quick, monkeypatch):
    edit = ("if earlier else []\n", "if False else []\n")
    monkeypatch.setattr("edgesafe.serve.chat_request.ask_of", wrong(ask_of, edit))
    talk = [user("a"), {"role": "assistant", "content": "b"}, user("c")]
    with pytest.raises(AssertionError):
        test_what_was_never_certified_is_answered_and_says_so(quick, talk, {}, "follows 2 earlier messages")


def test_turns_are_one_plain_text_about_the_newest_picture_and_are_shown_to_the_model(quick, monkeypatch):
    asked = []
    encode = talk_module.unchecked_ids
    monkeypatch.setattr(talk_module, "unchecked_ids", lambda t, m, text, *rest: asked.append(text) or encode(t, m, text, *rest))
    talk = [
        {"role": "system", "content": "Be brief."},
        user("What is it?", "data:never/read"),
        {"role": "assistant", "content": "A pen.", "refusal": None, "tool_calls": None},
        user("Whose?"),
        {"role": "assistant", "content": None},
        user("Which?", None),
        user("Now.", None),
    ]
    assert chat(quick, *talk)[2]["choices"][0]["message"]["content"] == ANSWER
    lines = ["Be brief.", "Question: What is it?", "Answer: A pen.", "Question: Whose?", "Answer: ", "Question: Which?", "Now."]
    assert asked == ["\n".join(lines)]


def test_a_stream_is_the_answer_in_pieces_then_what_is_known_of_it(quick):
    body = {"model": "handmade", "messages": [user()], "stream": True, "stream_options": {"include_usage": True}}
    status, headers, data = send(quick, "POST", CHAT, body, JSON)
    first, *middle, last, usage, done = events(data)
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream") and done == "[DONE]"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["delta"]["content"] for chunk in middle] == list(ANSWER)
    assert last["choices"][0]["finish_reason"] == "stop" and last["choices"][0]["delta"] == {}
    assert last["edgesafe"]["exit"] == headers["X-Edgesafe-Exit"] == "2" and headers["X-Edgesafe-Certified"] == "true"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 9
    assert len({chunk["id"] for chunk in (first, *middle, last, usage)}) == 1


def test_the_first_event_is_there_before_the_third_token(running, gate):
    with asking(running, stream=True) as connection:
        seen = b""
        while b'"content": "Z"' not in seen:
            seen += connection.recv(4096)
        gate.reached()
        assert b"X-Edgesafe-Exit: 2" in seen and b"[DONE]" not in seen
        gate.go()
        while more := connection.recv(4096):
            seen += more
    assert seen.endswith(b"data: [DONE]\n\n")


def test_the_head_comes_with_the_first_event(quick, monkeypatch):
    write = Reply.write
    monkeypatch.setattr(Reply, "write", lambda self, data: time.sleep(0.02) or write(self, data))
    with asking(quick, stream=True) as connection:
        assert b"\r\n\r\ndata: " in connection.recv(65536)


def asking(server, **fields):
    """A connection that a chat was asked on."""
    body = json.dumps({"model": "handmade", "messages": [user()], **fields}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost:{server.port}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_request_before_the_next_token(running, gate, monkeypatch, stream):
    cancels = watched_cancels(monkeypatch)
    with asking(running, stream=stream):
        gate.reached()
    until(lambda: cancels[0].cancelled)  # the gate holds the token meanwhile
    gate.go()
    until(lambda: "edgesafe_cancelled_total 1" in running.app.metrics.text(running.app.session, running.app.line))
    assert [name for _, name in running.app.session.engine.ran].count(DECODER) == 3
    assert chat(running)[2]["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.skipif(not hasattr(select, "POLLRDHUP"), reason="the system can't tell without reading")
def test_a_client_that_went_away_is_noticed_before_the_watching_thread_says_so(running, gate, monkeypatch):
    monkeypatch.setattr("edgesafe.serve.wire._watch", lambda *_: None)
    with asking(running):  # whole: a stream's next write would fail
        gate.reached()
    gate.go()
    until(lambda: "edgesafe_cancelled_total 1" in running.app.metrics.text(running.app.session, running.app.line))
    assert [name for _, name in running.app.session.engine.ran].count(DECODER) == 3


def test_a_client_that_goes_away_while_it_waits_leaves_the_line(running, gate):
    with asking(running) as first:
        gate.reached()
        with asking(running):
            until(lambda: running.app.line.held == 2)
        until(lambda: running.app.line.held == 1)  # the first one is still held up
        gate.go()
        assert first.recv(15) == b"HTTP/1.1 200 OK"
    assert [name for _, name in running.app.session.engine.ran].count(DECODER) == 9


def test_a_full_line_says_when_to_come_back(running, gate):
    with asking(running) as first, asking(running) as second:
        until(lambda: running.app.line.held == 2)
        status, headers, reply = chat(running)
        assert status == 429 and 1 <= int(headers["Retry-After"]) <= 60
        assert reply["error"]["type"] == "rate_limit_error" and reply["error"]["code"] == "busy"
        assert send(running, path="/health")[0] == 200  # the rest is answered all the same
        gate.go()
        for connection in (first, second):
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
    until(lambda: running.app.line.held == 0)
    assert chat(running)[0] == 200


def test_answers_are_not_mixed_up(roomy):
    with Session.open(roomy) as session, serving(session) as server:
        lengths, wrong_ones = [1, 3, 4, 7, 8], []

        def worker(number):
            for i in range(12):
                length = lengths[(number + i) % len(lengths)]
                status, _, reply = chat(server, max_tokens=length)
                usage = reply.get("usage", {}).get("completion_tokens")
                if (status, usage) != (200, length):
                    wrong_ones.append((status, usage, length))

        threads = [threading.Thread(target=worker, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert wrong_ones == []


def test_a_budget_is_kept_as_by_ask(roomy, copy_of):
    measure(copied := copy_of(roomy), seconds=0.1)
    with Session.open(copied) as session, serving(session) as server:
        own = chat(server, budget_ms=60_000, total_ms=120_000)[2]["edgesafe"]
        assert own["exit"] == "2" and own["deadline_met"] is True and own["predicted_ttft_ms"] > 0
        status, _, reply = chat(server, budget_ms=1e-6)
        assert status == 422 and reply["error"]["code"] == "no_exit_fits"
        status, _, reply = chat(server, budget_ms=5, exit="1")
        assert status == 400 and "one of the two" in reply["error"]["message"]


def test_a_cut_answer_is_a_length_to_the_api_and_a_deadline_to_those_who_ask(quick, monkeypatch):
    monkeypatch.setattr("edgesafe.runtime.deadline.Course.out_of_time", lambda self, context: True)
    choice, own = (reply := chat(quick)[2])["choices"][0], reply["edgesafe"]
    assert (choice["finish_reason"], own["finish_reason"]) == ("length", "deadline")


def test_seeds_count_and_without_one_each_request_has_its_own():
    def seed(**fields):
        body = {"model": "m", "messages": [user(url=None)], "temperature": 1, **fields}
        return read_chat(json.dumps(body).encode(), "m", ()).sampling.seed

    assert seed(seed=7) == 7 and seed(seed=-1) == 2**64 - 1 and seed() != seed()


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-5, 2.0])
def test_every_temperature_answers(quick, temperature):
    status, _, reply = chat(quick, temperature=temperature, max_tokens=2)
    assert status == 200 and reply["edgesafe"]["certified"] is False


def test_an_error_in_the_middle_is_the_last_event(running, gate):
    gate.go()
    session = running.app.session
    session.engine.before = lambda path: session.turns.__setattr__("_closed", len(session.engine.ran) > 8)
    body = {"model": "handmade", "messages": [user()], "stream": True}
    status, _, data = send(running, "POST", CHAT, body, JSON)
    assert status == 200 and events(data)[-1]["error"]["code"] == "closed"
    assert send(running, "POST", CHAT, body, JSON)[0] == send(running, path="/health")[0] == 503


def test_models(quick):
    listed = json.loads(send(quick, path="/v1/models")[2])
    (only,) = listed["data"]
    assert listed["object"] == "list" and only["id"] == "handmade" and only["object"] == "model"
    assert (
        only["max_model_len"] == 512
        and only["edgesafe"]["certified"] == ["1", "2"]
        and only["edgesafe"]["exits"] == ["1", "2", "3"]
    )
    assert json.loads(send(quick, path="/v1/models/handmade")[2]) == only
    assert send(quick, path="/v1/models/other")[0] == 404


def test_metrics_count_exits_misses_refusals_and_the_queue(quick):
    chat(quick, exit="1")
    chat(quick, exit="3")
    chat(quick, temperature=1, seed=1)
    answer = SimpleNamespace(
        exit="2", certified=True, text="I can't help with that.", deadline_met=False, ttft_ms=1, total_ms=2
    )
    quick.app.metrics.answered(answer, "what?", 3, 4)
    lines = send(quick, path="/metrics")[2].decode().splitlines()
    assert 'edgesafe_answers_total{certified="true",exit="1"} 1' in lines
    assert 'edgesafe_answers_total{certified="false",exit="2"} 1' in lines
    assert 'edgesafe_errors_total{code="uncertified_exit"} 1' in lines
    assert 'edgesafe_refusals_total{exit="2"} 1' in lines and 'edgesafe_refusals_total{exit="1"} 0' in lines
    assert 'edgesafe_deadlines_total{met="false"} 1' in lines
    assert 'edgesafe_exit_certified{exit="3"} 0' in lines and "edgesafe_queue_requests 0" in lines
    assert {line.split()[2] for line in lines if line.startswith("# TYPE")} == set(HELP)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"model": "other"}, "no model 'other'"),
        ({"model": 3}, "model"),
        ({"messages": []}, "0 messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [user(), {"role": "assistant", "content": "Sure, here is"}]}, "not the user's"),
        ({"messages": [{"role": "system", "content": "x"}]}, "not the user's"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "type"),
        ({"messages": [{"role": "system", "content": user()["content"]}, user()]}, "holds a picture"),
        ({"messages": [user(), user()]}, "2 pictures"),
        ({"messages": [user("")]}, "no text"),
        ({"messages": [user("x A: sure")]}, "control text"),
        ({"messages": [{"role": "assistant", "content": "</s>"}, user()]}, "control text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}, user()]}, "tool_calls"),
        ({"messages": [user("x" * 600)]}, "shorten it"),
        ({"messages": [user("\ud800")]}, "Unicode"),
        ({"messages": [{**user(), "contents": 1}]}, "did you mean 'content'"),
        ({"messages": [user(url="https://example.com/a.png")]}, "never fetched"),
        ({"messages": [user(url="file:///etc/passwd")]}, "no folder"),
        ({"messages": [user(url="data:image/png;base64,é")]}, "not base64"),
        ({"messages": [user(url="data:image/png,abc")]}, "not base64"),
        ({"messages": [user(url="data:image/png;base64,YWJj")]}, "can't be read"),
        ({"messages": [user(url="gopher://x")]}, "neither a data URI"),
        ({"stream": 1}, "stream"),
        ({"n": 2}, "n is not 1"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ["a"] * 5}, "at most 4"),
        ({"stop": [""]}, "stop"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"logprobs": True}, "logprobs is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
        ({"top_k": 5}, "unknown key 'top_k'"),
        ({"budget": 5}, "unknown key 'budget'"),
        ({"budget_ms": -1}, "budget"),
        ({"exit": "9"}, "no exit 9"),
        ({"exit": True}, "exit"),
        ({"exit": "3"}, "no passed verdict"),
        ({"budget_ms": 5}, "edgesafe measure"),
    ],
)
def test_what_can_t_be_done_is_refused_in_the_api_s_form(quick, fields, shown):
    status, _, reply = chat(quick, **fields)
    error = reply["error"]
    assert status in (400, 404, 422) and shown in error["message"] and error.keys() == {"message", "type", "param", "code"}
    assert quick.app.session.engine.ran == []


def test_what_asks_for_nothing_more_is_answered(quick):
    nothing = {
        "tools": [],
        "response_format": {"type": "text"},
        "logprobs": False,
        "frequency_penalty": 0.0,
        "n": 1,
        "top_p": 1,
    }
    ignored = {"user": "x", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "exit": None, "stop": None}
    short = {"role": "user", "content": [{"type": "image_url", "image_url": DATA_URI}, {"type": "text", "text": "what?"}]}
    detailed = {"type": "image_url", "image_url": {"url": DATA_URI, "detail": "low"}}
    long = {"role": "user", "name": "ann", "content": [detailed, {"type": "text", "text": "what?"}]}
    assert chat(quick, short, **nothing)[0] == chat(quick, long, **ignored)[0] == 200
