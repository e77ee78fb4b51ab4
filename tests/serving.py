"""A server on loopback with a bundle made by hand behind it, and requests to it by the standard library's own client."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

import handmade
import odd_inputs
from edgesafe import Session
from edgesafe.runtime import Cancel
from edgesafe.serve import chat as serve_chat
from edgesafe.serve.server import Server

JSON = {"Content-Type": "application/json"}
PNG = odd_inputs.encoded_as("PNG", Image.new("RGB", (9, 7), "red"))
DATA_URI = "data:image/png;base64," + base64.b64encode(PNG).decode()
CHAT = "/v1/chat/completions"
# Where each of these events has its host.
_OUT = {"socket.connect": 1, "socket.sendto": 1}
_OUT |= {"socket.getaddrinfo": 0, "socket.gethostbyname": 0, "socket.gethostbyaddr": 0}
_listening: list[Callable[[str, tuple[Any, ...]], None]] = []


@contextlib.contextmanager
def serving(session: Session, **options: Any) -> Iterator[Server]:
    """The session's server, which answers while the block runs."""
    with Server(session, 0, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(30)


def roomy_bundle(folder: Path) -> Path:
    """The bundle made by hand with room for some turns, 512 tokens instead of 64."""
    before, handmade.CONTEXT = handmade.CONTEXT, 512
    try:
        return handmade.make_bundle(folder).root
    finally:
        handmade.CONTEXT = before


@contextlib.contextmanager
def no_way_out(allowed: Path, watched: Path) -> Iterator[list[str]]:
    """Refuses look-ups and connections but to loopback; lists them, and each file in ``watched`` opened outside ``allowed``."""
    seen: list[str] = []
    inside, around = os.path.realpath(allowed), os.path.realpath(watched)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | bytes | int):
            name = f"/proc/self/fd/{args[0]}" if isinstance(args[0], int) else os.fsdecode(args[0])
            path = os.path.realpath(name)
            if f"{path}/".startswith(f"{around}/") and not f"{path}/".startswith(f"{inside}/"):
                seen.append(path)
        if event in _OUT:
            host = args[_OUT[event]]
            host = host[0] if isinstance(host, tuple) else host
            # A reverse look-up may go to the network whatever it asks for.
            if host != "127.0.0.1" or event == "socket.gethostbyaddr":
                seen.append(f"{event} {host}")
                raise RuntimeError(f"{event} {host}")

    _listen()
    _listening.append(audit)
    try:
        yield seen
    finally:
        _listening.remove(audit)


@lru_cache(maxsize=1)
def _listen() -> None:
    """Python calls a hook for good, so there is one, once."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        for audit in list(_listening):
            audit(event, args)

    sys.addaudithook(hook)


def send(server, method="GET", path="/", body=None, headers=None, host=None):
    """Status, headers and body of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest(method, path, skip_host=host is not None)
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {**({} if host is None else {"Host": host}), **(headers or {})}
    if data is not None and "Content-Length" not in given and "Transfer-Encoding" not in given:
        given["Content-Length"] = str(len(data))
    for key, value in given.items():
        if value is not None:
            connection.putheader(key, value)
    connection.endheaders(data)
    reply = connection.getresponse()
    out = reply.status, dict(reply.getheaders()), reply.read()
    connection.close()
    return out


def user(text: str = "what?", url: str | None = DATA_URI) -> dict[str, Any]:
    """A user's message, with a picture."""
    picture = [{"type": "image_url", "image_url": {"url": url}}] if url is not None else []
    return {"role": "user", "content": [{"type": "text", "text": text}, *picture]}


def chat(server, *messages, headers=None, **fields):
    """Status, headers and JSON of a chat completion; by default one question about a picture."""
    body = {"model": "handmade", "messages": list(messages) or [user()], **fields}
    status, got, data = send(server, "POST", CHAT, body, {**JSON, **(headers or {})})
    return status, got, json.loads(data)


def events(data: bytes) -> list[Any]:
    """What a stream's events hold; the last one of a whole stream is ``[DONE]``."""
    lines = [line.removeprefix("data: ") for line in data.decode().split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


def watched_cancels(monkeypatch: Any) -> list[Cancel]:
    """Every request's switch, as chats make them from here on."""
    made: list[Cancel] = []
    monkeypatch.setattr(serve_chat, "Cancel", lambda: made.append(Cancel()) or made[-1])
    return made
