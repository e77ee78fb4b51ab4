"""The HTTP side of ``edgesafe serve``: the page, what it shows of the bundle, and streamed answers.

Only this machine's browser may talk to it, and only for a person who opened the page: it listens on 127.0.0.1, takes no request
whose Host is another name (DNS rebinding) or whose Origin is another page (cross-site requests), and sends no CORS headers.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import secrets
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from edgesafe.errors import BusyError, CertificateError, ClosedError, ConfigError, DeviceError, EdgesafeError, InputError
from edgesafe.format.exits import read_exit
from edgesafe.format.fields import Fields
from edgesafe.runtime import Budget, Engine, Progress, Session
from edgesafe.runtime.choose import QUANTILE

HOST, PORT = "127.0.0.1", 8765
# A picture of 16 MiB in base64, and room for the prompt.
MAX_BODY = 22 << 20
MAX_REQUESTS = 8
IDLE_S = 30.0
PAGE = Path(__file__).parent / "page.html"


class _Refused(Exception):
    """A request that isn't one of the page's: what to say, and with which HTTP status."""

    def __init__(self, status: HTTPStatus, what: str, expected: str = "") -> None:
        super().__init__(what)
        self.status, self.error = status, InputError(what, expected=expected)


class PageServer(ThreadingHTTPServer):
    """The server of one session; ``port`` is the one that it got where 0 was asked for."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, session: Session, port: int) -> None:
        self.session = session
        self.slots = threading.BoundedSemaphore(MAX_REQUESTS)
        super().__init__((HOST, port), PageHandler)
        self.hosts = {f"{name}:{self.port}" for name in (HOST, "localhost")}

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is not an error; anything else is a bug, and reported."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class PageHandler(BaseHTTPRequestHandler):
    """One request; each connection carries one."""

    server: PageServer
    server_version, sys_version = "edgesafe", ""
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S

    def do_GET(self) -> None:
        """The page, or the bundle's facts."""
        self._answered(self._get)

    def do_POST(self) -> None:
        """A question."""
        self._answered(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what people ask stays on the page."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses by itself, in the same form as the rest."""
        self._json(code, {"error": shown(InputError(message or HTTPStatus(code).phrase))})

    def _answered(self, work: Any) -> None:
        self.close_connection = True
        if not self.server.slots.acquire(blocking=False):
            self._json(HTTPStatus.SERVICE_UNAVAILABLE, {"error": shown(BusyError("too many requests at once"))})
            return
        try:
            self._check_sender()
            work()
        except (ConnectionError, TimeoutError):
            raise
        except _Refused as refused:
            self._json(refused.status, {"error": shown(refused.error)})
        except EdgesafeError as error:
            self._json(status_of(error), {"error": shown(error)})
        except Exception as error:
            what = {"type": "Bug", "what": f"{type(error).__name__}; the terminal says more"}
            self._json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": what})
            raise
        finally:
            self.server.slots.release()

    def _check_sender(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0].lower() not in self.server.hosts:
            raise _Refused(HTTPStatus.MISDIRECTED_REQUEST, "the Host is not this server", " or ".join(self.server.hosts))
        origin = self.headers.get("Origin")
        if origin is not None and origin.lower() not in {f"http://{host}" for host in self.server.hosts}:
            raise _Refused(HTTPStatus.FORBIDDEN, "the request comes from another page")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise _Refused(HTTPStatus.FORBIDDEN, "the request comes from another site")

    def _get(self) -> None:
        if self.path == "/":
            nonce = secrets.token_urlsafe(16)
            page = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", page.encode(), nonce)
        elif self.path == "/bundle":
            self._json(HTTPStatus.OK, facts(self.server.session))
        else:
            raise _Refused(HTTPStatus.NOT_FOUND, "there is no such page", "/")

    def _post(self) -> None:
        if self.path != "/ask":
            raise _Refused(HTTPStatus.NOT_FOUND, "there is no such page", "/ask")
        options = read_ask(self._body())
        lines = _Lines(self)
        with self.server.session.stream(**options, progress=lines.progress) as stream:
            lines.begin()
            try:
                for piece in stream:
                    lines.write({"piece": piece})
                lines.write({"answer": stream.answer.to_dict()})
            except EdgesafeError as error:
                lines.write({"error": shown(error)})

    def _body(self) -> bytes:
        if self.headers.get_content_type() != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body is not JSON", "Content-Type: application/json")
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "the body's length is not given", "Content-Length")
        if int(length) > MAX_BODY:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the picture is too large", "at most 16 MiB")
        body = self.rfile.read(int(length))
        if len(body) != int(length):
            raise ConnectionAbortedError
        return body

    def _json(self, status: int, obj: Mapping[str, Any]) -> None:
        self._send(status, "application/json; charset=utf-8", json.dumps(obj).encode())

    def _send(self, status: int, kind: str, body: bytes, nonce: str = "") -> None:
        self._head(status, kind, nonce)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _head(self, status: int, kind: str, nonce: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        policy = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        if nonce:
            policy += f"; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src blob: data:; connect-src 'self'"
        self.send_header("Content-Security-Policy", policy)


class _Lines:
    """JSON lines as they come; the connection's end is the body's."""

    def __init__(self, handler: PageHandler) -> None:
        self._handler = handler

    def begin(self) -> None:
        self._handler._head(HTTPStatus.OK, "application/x-ndjson; charset=utf-8")
        self._handler.end_headers()

    def write(self, obj: Mapping[str, Any]) -> None:
        self._handler.wfile.write((json.dumps(obj) + "\n").encode())

    def progress(self, progress: Progress) -> None:
        # Written at every step, also to notice a browser that went away: the error ends the request and gives its turn up.
        self.write({"progress": asdict(progress)})


def read_ask(body: bytes) -> dict[str, Any]:
    """The options of ``Session.stream`` that a request's JSON gives.

    Raises:
        InputError: The body is not such JSON.
    """
    try:
        obj = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError("the body is not JSON", expected="{image, prompt, budget_ms or exit}") from error
    fields = Fields(obj, "the request", InputError)
    try:
        image = base64.b64decode(fields.text("image"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("the picture is not base64", where="image") from error
    options: dict[str, Any] = {
        "image": image,
        "prompt": fields.text("prompt"),
        "budget": Budget(fields.number("budget_ms")) if fields.has("budget_ms") else None,
        "exit": read_exit(fields) if fields.has("exit") else None,
    }
    if fields.has("max_new_tokens"):
        options["max_new_tokens"] = fields.integer("max_new_tokens", 1)
    fields.done()
    return options


def facts(session: Session) -> dict[str, Any]:
    """What the page shows of a bundle before anything is asked."""
    manifest = session.manifest
    # A question of a line; the page says that it is a prediction for one.
    prediction = session.predict(min(manifest.image_tokens + 24, manifest.text.context_length - 1))
    verdicts = {e.exit: e.to_dict() for e in session.certificate.exits} if session.certificate else {}
    return {
        "name": manifest.name,
        "device": manifest.device,
        "quantization": manifest.quantization,
        "reference": str(manifest.reference),
        "allow_uncertified": session.allow_uncertified,
        "prediction": prediction.source,
        "note": prediction.note,
        "exits": [
            {
                "exit": str(spec.exit),
                "certified": spec.exit in session.certified,
                "predicted_ms": prediction.ttft_ms(spec.graphs, QUANTILE, session.correction),
                "verdict": verdicts.get(spec.exit),
            }
            for spec in manifest.exits
        ],
    }


def shown(error: EdgesafeError) -> dict[str, Any]:
    """An error as the page shows it."""
    parts = {"what": error.what, "where": error.where, "expected": error.expected, "todo": error.todo}
    return {"type": type(error).__name__, **parts, "exit_code": error.exit_code}


def status_of(error: EdgesafeError) -> HTTPStatus:
    """The HTTP status of an error of the tree."""
    if isinstance(error, InputError):
        return HTTPStatus.BAD_REQUEST
    if isinstance(error, CertificateError | DeviceError):
        return HTTPStatus.CONFLICT
    return HTTPStatus.SERVICE_UNAVAILABLE if isinstance(error, BusyError | ClosedError) else HTTPStatus.INTERNAL_SERVER_ERROR


def serve(
    path: str | os.PathLike[str],
    *,
    port: int = PORT,
    threads: int | None = None,
    allow_uncertified: bool = False,
    engine: Engine | None = None,
) -> None:
    """Open a bundle and serve the page until Ctrl-C; its address goes to stdout.

    Args:
        path: The bundle's folder.
        port: Of 127.0.0.1; 0 takes a free one.
        threads: Threads of each graph; see ``Session.open``.
        allow_uncertified: Let the page use exits without a passed verdict.
        engine: What runs the graphs; by default Python's onnxruntime.

    Raises:
        ConfigError: The port is not one, or it is taken.
        BundleError, CertificateMismatchError: As by ``Session.open``.
    """
    if not 0 <= port < 65536:
        raise ConfigError(f"--port is {port}", where="--port", expected="0 to 65535", todo="try --port 0")
    with Session.open(path, threads=threads, allow_uncertified=allow_uncertified, engine=engine) as session:
        try:
            server = PageServer(session, port)
        except OSError as error:
            raise ConfigError(f"can't listen: {error.strerror}", where=f"--port {port}", todo="try --port 0") from error
        with server:
            if session.standing.why:
                print(f"note: {session.standing.why}: edgesafe smoke {session.bundle.root}", file=sys.stderr, flush=True)
            print(f"http://{HOST}:{server.port}/  (for this machine only; Ctrl-C ends it)", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print(file=sys.stderr)
