"""What an ASGI server would change for `edgesafe serve`: its chats behind uvicorn, side by side with the shipped server.

    python -m venv V && V/bin/pip install -c .ci/constraints.txt -e . 'uvicorn[standard]'
    PYTHONPATH=tests V/bin/python tests/bench/asgi.py BUNDLE... --out tests/bench/results/serve-asgi.json

Each server has a process of its own, and rounds go in turns. uvicorn has the easier work: it keeps connections, which the
shipped server closes after each answer, and checks neither who asks nor how large or slow a request is.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.session_cost import PICTURE
from edgesafe import Session
from edgesafe.progress import table
from edgesafe.serve import chat
from edgesafe.serve.handler import CHAT
from edgesafe.serve.line import Line
from edgesafe.serve.server import Server
from results import write_result

SERVERS = ("standard library", "uvicorn")
ROUNDS, REQUESTS, CONNECTIONS, STREAMS, TOKENS = 5, 80, 8, 10, 16


class Reply:
    """`edgesafe.serve.wire.Reply` as a chat uses it: what its thread writes goes to the loop."""

    def __init__(self, receive: Any) -> None:
        self._loop, self._receive, self.queue = asyncio.get_running_loop(), receive, asyncio.Queue()

    def put(self, kind: str, **message: Any) -> None:
        self._loop.call_soon_threadsafe(self.queue.put_nowait, {"type": f"http.response.{kind}", **message})

    def begin(self, kind: str, headers: Any, status: int = 200) -> None:
        pairs = {"content-type": kind, **headers}.items()
        self.put("start", status=status, headers=[(name.lower().encode(), value.encode()) for name, value in pairs])

    def write(self, data: bytes) -> None:
        self.put("body", body=data, more_body=True)

    def json(self, status: int, obj: Any, headers: Any) -> None:
        body = json.dumps(obj).encode()
        self.begin("application/json; charset=utf-8", {**headers, "Content-Length": str(len(body))}, status)
        self.write(body)

    @contextlib.contextmanager
    def watched(self, cancel: Any) -> Any:
        gone = asyncio.run_coroutine_threadsafe(self._receive(), self._loop)  # the next message says that the client left
        gone.add_done_callback(lambda future: future.cancelled() or cancel.cancel())
        yield
        gone.cancel()


def serve_asgi(app: chat.App, listening: socket.socket) -> None:
    """Chats behind uvicorn, each in a thread, as they are in the shipped server."""
    import uvicorn

    threads = ThreadPoolExecutor(2 * CONNECTIONS)

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        body, message = b"", {"more_body": True}
        while message.get("more_body"):
            body += (message := await receive()).get("body", b"")
        reply = Reply(receive)
        work = threads.submit(chat.chat, app, body, reply)
        work.add_done_callback(lambda _: reply.put("body", body=b""))
        more = True
        while more:
            await send(message := await reply.queue.get())
            more = message.get("more_body", "status" in message)
        work.result()

    uvicorn.Server(uvicorn.Config(asgi, lifespan="off", log_level="warning")).run(sockets=[listening])


def child(kind: str, bundle: str, out: Path) -> None:
    """Serve until SIGINT; the moments of streams' first tokens are written then."""
    moments, real = [], chat._Answering._step

    def timed(answering: Any, progress: Any) -> None:
        if answering._asked.stream and (progress.stage, progress.done) == ("decode", 1):
            moments.append(time.perf_counter())
        real(answering, progress)

    chat._Answering._step = timed
    with contextlib.suppress(KeyboardInterrupt), Session.open(bundle, allow_uncertified=True) as session:
        server = Server(session, 0) if kind == SERVERS[0] else socket.create_server(("127.0.0.1", 0))
        port = server.port if kind == SERVERS[0] else server.getsockname()[1]
        print(port, session.manifest.name, flush=True)
        _ = server.serve_forever() if kind == SERVERS[0] else serve_asgi(chat.App(session, Line()), server)
    out.write_text(json.dumps(moments), encoding="utf-8")


class Child:
    """A server's process, and what was measured of it."""

    def __init__(self, kind: str, bundle: Path, out: Path) -> None:
        words = [sys.executable, __file__, str(bundle), "--child", kind, "--out", str(out)]
        self.process, self.out = subprocess.Popen(words, stdout=subprocess.PIPE, text=True), out
        self.port, self.model = self.process.stdout.readline().split()
        self.idle_mib = int(self.proc("statm").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        self.rates, self.cpu_ms, self.arrivals = [], [], []
        url = {"url": "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()}
        content = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": url}]
        self.body = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS}

    def proc(self, name: str) -> str:
        return Path(f"/proc/{self.process.pid}/{name}").read_text(encoding="ascii")

    def cpu_ms_now(self) -> float:
        return sum(map(int, self.proc("stat").rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK") * 1e3

    def ask(self, connection: http.client.HTTPConnection, **more: Any) -> float:
        """When an answer's first byte was there."""
        connection.request("POST", CHAT, json.dumps(self.body | more), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        _, at, rest = reply.read1(1), time.perf_counter(), reply.read()
        assert reply.status == 200 and rest, (reply.status, rest)
        return at

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", int(self.port))

    def round(self) -> None:
        """Streams one by one, then whole answers from all connections."""
        one = self.connection()
        self.arrivals += [self.ask(one, stream=True) for _ in range(STREAMS)]
        begin, cpu = time.perf_counter(), self.cpu_ms_now()
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            work = [self.connection() for _ in range(CONNECTIONS)]
            list(threads.map(lambda own: [self.ask(own) for _ in range(REQUESTS // CONNECTIONS)], work))
        self.rates.append(REQUESTS / (time.perf_counter() - begin))
        self.cpu_ms.append((self.cpu_ms_now() - cpu) / REQUESTS)

    def end(self) -> dict[str, Any]:
        """What was measured, at the median of the rounds and in each."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)
        tokens = json.loads(self.out.read_text(encoding="utf-8"))
        late = [(at - token) * 1e3 for at, token in zip(self.arrivals, tokens, strict=True)]
        found = {"first_byte_ms": statistics.median(late), "slowest_first_byte_ms": max(late), "idle_mib": self.idle_mib}
        found |= {"requests_s": statistics.median(self.rates), "cpu_ms": statistics.median(self.cpu_ms)}
        rounds = {"requests_s": [round(rate, 1) for rate in self.rates], "cpu_ms": [round(ms, 2) for ms in self.cpu_ms]}
        return {**{name: round(value, 2) for name, value in found.items()}, "rounds": rounds}


def compare(bundle: Path) -> dict[str, Any]:
    """Both servers of one bundle, round by round in turns."""
    with tempfile.TemporaryDirectory() as folder:
        both = [Child(kind, bundle, Path(folder) / str(number)) for number, kind in enumerate(SERVERS)]
        for number in range(ROUNDS):
            for one in both[:: 1 - 2 * (number % 2)]:
                one.round()
        return {"bundle": both[0].model, **{kind: one.end() for kind, one in zip(SERVERS, both, strict=True)}}


def main() -> None:
    """Compare them on each bundle and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="write the figures there")
    parser.add_argument("--child", choices=SERVERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, str(args.bundles[0]), args.out)
    rows = [compare(bundle) for bundle in args.bundles]
    settings = {"rounds": ROUNDS, "requests": REQUESTS, "connections": CONNECTIONS, "streams": STREAMS, "tokens": TOKENS}
    write_result(args.out, {"uvicorn": version("uvicorn"), **settings, "bundles": rows})
    shown = [[row["bundle"], kind, *map(str, list(row[kind].values())[:-1])] for row in rows for kind in SERVERS]
    print(table(shown, ["bundle", "server", *list(rows[0][SERVERS[0]])[:-1]]))


if __name__ == "__main__":
    main()
