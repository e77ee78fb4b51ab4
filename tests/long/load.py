"""`edgesafe serve` under load: 500 requests by the openai client from 8 connections, none wrong, none mixed up.

`make load` runs it on build/DEVICE/bundle, or without one on the bundle made by hand, and writes the counts. Of three requests
one is whole, one a stream, and one a stream that its client closes after the first token, to disturb the others. Each text must
be what the session answers when it is asked alone. Then streams are asked one by one: their first event must come within
5 ms of their first token at the median. The slowest, which a busy machine makes later, is written as well.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx2
import numpy as np
import openai
from PIL import Image
from soak import TOKENS, Question, questions

from edgesafe import Session
from edgesafe.progress import table
from edgesafe.serve import chat
from edgesafe.serve.server import Server
from handmade import make_bundle
from results import write_result
from serving import CHAT, serving

REQUESTS, CONNECTIONS = 500, 8
STREAMS, MOST_MS = 50, 5.0
WAYS = ("whole", "stream", "closed")


def request(question: Question, model: str) -> dict[str, Any]:
    """A question as the API's fields."""
    if isinstance(question.picture, np.ndarray):
        Image.fromarray(question.picture).save(out := io.BytesIO(), "PNG")
        data = out.getvalue()
    else:
        data = Path(question.picture).read_bytes()
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}
    messages = [{"role": "user", "content": [{"type": "text", "text": question.prompt}, picture]}]
    return {"model": model, "messages": messages, "max_tokens": TOKENS}


async def one(client: openai.AsyncOpenAI, way: str, question: Question, model: str) -> str | None:
    """Ask in one of three ways: the answer's text, and an exit that is not the question's in its place; None where closed."""
    fields = request(question, model) | {"extra_body": {"exit": str(question.exit)}}
    if way == "whole":
        reply = await client.chat.completions.create(**fields)
        return reply.choices[0].message.content if reply.edgesafe["exit"] == str(question.exit) else reply.edgesafe["exit"]
    text, exit = "", ""
    stream = await client.chat.completions.create(**fields, stream=True)
    async for chunk in stream:
        if way == "closed":
            await stream.close()
            return None
        text += chunk.choices[0].delta.content or ""
        exit = getattr(chunk, "edgesafe", {}).get("exit", exit)
    return text if exit == str(question.exit) else exit


async def load(port: int, model: str, made: list[Question], requests: int) -> tuple[Counter[str], list[str]]:
    """All requests: how many of each way, and what was wrong."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    http = httpx2.AsyncClient(limits=httpx2.Limits(max_connections=CONNECTIONS), timeout=None)
    options = {"base_url": f"http://127.0.0.1:{port}/v1", "api_key": "none", "timeout": 600.0, "max_retries": 0}
    async with openai.AsyncOpenAI(**options, http_client=http) as client:

        async def worker(first: int) -> None:
            for number in range(first, requests, CONNECTIONS):
                question, way = made[number * 7 % len(made)], WAYS[number % len(WAYS)]
                counts[way] += 1
                try:
                    text = await one(client, way, question, model)
                except openai.OpenAIError as error:
                    text = f"{type(error).__name__}: {error}"
                if way != "closed" and text != question.text:
                    wrong.append(f"request {number} ({way}): {text!r}, alone {question.text!r}")

        await asyncio.gather(*(worker(first) for first in range(CONNECTIONS)))
    return counts, wrong


def first_events(server: Server, question: Question, count: int) -> list[float]:
    """Ms from each stream's first token in the server to its first event at the client; both are in this process."""
    tokens: list[float] = []
    real = chat._Answering._step

    def timed(answering: Any, progress: Any) -> None:
        if (progress.stage, progress.done) == ("decode", 1):
            tokens.append(time.perf_counter())
        real(answering, progress)

    chat._Answering._step = timed
    try:
        return [(arrival(server, question) - tokens[-1]) * 1e3 for _ in range(count)]
    finally:
        chat._Answering._step = real


def arrival(server: Server, question: Question) -> float:
    """When a stream's first event was there."""
    data = json.dumps(request(question, server.app.model) | {"stream": True, "exit": str(question.exit)}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost:{server.port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=600) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        seen = b""
        while b"data: " not in seen:
            seen += connection.recv(65536)
        at = time.perf_counter()
        while connection.recv(65536):
            pass
    return at


def run(bundle: Path | None, requests: int = REQUESTS, streams: int = STREAMS) -> dict[str, Any]:
    """Load a server of a bundle.

    Returns:
        {bundle, wanted, connections, questions, distinct_answers, ways, wrong, requests_s, first_event_ms}.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = bundle or make_bundle(Path(folder) / "bundle").root
        with Session.open(root, allow_uncertified=True) as session, serving(session) as server:
            made = questions(session, bundle is None)
            begin = time.perf_counter()
            counts, wrong = asyncio.run(load(server.port, server.app.model, made, requests))
            took = time.perf_counter() - begin
            late = sorted(first_events(server, made[0], streams))
            name = session.manifest.name
    return {
        "bundle": name,
        "wanted": requests,
        "connections": CONNECTIONS,
        "questions": len(made),
        "distinct_answers": len({question.text for question in made}),
        "ways": dict(sorted(counts.items())),
        "wrong": wrong[:20],
        "requests_s": round(requests / took, 1),
        "first_event_ms": {"median": round(late[len(late) // 2], 2), "most": round(late[-1], 2)},
    }


def main() -> int:
    """Run it and print the counts; 1 where a promise broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="a bundle (the one made by hand)")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--out", type=Path, help="write the counts there")
    options = parser.parse_args()
    row = run(options.bundle if options.bundle and options.bundle.is_dir() else None, options.requests)
    if options.out:
        write_result(options.out, row)
    print(table([[key, str(value)] for key, value in row.items()], ["what", "value"]))
    kept = not row["wrong"] and sum(row["ways"].values()) == row["wanted"] and row["first_event_ms"]["median"] <= MOST_MS
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
