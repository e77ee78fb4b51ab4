"""A server on loopback with a bundle made by hand behind it, and requests to it by the standard library's own client."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

import handmade
import odd_inputs
from edgesafe import Session
from edgesafe.serve.server import Server

JSON = {"Content-Type": "application/json"}
PNG = odd_inputs.encoded_as("PNG", Image.new("RGB", (9, 7), "red"))
DATA_URI = "data:image/png;base64," + base64.b64encode(PNG).decode()
CHAT = "/v1/chat/completions"


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
