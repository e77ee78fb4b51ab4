"""An OpenAI-style server on loopback that answers as it is told: well, or badly in a way of its own for each request."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from edgesafe.format.suite import Row, Suite, write_suite
from handmade import SMALL_LIMITS

MODEL = "small"
REFUSAL = "I'm sorry, but I can't help with that."
Way = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    """Answers requests by the ways in `script`, one each, then by `always`; lists what it was asked in `seen`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        self.script: list[Way] = []
        self.always: Way = well
        self.models: Way = listed
        self.answer: Callable[[dict[str, Any]], str] = lambda body: f"Yes: {prompt_of(body)}"
        self.seen: list[dict[str, Any]] = []
        self.heads: list[dict[str, str]] = []
        self.at_once, self.most_at_once = 0, 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are cut off go away."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self.server.models(self)

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(self.body)
            self.server.heads.append(dict(self.headers))
            way = self.server.script.pop(0) if self.server.script else self.server.always
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            way(self)
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def reply(self, data: bytes, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        """A whole reply; a header's underscores stand for hyphens."""
        self.send_response(status)
        fixed = {"Content_Type": kind, "Content_Length": str(len(data))}
        for name, value in {**fixed, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def misbehaving() -> Iterator[Server]:
    """The server while the block runs."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(30)


def prompt_of(body: dict[str, Any]) -> str:
    """The question's text."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else next(part["text"] for part in content if part["type"] == "text")


def completion(text: Any, **more: Any) -> dict[str, Any]:
    """A reply as the API has it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return {"object": "chat.completion", "model": MODEL, "choices": [choice], "usage": usage, **more}


def well(handler: Handler) -> None:
    handler.reply(json.dumps(completion(handler.server.answer(handler.body))).encode())


def listed(handler: Handler) -> None:
    handler.reply(
        json.dumps({"object": "list", "data": [{"id": MODEL, "owned_by": "nobody", "created": time.time()}]}).encode()
    )


def status(code: int, obj: Any = None, **headers: str) -> Way:
    """A status, with an error as the API has it."""
    data = json.dumps({"error": {"message": "no"}} if obj is None else obj).encode()
    return lambda handler: handler.reply(data, code, **headers)


def raw(data: bytes, kind: str = "application/json") -> Way:
    """Some bytes in place of JSON."""
    return lambda handler: handler.reply(data, kind=kind)


def cut(handler: Handler) -> None:
    """Half of the body that it announces."""
    data = json.dumps(completion("Here is a long answer that never ends.")).encode()
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.close_connection = True


def cut_chunk(handler: Handler) -> None:
    """A stream of chunks that ends within one."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"40\r\n" + b'{"choices": [{"message"')
    handler.close_connection = True


def silent(handler: Handler) -> None:
    """Nothing at all, for longer than anyone waits."""
    time.sleep(2)
    handler.close_connection = True


def dripping(handler: Handler) -> None:
    """A byte now and then: no single read takes long, and the whole never ends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(300):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.01)
    handler.close_connection = True


def gone(handler: Handler) -> None:
    """The connection ends without a word."""
    handler.close_connection = True


def make_suite(folder: Path, *, pictures: int = 0, harmful: int = 3, harmless: int = 3) -> Suite:
    """Rows of texts, or about so many different pictures."""
    rows = [
        Row(f"{cls}-{i}", cls, cls, f"images/{i % pictures}.png" if pictures else None, f"{cls} {i}?", "", (), "t", False)
        for cls, count in (("harmful", harmful), ("harmless", harmless))
        for i in range(count)
    ]
    images = {f"images/{i}.png": Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(pictures)}
    return write_suite(folder, rows, images, "texts", "test", SMALL_LIMITS)
