"""One HTTP request: read within its limits, checked for who sent it, and handed to what answers its path."""

from __future__ import annotations

import io
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, NoReturn, Protocol
from urllib.parse import unquote

from edgesafe.errors import CancelledError, EdgesafeError, InputError
from edgesafe.serve import chat, page
from edgesafe.serve.access import Access
from edgesafe.serve.metrics import KIND
from edgesafe.serve.wire import BODY_S, MAX_BODY, PatientReader, Refused, Reply, drain, refused, status_of

# The paths of the page, which has no token to send.
PAGE_PATHS = ("/", "/bundle", "/ask")
CHAT, MODELS = "/v1/chat/completions", "/v1/models"


class _Server(Protocol):
    app: chat.App
    access: Access


class Handler(BaseHTTPRequestHandler):
    """One request; each connection carries one."""

    server: _Server  # type: ignore[assignment]
    server_version, sys_version = "edgesafe", ""
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # a request line without a version is answered with a head all the same
    # Or a stream's event waits until the client has acknowledged the one before: a way there and back, for each token.
    disable_nagle_algorithm = True

    def setup(self) -> None:
        """The connection, read with patience that ends."""
        super().setup()
        self.rfile.close()
        self._reader = PatientReader(self.connection)
        self.rfile = io.BufferedReader(self._reader)
        # What the standard library sets once it has read the first line, which may be too long to be read.
        self.path, self.requestline, self.command, self.request_version = "?", "", "", "HTTP/1.1"

    def handle(self) -> None:
        """The one request, and what is left of it where it was refused."""
        try:
            self.handle_one_request()
        except Refused as error:
            self.server.app.metrics.error(error.error, error.status)
            Reply(self).error(error.status, error.error)
        finally:
            drain(self.connection)

    def do_GET(self) -> None:
        """The page, facts, models, counts."""
        self._answered(self._get)

    def do_POST(self) -> None:
        """A question."""
        self._answered(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what people ask stays with them."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses by itself, in the same form as the rest."""
        self.close_connection = True
        Reply(self).error(code, InputError(message or HTTPStatus(code).phrase))

    @property
    def _route(self) -> str:
        return self.path.partition("?")[0]

    def _answered(self, work: Callable[[Reply], None]) -> None:
        self.close_connection = True
        reply, metrics = Reply(self), self.server.app.metrics
        try:
            if self._route != "/health":
                self.server.access.check(self.headers)
            work(reply)
        except (ConnectionError, TimeoutError, CancelledError):
            metrics.add("edgesafe_cancelled_total")
        except Refused as error:
            metrics.error(error.error, error.status)
            reply.error(error.status, error.error, error.headers)
        except EdgesafeError as error:
            metrics.error(error, status_of(error))
            reply.error(status_of(error), error)
        except Exception as error:
            bug = EdgesafeError(f"{type(error).__name__}; the terminal says more")
            metrics.error(bug, HTTPStatus.INTERNAL_SERVER_ERROR)
            reply.error(HTTPStatus.INTERNAL_SERVER_ERROR, bug)
            raise

    def _get(self, reply: Reply) -> None:
        app, route = self.server.app, self._route
        if route == "/" and self._has_page:
            page.send_page(reply)
        elif route == "/bundle" and self._has_page:
            reply.json(HTTPStatus.OK, page.facts(app.session))
        elif route == "/health":
            app.session.turns.check_open()
            reply.json(HTTPStatus.OK, {"status": "ok"})
        elif route == "/metrics":
            reply.send(HTTPStatus.OK, KIND, app.metrics.text(app.session, app.line).encode())
        elif route == MODELS:
            reply.json(HTTPStatus.OK, chat.models(app))
        elif unquote(route.removeprefix(f"{MODELS}/")) == app.model:
            reply.json(HTTPStatus.OK, chat.model(app))
        else:
            self._nowhere("POST", ("/ask", CHAT))

    def _post(self, reply: Reply) -> None:
        app, answer = self.server.app, chat.chat
        if self._route == "/ask" and self._has_page:
            answer = page.ask
        elif self._route != CHAT:
            self._nowhere("GET", ("/", "/bundle", "/health", "/metrics", MODELS))
        length = self._length()
        with app.line.body(length):
            answer(app, self._body(length), reply)

    @property
    def _has_page(self) -> bool:
        """The page has no token to send, so it is there for this machine's browser alone."""
        return not self.server.access.needs_token

    def _nowhere(self, other: str, paths: tuple[str, ...]) -> NoReturn:
        if self._route in paths and (self._has_page or self._route not in PAGE_PATHS):
            raise refused(HTTPStatus.METHOD_NOT_ALLOWED, f"{self._route} takes {other} alone", Allow=other)
        raise refused(HTTPStatus.NOT_FOUND, "there is no such page", f"{MODELS} or {CHAT}")

    def _length(self) -> int:
        """The body's, from a head that is in order."""
        if self.headers.get_content_type() != "application/json":
            raise refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body is not JSON", "Content-Type: application/json")
        lengths = self.headers.get_all("Content-Length") or [""]
        length = lengths[0]
        if "Transfer-Encoding" in self.headers or len(lengths) > 1 or not (length.isascii() and length.isdigit()):
            raise refused(HTTPStatus.LENGTH_REQUIRED, "the body's length is not given", "Content-Length, once")
        if len(length) > len(str(MAX_BODY)) or int(length) > MAX_BODY:
            raise refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the request is too large", "a picture of at most 16 MiB")
        return int(length)

    def _body(self, length: int) -> bytes:
        self._reader.allow(BODY_S, length)
        body = self.rfile.read(length)
        if len(body) != length:
            raise refused(HTTPStatus.BAD_REQUEST, f"the body ended after {len(body)} bytes", f"the {length} of its head")
        return body
