"""`edgesafe serve` under load: 500 requests by the openai client from 8 connections, none wrong, none mixed up.

`make load` runs it on build/DEVICE/bundle, or without one on the bundle made by hand, and writes the counts. Half of the
connections are the asynchronous client's, half the other one's. Of three requests one is whole, one a stream, and one a stream
that its client closes after the first token, to disturb the others. Each text must be what the session answers when it is asked
alone. Then, one by one:

- streams: their first event must come within 5 ms of their first token at the median. The slowest is written as well.
- streams that their client closes at the first event: once it has closed, no more than the token that is being made may still
  come. Tokens since it began to close are written as well: closing takes the client longer than a small model's token.
- budgets, by the API and by `Session.ask` in turns: the API must keep no fewer, but for a tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx2
import numpy as np
import openai
from PIL import Image
from soak import TOKENS, Question, questions

from edgesafe import Budget, Session, measure
from edgesafe.errors import NoExitFitsError
from edgesafe.progress import table
from edgesafe.serve import chat
from edgesafe.serve.server import Server
from handmade import make_bundle
from results import write_result
from serving import CHAT, serving, until
from serving import chat as chat_once

REQUESTS, CONNECTIONS = 500, 8
STREAMS, MOST_MS = 50, 5.0
MEASURE_S = 10.0
# Budgets are shares of the time that is predicted for the deepest exit.
SHARES = (0.8, 1.0, 1.2, 1.5, 2.0, 3.0)
# The share of budgets that the API may keep less often than `ask` on a busy machine.
FEWER_KEPT, LEAST_TOKENS = 0.1, 6
WAYS = ("whole", "stream", "closed")


def png(question: Question) -> bytes:
    """The question's picture as a file."""
    if not isinstance(question.picture, np.ndarray):
        return Path(question.picture).read_bytes()
    Image.fromarray(question.picture).save(out := io.BytesIO(), "PNG")
    return out.getvalue()


def request(question: Question, model: str) -> dict[str, Any]:
    """A question as the API's fields."""
    data = base64.b64encode(png(question)).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": question.prompt}, picture]}]
    return {"model": model, "messages": messages, "max_tokens": TOKENS}


async def one(client: openai.AsyncOpenAI, way: str, question: Question, model: str) -> str | None:
    """Ask in one of three ways: the answer's text, and an exit that is not the question's in its place; None where closed."""
    fields = request(question, model) | {"extra_body": {"exit": str(question.exit)}}
    if way == "whole":
        return whole(await client.chat.completions.create(**fields), question)
    stream = await client.chat.completions.create(**fields, stream=True)
    if way == "closed":
        await anext(aiter(stream))
        await stream.close()
        return None
    return joined([chunk async for chunk in stream], question)


def one_sync(client: openai.OpenAI, way: str, question: Question, model: str) -> str | None:
    """The same by the other client."""
    fields = request(question, model) | {"extra_body": {"exit": str(question.exit)}}
    if way == "whole":
        return whole(client.chat.completions.create(**fields), question)
    stream = client.chat.completions.create(**fields, stream=True)
    if way == "closed":
        next(iter(stream))
        stream.close()
        return None
    return joined(list(stream), question)


def whole(reply: Any, question: Question) -> str:
    """A reply's text."""
    return reply.choices[0].message.content if reply.edgesafe["exit"] == str(question.exit) else reply.edgesafe["exit"]


def joined(chunks: list[Any], question: Question) -> str:
    """A stream's text."""
    (exit,) = [chunk.edgesafe["exit"] for chunk in chunks if hasattr(chunk, "edgesafe")]
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks) if exit == str(question.exit) else exit


def options(port: int) -> dict[str, Any]:
    """What a client is made with."""
    return {"base_url": f"http://127.0.0.1:{port}/v1", "api_key": "none", "timeout": 600.0, "max_retries": 0}


async def load(port: int, model: str, made: list[Question], requests: int) -> tuple[Counter[str], list[str]]:
    """All requests: how many of each client and way, and what was wrong."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    http = httpx2.AsyncClient(limits=httpx2.Limits(max_connections=CONNECTIONS // 2), timeout=None)
    async with openai.AsyncOpenAI(**options(port), http_client=http) as client:
        with openai.OpenAI(**options(port)) as other:

            async def worker(first: int) -> None:
                for number in range(first, requests, CONNECTIONS):
                    question, way = made[number * 7 % len(made)], WAYS[number % len(WAYS)]
                    counts[f"{way}, {'async' if first % 2 else 'sync'}"] += 1
                    try:
                        if first % 2:
                            text = await one(client, way, question, model)
                        else:
                            text = await asyncio.to_thread(one_sync, other, way, question, model)
                    except openai.OpenAIError as error:
                        text = f"{type(error).__name__}: {error}"
                    if way != "closed" and text != question.text:
                        wrong.append(f"request {number} ({way}): {text!r}, alone {question.text!r}")

            await asyncio.gather(*(worker(first) for first in range(CONNECTIONS)))
    return counts, wrong


@contextmanager
def token_times() -> Iterator[list[float]]:
    """When each token was made in the server while the block runs; the client is in the same process, with the same clock."""
    times: list[float] = []
    real = chat._Answering._step

    def timed(answering: Any, progress: Any) -> None:
        if progress.stage == "decode":
            times.append(time.perf_counter())
        real(answering, progress)

    chat._Answering._step = timed
    try:
        yield times
    finally:
        chat._Answering._step = real


def first_events(server: Server, question: Question, count: int) -> list[float]:
    """Ms from each stream's first token in the server to its first event at the client."""
    late = []
    with token_times() as times:
        for _ in range(count):
            times.clear()
            late.append((arrival(server, question) - times[0]) * 1e3)
    return sorted(late)


def cancels(server: Server, question: Question, count: int) -> tuple[Counter[int], Counter[int]]:
    """How many streams so many tokens came in after their client had closed them, at the first event, and since it began to."""
    late: Counter[int] = Counter()
    since: Counter[int] = Counter()
    fields = request(question, server.app.model) | {"stream": True, "extra_body": {"exit": str(question.exit)}}
    with token_times() as times, openai.OpenAI(**options(server.port)) as client:
        for _ in range(count):
            times.clear()
            stream = client.chat.completions.create(**fields)
            next(iter(stream))
            began = time.perf_counter()
            stream.close()
            closed = time.perf_counter()
            until(lambda: server.app.line.held == 0)
            late[sum(at > closed for at in times)] += 1
            since[sum(at > began for at in times)] += 1
    return late, since


def budgets(server: Server, question: Question, count: int) -> dict[str, Any]:
    """One question with many budgets, by `ask` and by the API in turns: what became of them, and how often the exit was one."""
    session, picture, same = server.app.session, png(question), 0
    outcomes = {"ask": Counter(kept=0, missed=0, refused=0), "serve": Counter(kept=0, missed=0, refused=0)}
    messages = request(question, server.app.model)["messages"]

    def ask(ms: float) -> tuple[str, bool | None]:
        try:
            answer = session.ask(picture, question.prompt, Budget(ms), max_new_tokens=TOKENS)
        except NoExitFitsError:
            return "", None
        return str(answer.exit), answer.deadline_met

    def serve(ms: float) -> tuple[str, bool | None]:
        reply = chat_once(server, *messages, model=server.app.model, budget_ms=ms, max_tokens=TOKENS)[2]
        if "error" in reply and reply["error"]["code"] == "no_exit_fits":
            return "", None
        return reply["edgesafe"]["exit"], reply["edgesafe"]["deadline_met"]

    deepest = session.ask(picture, question.prompt, Budget(1e6), max_new_tokens=TOKENS).predicted_ttft_ms
    for number in range(count):
        ways, exits = [("ask", ask), ("serve", serve)][:: 1 - 2 * (number % 2)], []
        for name, way in ways:
            exit, met = way(deepest * SHARES[number % len(SHARES)])
            outcomes[name][{True: "kept", False: "missed", None: "refused"}[met]] += 1
            exits.append(exit)
        same += exits[0] == exits[1]
    return {"asked": count, **{name: dict(counts) for name, counts in outcomes.items()}, "same_exit": same}


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
    """Load a server of a bundle, or of a copy of it, which is measured.

    Returns:
        {bundle, wanted, connections, questions, distinct_answers, ways, wrong, requests_s, first_event_ms, tokens_after_close,
        tokens_since_closing_began, whole_tokens, budgets}.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "bundle"
        _ = shutil.copytree(bundle, root) if bundle else make_bundle(root)
        measure(root, seconds=MEASURE_S if bundle else 0.1)
        # Room for as many again: a closed stream holds its place until its token is made, and its client asks anew meanwhile.
        with Session.open(root, allow_uncertified=True) as session, serving(session, waiting=2 * CONNECTIONS) as server:
            made = questions(session, bundle is None)
            begin = time.perf_counter()
            counts, wrong = asyncio.run(load(server.port, server.app.model, made, requests))
            took = time.perf_counter() - begin
            long = max(made, key=lambda question: len(question.text))
            late, (after, since) = first_events(server, made[0], streams), cancels(server, long, streams)
            fields = request(long, server.app.model) | {"exit": str(long.exit)}
            usage = chat_once(server, *fields.pop("messages"), **fields)[2]["usage"]
            kept = budgets(server, made[0], streams)
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
        "tokens_after_close": {str(count): after[count] for count in sorted(after)},
        "tokens_since_closing_began": {str(count): since[count] for count in sorted(since)},
        "whole_tokens": usage["completion_tokens"],
        "budgets": kept,
    }


def broken(row: dict[str, Any]) -> list[str]:
    """The promises that a run broke."""
    budgets, late = row["budgets"], row["tokens_after_close"]
    checks = {
        "an answer is wrong": row["wrong"] != [],
        "requests are missing": sum(row["ways"].values()) != row["wanted"],
        "the first event is late": row["first_event_ms"]["median"] > MOST_MS,
        "closed streams go on": not set(late) <= {"0", "1"},
        "the answer is too short to show it": row["whole_tokens"] < LEAST_TOKENS,
        "fewer budgets are kept than by ask": budgets["serve"]["kept"] < budgets["ask"]["kept"] - FEWER_KEPT * budgets["asked"],
    }
    return [what for what, holds in checks.items() if holds]


def main() -> int:
    """Run it and print the counts; 1 where a promise broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="a bundle (the one made by hand)")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--out", type=Path, help="write the counts there")
    args = parser.parse_args()
    row = run(args.bundle if args.bundle and args.bundle.is_dir() else None, args.requests)
    if args.out:
        write_result(args.out, row)
    print(table([[key, str(value)] for key, value in row.items()], ["what", "value"]))
    print("\n".join(found := broken(row)), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
