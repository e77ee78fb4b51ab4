"""Other people's clients: openai's, sync, async and streaming, and huggingface_hub's, which shares no code with it."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import nullcontext, suppress

import httpx2
import load
import openai
import pytest
from huggingface_hub import InferenceClient

from edgesafe import Session
from edgesafe.serve import chat_request
from edgesafe.serve.wire import Reply
from engines import Gate, Watched
from handmade import ANSWER
from serving import roomy_bundle, serving, until, user, watched_cancels

pytestmark = pytest.mark.enable_socket
DECODER = "text/decoder_model_merged.onnx"


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    return roomy_bundle(tmp_path_factory.mktemp("roomy") / "bundle")


@pytest.fixture(scope="module")
def server(roomy):
    with Session.open(roomy) as session, serving(session) as server:
        yield server


def options(server, **more):
    return {"base_url": f"http://127.0.0.1:{server.port}/v1", "api_key": "none", "timeout": 60, **more}


@pytest.fixture
def client(server):
    with openai.OpenAI(**options(server)) as made:
        yield made


def asked(**more):
    return {"model": "handmade", "messages": [user()], **more}


def test_openai_answers_and_says_what_is_certified(client):
    raw = client.chat.completions.with_raw_response.create(**asked(extra_body={"exit": "1"}))
    reply = raw.parse()
    assert reply.choices[0].message.content == ANSWER and reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 9 and reply.system_fingerprint.startswith("fp_")
    assert reply.edgesafe["certified"] is True and raw.headers["x-edgesafe-exit"] == reply.edgesafe["exit"] == "1"


def test_openai_streams(client):
    chunks = list(client.chat.completions.create(**asked(stream=True, stream_options={"include_usage": True})))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert chunks[-1].usage.completion_tokens == 9 and chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-2].edgesafe["certified"] is True
    with client.chat.completions.stream(**asked()) as helped:  # the client's own collector of events
        assert helped.get_final_completion().choices[0].message.content == ANSWER


def test_openai_takes_its_own_answers_back_as_turns(client):
    first = client.chat.completions.create(**asked())
    again = [user(), first.choices[0].message.model_dump(), user("and?", None)]
    reply = client.chat.completions.create(model="handmade", messages=again)
    assert reply.choices[0].message.content == ANSWER and reply.edgesafe["certified"] is False
    assert "follows 2 earlier messages" in reply.edgesafe["note"]


def test_openai_s_models(client):
    assert [model.id for model in client.models.list()] == ["handmade"]
    assert client.models.retrieve("handmade").edgesafe["certified"] == ["1", "2"]


@pytest.mark.parametrize(
    ("more", "kind", "code"),
    [
        ({"temperature": 9}, openai.BadRequestError, "input"),
        ({"model": "gpt-5"}, openai.NotFoundError, "not_found"),
        ({"extra_body": {"exit": "3"}}, openai.UnprocessableEntityError, "uncertified_exit"),
        ({"extra_body": {"budget_ms": 5}}, openai.UnprocessableEntityError, "not_measured"),
    ],
)
def test_openai_knows_the_errors_and_asks_once(client, server, more, kind, code, monkeypatch):
    for stream in (False, True):
        with pytest.raises(kind) as raised:
            client.chat.completions.create(**asked(stream=stream) | more)
        assert raised.value.code == code and raised.value.body["message"] and raised.value.type


def test_openai_knows_a_wrong_token_and_a_full_queue(roomy):
    gate = Gate(DECODER, 2)
    with Session.open(roomy, engine=Watched(gate)) as session:
        with serving(session, token="x" * 20, waiting=0) as server:
            with openai.OpenAI(**options(server, max_retries=0)) as stranger, pytest.raises(openai.AuthenticationError):
                stranger.models.list()
            with openai.OpenAI(**options(server, api_key="x" * 20, max_retries=0)) as known:
                first = threading.Thread(target=lambda: known.chat.completions.create(**asked()))
                first.start()
                gate.reached()
                with pytest.raises(openai.RateLimitError) as raised:
                    known.chat.completions.create(**asked())
                gate.go()
                first.join(60)
        assert int(raised.value.response.headers["retry-after"]) >= 1


def test_openai_s_closed_stream_ends_the_request_within_a_token(roomy, monkeypatch):
    gate, cancels = Gate(DECODER, 4), watched_cancels(monkeypatch)
    with Session.open(roomy, engine=Watched(gate)) as session, serving(session) as server:
        with openai.OpenAI(**options(server)) as client:
            stream = client.chat.completions.create(**asked(stream=True))
            next(iter(stream))
            gate.reached()
            stream.close()
            until(lambda: cancels[0].cancelled)
            gate.go()
            assert client.chat.completions.create(**asked()).choices[0].message.content == ANSWER
        # Nine runs are the second answer's; the first one's fourth was running when its client went away.
        assert [name for _, name in session.engine.ran].count(DECODER) == 4 + 9


def test_openai_s_async_client_from_8_connections_gets_each_its_own(server):
    lengths = [1, 3, 4, 7, 8, 9]

    async def one(client, number):
        length = lengths[number % len(lengths)]
        if number % 2:
            reply = await client.chat.completions.create(**asked(max_tokens=length))
            return length, reply.usage.completion_tokens, reply.choices[0].message.content
        made, text = 0, ""
        stream = await client.chat.completions.create(
            **asked(max_tokens=length, stream=True, stream_options={"include_usage": True})
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or "" if chunk.choices else ""
            made = chunk.usage.completion_tokens if chunk.usage else made
        return length, made, text

    async def all_of_them():
        limits = httpx2.Limits(max_connections=8)
        async with openai.AsyncOpenAI(**options(server), http_client=httpx2.AsyncClient(limits=limits)) as client:
            return await asyncio.gather(*(one(client, number) for number in range(60)))

    replies = asyncio.run(all_of_them())
    whole = ANSWER.encode()
    assert all(made == length and text == whole[:length].decode(errors="replace") for length, made, text in replies)


@pytest.mark.parametrize("stream", [False, True])
def test_huggingface_hub_answers(server, stream):
    client = InferenceClient(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", timeout=60)
    got = client.chat_completion([user()], model="handmade", max_tokens=20, seed=1, stream=stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in got) if stream else got.choices[0].message.content
    assert text == ANSWER


def test_huggingface_hub_knows_the_errors(server):
    from huggingface_hub.errors import BadRequestError

    client = InferenceClient(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", timeout=60)
    with pytest.raises(BadRequestError, match="temperature"):
        client.chat_completion([user()], model="handmade", temperature=9)


def test_a_slice_of_the_load_and_that_it_sees_a_wrong_answer(monkeypatch):
    assert load.run(None, requests=24, streams=2)["wrong"] == []
    monkeypatch.setattr(chat_request, "_max_new_tokens", lambda fields: fields.known.add("max_tokens") or 2)
    assert len(load.run(None, requests=24, streams=1)["wrong"]) == 16  # all but those that were closed


def test_the_load_sees_a_late_event_closed_streams_that_go_on_and_budgets_that_do_not_count(monkeypatch):
    write = Reply.write

    def slow_and_deaf(self, data):
        time.sleep(0.006)
        with suppress(OSError):
            write(self, data)

    monkeypatch.setattr(Reply, "write", slow_and_deaf)
    monkeypatch.setattr(Reply, "watched", lambda self, cancel: nullcontext())
    monkeypatch.setattr(Reply, "gone", lambda self: False)
    monkeypatch.setattr(chat_request, "_budget", lambda fields: fields.known.add("budget_ms"))
    monkeypatch.setattr(load, "SHARES", (1000.0,))
    found = load.broken(load.run(None, requests=8, streams=4))
    assert found == ["the first event is late", "closed streams go on", "fewer budgets are kept than by ask"]
