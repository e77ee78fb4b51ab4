"""One request to an OpenAI-style server and its reply, by the standard library's HTTP client.

Why not the package `openai`: one POST is all that is sent, and the rules for it are ours. That client repeats requests by
itself, follows redirects, takes its key and address from the environment, and hides which reply was repeated and why. It would
also be the first dependency beside the runtime's four.

A redirect is never followed: the key would go to whoever it names. Proxies of the environment are not used.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from edgesafe import __version__
from edgesafe.endpoint.address import CHAT, Address
from edgesafe.endpoint.reply import Said, Unusable, message_of, read_chat, shown
from edgesafe.errors import EndpointError, EndpointUnavailableError

MAX_REPLY = 8 << 20  # bytes; an answer of some hundred tokens takes some thousand
_IDLE_S = 1.0  # a kept connection is used again that soon: later the server may just be closing it
_AGAIN = frozenset({408, 409, 425, 429})
_SECRET = 12  # characters; a shorter key, such as "none", is no secret, and words of answers may look like it


class Again(Exception):
    """A reply that another try may better.

    Args:
        error: What is raised if it does not.
        after_s: Seconds that the server asks to wait; None where it does not say.
    """

    def __init__(self, error: EndpointUnavailableError, after_s: float | None = None) -> None:
        self.error = error
        self.after_s = after_s
        super().__init__(str(error))


@dataclass
class _Line:
    """A thread's connection and when it was used last, by the clock of `time.monotonic`."""

    connection: http.client.HTTPConnection
    used: float = 0.0


class Client:
    """A server at an address.

    Args:
        address: The API's.
        key: Sent as a bearer token; shown and written nowhere.
        timeout_s: Seconds that a whole reply may take.
    """

    def __init__(self, address: Address, key: str | None, timeout_s: float) -> None:
        self.address = address
        self._key = key
        self._timeout = timeout_s
        self._own = threading.local()
        self._open: set[http.client.HTTPConnection] = set()
        self._closed = False

    def again(self) -> Client:
        """The same server with fresh connections: a closed client stays closed."""
        return Client(self.address, self._key, self._timeout)

    @property
    def exposes_key(self) -> bool:
        """Whether the key leaves this machine unencrypted."""
        here = self.address.host in ("localhost", "::1") or self.address.host.startswith("127.")
        return bool(self._key) and not self.address.secure and not here

    def chat(self, body: Mapping[str, Any]) -> Said:
        """The answer to a chat completion.

        Raises:
            Again: Another try may go better.
            EndpointError: None would.
        """
        status, headers, data = self._send("POST", CHAT, json.dumps(body).encode())
        obj = self._decoded(status, headers, data)
        try:
            return read_chat(status, obj, str(self.address))
        except Unusable as error:
            raise Again(EndpointUnavailableError(str(error), where=str(self.address), expected="an answer")) from error

    def models(self) -> tuple[list[dict[str, Any]], str]:
        """The models that the server lists, and its own name; an empty list where it has none, or a broken one.

        Raises:
            Again, EndpointError: As for `chat`.
        """
        status, headers, data = self._send("GET", "/models", None)
        server = shown(headers.get("Server", ""))
        if status in (404, 405, 500, 501):  # 500 is what `transformers serve` says without a cache of the hub's
            return [], server
        obj = self._decoded(status, headers, data)
        listed = obj.get("data") if isinstance(obj, dict) and status == 200 else None
        if not isinstance(listed, list):
            return [], server
        return [one for one in listed if isinstance(one, dict) and isinstance(one.get("id"), str)], server

    def close(self) -> None:
        """End all connections, whoever waits for a reply of them; none is made any more."""
        self._closed = True
        for connection in list(self._open):
            _cut(connection)

    def _hide(self, text: bytes) -> bytes:
        """What a server sends, without the key: it may repeat it in a message, and some escape slashes in JSON."""
        if self._key and len(self._key) >= _SECRET:
            for spelled in (self._key, self._key.replace("/", "\\/")):
                text = text.replace(spelled.encode(), b"[key]")
        return text

    def _decoded(self, status: int, headers: Mapping[str, str], data: bytes) -> Any:
        """The JSON of a reply that may be used, or whose error means something.

        Raises:
            Again, EndpointError: It is neither.
        """
        where, kind = str(self.address), headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if 300 <= status < 400:
            target = shown(headers.get("Location", "nowhere"))
            what = f"the server sends elsewhere, to {target}"
            todo = "name that address if you trust it: redirects are not followed, because the key would go along"
            raise EndpointError(what, where=where, expected="the API itself", todo=todo)
        try:
            obj = json.loads(data, parse_constant=lambda _: None)  # NaN, which no file of ours may hold
        except (ValueError, RecursionError):
            obj = None
        said = f"{status}: {shown(message_of(obj, data)) or 'no message'}"
        if status in _AGAIN or status >= 500:
            what = f"the server answers {said}"
            raise Again(EndpointUnavailableError(what, where=where, expected="an answer"), _after(headers.get("Retry-After")))
        if status in (401, 403):
            todo = "name the key's variable or file: --key-env NAME or --key-file FILE"
            raise EndpointError(f"the server refuses the key: {said}", where=where, expected="a key that it knows", todo=todo)
        if kind == "text/html" or data.lstrip()[:1] == b"<":
            what = f"a web page came back ({said})" if status != 200 else "a web page came back, not the API"
            raise EndpointError(what, where=where, expected="JSON", todo="check --endpoint; it mostly ends with /v1")
        if kind == "text/event-stream":
            what = "the server streams, which it was not asked to"
            raise EndpointError(what, where=where, expected="one JSON object", todo="switch streaming off in the server")
        if status == 404:
            todo = "check --endpoint, which mostly ends with /v1, and --model"
            raise EndpointError(f"the server answers {said}", where=where, expected="a chat completion", todo=todo)
        if obj is None:
            what = f"the reply is not JSON ({len(data)} bytes, status {status})"
            raise Again(EndpointUnavailableError(what, where=where, expected="one JSON object"))
        return obj

    def _send(self, method: str, path: str, body: bytes | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one request, whole.

        Raises:
            Again: There is no whole reply within the time.
            EndpointError: The server's certificate is not valid, or the reply is far too long.
        """
        where = str(self.address)
        headers = {"Accept": "application/json", "User-Agent": f"edgesafe/{__version__}"}
        headers |= {"Content-Type": "application/json"} if body is not None else {}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        line = self._line()
        late = threading.Event()

        def cut() -> None:
            late.set()
            _cut(line.connection)

        timer = threading.Timer(self._timeout, cut)
        timer.daemon = True
        timer.start()
        try:
            if line.connection.sock is None:
                line.connection.connect()
            # Only now: `close` cuts what is connected, and what connects after it sees that it came.
            if self._closed:
                raise ConnectionAbortedError("the run ends")
            line.connection.request(method, self.address.path + path, body, headers)
            reply = line.connection.getresponse()
            data = reply.read(MAX_REPLY + 1)
            # `read` of so many bytes doesn't say by itself that the announced length never came.
            if len(data) <= MAX_REPLY and reply.length:
                raise http.client.IncompleteRead(data, reply.length)
        except ssl.SSLCertVerificationError as error:
            self._drop(line)
            what = f"the server's certificate is not valid: {error.verify_message}"
            raise EndpointError(what, where=where, expected="a server that is who it says") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._drop(line)
            raise Again(_failed(error, late.is_set(), self._timeout, where)) from error
        finally:
            timer.cancel()
        if len(data) > MAX_REPLY:
            self._drop(line)
            raise EndpointError("the reply does not end", where=where, expected=f"at most {MAX_REPLY >> 20} MiB")
        line.used = time.monotonic()
        heads = ((name, value.encode("latin-1", "replace")) for name, value in reply.getheaders())
        return reply.status, {name.title(): self._hide(value).decode("latin-1") for name, value in heads}, self._hide(data)

    def _line(self) -> _Line:
        """This thread's connection: a fresh one where the last one is gone or was idle."""
        line: _Line | None = getattr(self._own, "line", None)
        if line is not None and time.monotonic() - line.used <= _IDLE_S:
            return line
        if line is not None:
            self._drop(line)
        kind = http.client.HTTPSConnection if self.address.secure else http.client.HTTPConnection
        # The port by name: without one, http.client takes the end of an IPv6 address for it.
        port = self.address.port or (443 if self.address.secure else 80)
        line = self._own.line = _Line(kind(self.address.host, port, timeout=self._timeout))
        self._open.add(line.connection)
        return line

    def _drop(self, line: _Line) -> None:
        line.connection.close()
        self._open.discard(line.connection)
        self._own.line = None


def _cut(connection: http.client.HTTPConnection) -> None:
    """End a connection that another thread reads from, which only a shutdown wakes up."""
    try:
        if connection.sock is not None:
            connection.sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # it has just ended by itself
        return


def _failed(error: Exception, late: bool, timeout_s: float, where: str) -> EndpointUnavailableError:
    if late or isinstance(error, TimeoutError):
        what, todo = f"no whole reply came within {timeout_s:g} s", "allow more: --timeout SECONDS"
        return EndpointUnavailableError(what, where=where, expected="an answer", todo=todo)
    if isinstance(error, http.client.IncompleteRead):
        what = f"the reply ends after {len(error.partial)} bytes"
    elif isinstance(error, ConnectionRefusedError | socket.gaierror):
        what = f"the server can't be reached: {error.strerror}"
    else:
        what = f"the connection failed: {shown(str(error)) or type(error).__name__}"
    return EndpointUnavailableError(what, where=where, expected="a whole reply", todo="check that the server runs")


def _after(text: str | None) -> float | None:
    """Seconds that a header Retry-After asks for: a number, or a date.

    >>> _after("2"), _after("soon"), _after(None), _after("Mon, 01 Jan 2024 00:00:00 GMT")
    (2.0, None, None, 0.0)
    """
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(text)
        except ValueError:
            return None
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if seconds < float("inf") else None
