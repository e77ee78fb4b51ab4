"""The HTTP side of ``edgesafe serve``: a page for this machine's browser, and the OpenAI API for programs."""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import sys
import threading
from collections.abc import Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from edgesafe.errors import ConfigError
from edgesafe.runtime import Engine, Session
from edgesafe.serve.access import HOST, Access, check_host, names_of, read_token
from edgesafe.serve.chat import App
from edgesafe.serve.handler import Handler
from edgesafe.serve.line import WAITING, Line
from edgesafe.serve.sources import check_folders

PORT = 8765
MAX_CONNECTIONS = 64
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
_BUSY += b'{"error": {"message": "too many connections", "type": "server_error", "param": null, "code": "busy"}}'


class Server(ThreadingHTTPServer):
    """The server of one session; ``port`` is the one that it got where 0 was asked for.

    Args:
        session: The opened bundle.
        port: The port, or 0.
        host: The address.
        token: What every request must bring, or None.
        folders: Where pictures may be read from.
        waiting: How many requests may wait.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = MAX_CONNECTIONS

    def __init__(
        self,
        session: Session,
        port: int,
        *,
        host: str = HOST,
        token: str | None = None,
        folders: Sequence[Path] = (),
        waiting: int = WAITING,
    ) -> None:
        host = check_host(host, token)
        self.app = App(session, Line(waiting), check_folders(folders))
        self.connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        self.access = Access(names_of(host, self.port), token)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.server_address[1])

    def server_bind(self) -> None:
        """Bind, without the standard library's question to the network for this machine's name."""
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, if there are not too many."""
        if not self.connections.acquire(blocking=False):
            request.settimeout(0)
            with contextlib.suppress(OSError):
                request.sendall(_BUSY)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self.connections.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The connection's thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is not an error; anything else is a bug, and reported."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def serve(
    path: str | os.PathLike[str],
    *,
    port: int = PORT,
    host: str = HOST,
    token_file: Path | None = None,
    folders: Sequence[Path] = (),
    waiting: int = WAITING,
    threads: int | None = None,
    allow_uncertified: bool = False,
    engine: Engine | None = None,
) -> None:
    """Open a bundle and serve it until Ctrl-C; its address goes to stdout.

    Args:
        path: The bundle's folder.
        port: 0 takes a free one.
        host: The address to listen on. One that other machines can reach needs a token.
        token_file: A file that holds the token which every request must bring. The page is not served then.
        folders: Where requests may name pictures.
        waiting: How many requests may wait beside the one that runs.
        threads: Threads of each graph; see ``Session.open``.
        allow_uncertified: Let requests use exits without a passed verdict.
        engine: What runs the graphs; by default Python's onnxruntime.

    Raises:
        ConfigError: The port is not one, or it is taken; the address needs a token; a file or folder can't be used.
        BundleError, CertificateMismatchError: As by ``Session.open``.
    """
    if not 0 <= port < 65536:
        raise ConfigError(f"--port is {port}", where="--port", expected="0 to 65535", todo="try --port 0")
    if waiting < 0:
        raise ConfigError(f"--queue is {waiting}", where="--queue", expected="at least 0")
    token = read_token(token_file) if token_file is not None else None
    check_host(host, token)  # before the bundle, whose every byte is read
    folders = check_folders(folders)
    with Session.open(path, threads=threads, allow_uncertified=allow_uncertified, engine=engine) as session:
        try:
            server = Server(session, port, host=host, token=token, folders=folders, waiting=waiting)
        except OSError as error:
            what, where = f"can't listen: {error.strerror}", f"--host {host} --port {port}"
            raise ConfigError(what, where=where, todo="try --port 0") from error
        with server:
            _announce(server, session)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print(file=sys.stderr)


def _announce(server: Server, session: Session) -> None:
    if session.standing.why:
        print(f"note: {session.standing.why}: edgesafe smoke {session.bundle.root}", file=sys.stderr, flush=True)
    host = str(server.server_address[0])
    address = f"http://{f'[{host}]' if ':' in host else host}:{server.port}/"
    whom = "whoever has the token" if server.access.needs_token else "this machine only"
    print(f"{address}  (for {whom}; Ctrl-C ends it; the OpenAI API is at {address}v1)", flush=True)
