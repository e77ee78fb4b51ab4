"""The wire: how much and how long a request may be, how a reply is written, and an error in the API's form."""

from __future__ import annotations

import contextlib
import io
import json
import re
import select
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

from edgesafe.errors import BusyError, CertificateError, ClosedError, DeviceError, EdgesafeError, InputError
from edgesafe.runtime import Cancel

# A picture of 16 MiB in base64, and room for the messages.
MAX_BODY = 22 << 20
MAX_HEAD = 32 << 10
# A whole head, a whole body and each write must be done within so long, however steadily the bytes come.
HEAD_S, BODY_S, WRITE_S = 30.0, 60.0, 30.0
# What a client sent that nobody reads is thrown away, so that closing doesn't reset the connection before the reply was read.
_DRAIN_S = 2.0
_TYPES: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}


class Refused(Exception):
    """A request that is refused before anything is asked of the bundle: why, and with which HTTP status and headers."""

    def __init__(self, status: HTTPStatus, error: EdgesafeError, **headers: str) -> None:
        super().__init__(error.what)
        self.status, self.error = status, error
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def refused(status: HTTPStatus, what: str, expected: str = "", **headers: str) -> Refused:
    """A refusal for a wrong request; headers are written as ``Retry_After="1"``."""
    return Refused(status, InputError(what, expected=expected), **headers)


class PatientReader(io.RawIOBase):
    """Reads a connection up to a moment and, within the head, up to a size.

    A timeout for each read alone would let a client hold its connection for hours with a byte now and then.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.allow(HEAD_S, MAX_HEAD)

    def allow(self, seconds: float, size: int) -> None:
        """From now on, so long and so many bytes."""
        self._until, self._left = time.monotonic() + seconds, size

    def readable(self) -> bool:
        """It can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Some bytes.

        Raises:
            Refused: The time is over (408), or the bytes are (431: a body is read no further than its length).
        """
        if self._left <= 0:
            raise refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the head is too large", f"at most {MAX_HEAD} bytes")
        # Above 0, which would mean not to wait at all.
        self._connection.settimeout(max(self._until - time.monotonic(), 1e-3))
        try:
            got = self._connection.recv_into(memoryview(buffer)[: self._left])
        except TimeoutError as error:
            raise refused(HTTPStatus.REQUEST_TIMEOUT, "the request did not come in time") from error
        self._left -= got
        return got


class Reply:
    """The way back to a client; each connection carries one reply."""

    def __init__(self, handler: BaseHTTPRequestHandler) -> None:
        self._handler, self._head = handler, b""

    def send(self, status: int, kind: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """A whole reply."""
        self.begin(kind, {**(headers or {}), "Content-Length": str(len(body))}, status)
        self.write(body)

    def json(self, status: int, obj: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        """A whole reply of JSON."""
        self.send(status, "application/json; charset=utf-8", json.dumps(obj).encode(), headers)

    def error(self, status: int, error: EdgesafeError, headers: Mapping[str, str] | None = None) -> None:
        """An error in the API's form, which the page reads too."""
        self.json(status, {"error": api_error(error, status)}, headers)

    def begin(self, kind: str, headers: Mapping[str, str], status: int = HTTPStatus.OK) -> None:
        """The head of a reply; without ``Content-Length`` the connection's end is the body's.

        It goes out with the first of the body: on a busy machine a client that wakes up for a head alone runs before the rest.
        """
        handler = self._handler
        handler.connection.settimeout(WRITE_S)
        wire, handler.wfile = handler.wfile, io.BytesIO()
        if handler.request_version == "HTTP/0.9":
            handler.request_version = "HTTP/1.0"  # or the standard library would write no head
        handler.send_response(status)
        policy = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        fixed = {
            "Content-Type": kind,
            "Connection": "close",
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": policy,
        }
        for name, value in {**fixed, **headers}.items():
            handler.send_header(name, header_text(value))
        handler.end_headers()
        self._head, handler.wfile = handler.wfile.getvalue(), wire

    def write(self, data: bytes) -> None:
        """More of the body, at once."""
        head, self._head = self._head, b""
        self._handler.wfile.write(head + data)

    def gone(self) -> bool:
        """Whether the client has closed its end, asked without waiting; where the system can't tell, `watched` alone does."""
        if not hasattr(select, "POLLRDHUP"):
            return False
        asked = select.poll()
        asked.register(self._handler.connection, select.POLLRDHUP)
        return bool(asked.poll(0))

    @contextlib.contextmanager
    def watched(self, cancel: Cancel) -> Iterator[None]:
        """Meanwhile, cancel as soon as the client goes away, in line or running."""
        here, there = socket.socketpair()
        watcher = threading.Thread(target=_watch, args=(self._handler.connection, there, cancel), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            here.close()
            watcher.join()
            there.close()


def _watch(connection: socket.socket, ended: socket.socket, cancel: Cancel) -> None:
    """Wait for the client's end of the connection to close. What it sends instead belongs to no request."""
    extra = MAX_HEAD
    while extra > 0:
        ready, _, _ = select.select([connection, ended], [], [])
        if ended in ready:
            return
        try:
            got = len(connection.recv(4096))
        except OSError:
            got = 0
        extra = extra - got if got else 0
    cancel.cancel()


def drain(connection: socket.socket) -> None:
    """Say that the reply is whole, and read the rest of what the client sends, for a while."""
    until, left = time.monotonic() + _DRAIN_S, MAX_BODY
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        while left > 0 and (seconds := until - time.monotonic()) > 0:
            connection.settimeout(seconds)
            got = len(connection.recv(1 << 16))
            left = left - got if got else 0


def header_text(text: str) -> str:
    r"""A text as a header may hold it: ASCII in one line.

    >>> header_text("exit 6\r\nSet-Cookie: é")
    'exit 6  Set-Cookie: ?'
    """
    return re.sub(r"[^ -~]", " ", text.encode("ascii", "replace").decode())[:1000]


def api_error(error: EdgesafeError, status: int) -> dict[str, Any]:
    """An error in the API's own form.

    >>> api_error(InputError("it is empty", where="messages"), 400)
    {'message': 'it is empty (messages).', 'type': 'invalid_request_error', 'param': 'messages', 'code': 'input'}
    """
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"message": str(error), "type": kind, "param": error.where or None, "code": code_of(error, status)}


def code_of(error: EdgesafeError, status: int) -> str:
    """An error's class as a word; for a request that is refused as HTTP, the status's name says more.

    >>> code_of(BusyError("x"), 429), code_of(CertificateError("x"), 422), code_of(InputError("x"), 401)
    ('busy', 'certificate', 'unauthorized')
    """
    if isinstance(error, InputError) and status != HTTPStatus.BAD_REQUEST:
        return HTTPStatus(status).name.lower()
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).lower()


def status_of(error: EdgesafeError) -> HTTPStatus:
    """The HTTP status of an error of the tree. 422 and not 409: clients of the API send a request with 409 again."""
    if isinstance(error, InputError):
        return HTTPStatus.BAD_REQUEST
    if isinstance(error, CertificateError | DeviceError):
        return HTTPStatus.UNPROCESSABLE_ENTITY
    return HTTPStatus.SERVICE_UNAVAILABLE if isinstance(error, BusyError | ClosedError) else HTTPStatus.INTERNAL_SERVER_ERROR
