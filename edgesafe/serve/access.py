"""Who may ask: this machine alone, or whoever knows the token."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Collection
from email.message import Message
from http import HTTPStatus
from pathlib import Path

from edgesafe.errors import ConfigError
from edgesafe.serve.wire import refused

HOST = "127.0.0.1"
_LEAST_TOKEN = 16
_MOST_TOKEN = 4096


class Access:
    """The rule of one server.

    Without a token only this machine may ask, and only for a person or program that meant to: a request whose Host is another
    name (DNS rebinding) or whose Origin is another page (cross-site) is refused. With a token the Host may be any name,
    since a foreign page doesn't know the token.

    Args:
        hosts: The names and ports that it is reached by.
        token: What every request must bring, or None.
    """

    def __init__(self, hosts: Collection[str], token: str | None) -> None:
        self.hosts = frozenset(hosts)
        self._digest = None if token is None else _digest(token)

    @property
    def needs_token(self) -> bool:
        """Whether a token is asked for."""
        return self._digest is not None

    def check(self, headers: Message) -> None:
        """Refuse a sender who may not ask.

        Raises:
            Refused: 401, 403 or 421.
        """
        if self._digest is not None:
            self._check_token(headers)
        else:
            hosts = headers.get_all("Host") or []
            if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
                raise refused(HTTPStatus.MISDIRECTED_REQUEST, "the Host is not this server", " or ".join(sorted(self.hosts)))
        origin = headers.get("Origin")
        if origin is not None and origin.lower() not in {f"http://{host}" for host in self.hosts}:
            raise refused(HTTPStatus.FORBIDDEN, "the request comes from another page")
        if headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise refused(HTTPStatus.FORBIDDEN, "the request comes from another site")

    def _check_token(self, headers: Message) -> None:
        given = headers.get_all("Authorization") or [""]
        scheme, _, token = given[0].partition(" ")
        # Digests have one length, so that the time tells nothing of the token, not even how long it is.
        same = hmac.compare_digest(_digest(token.strip()), self._digest or b"")
        if len(given) != 1 or scheme.lower() != "bearer" or not same:
            what, expected = "the token is missing or wrong", "Authorization: Bearer TOKEN"
            raise refused(HTTPStatus.UNAUTHORIZED, what, expected, WWW_Authenticate="Bearer")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def read_token(path: Path) -> str:
    """The token in a file, without the white space around it.

    Raises:
        ConfigError: The file can't be read, or holds nothing that is hard to guess.
    """
    where, expected = f"--token-file {path}", f"one line of {_LEAST_TOKEN} to {_MOST_TOKEN} printable ASCII characters"
    todo = "write one: python -c 'import secrets; print(secrets.token_urlsafe())' > FILE"
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_TOKEN + 2)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the token can't be read: {error}", where=where, expected=expected, todo=todo) from error
    token = data.strip().decode("latin-1")
    plain = token.isascii() and token.isprintable() and " " not in token
    if not plain or not _LEAST_TOKEN <= len(token) <= _MOST_TOKEN:
        raise ConfigError("the file holds no usable token", where=where, expected=expected, todo=todo)
    return token


def check_host(host: str, token: str | None) -> str:
    """The address to listen on.

    Raises:
        ConfigError: It is not an address, or others can reach it and there is no token.
    """
    try:
        address = ipaddress.ip_address(HOST if host == "localhost" else host)
    except ValueError as error:
        expected = "an IP address of this machine, such as 192.168.1.5 or 0.0.0.0"
        raise ConfigError(f"{host!r} is not an address", where="--host", expected=expected) from error
    if not address.is_loopback and token is None:
        what = f"others could reach {address}, and anyone of them could ask"
        raise ConfigError(what, where="--host", expected="--token-file FILE as well", todo="name a file that holds a token")
    return str(address)


def names_of(host: str, port: int) -> set[str]:
    """What a request's Host may be where a server listens on loopback.

    >>> sorted(names_of("127.0.0.1", 80))
    ['127.0.0.1', '127.0.0.1:80', 'localhost', 'localhost:80']
    """
    names = {f"[{host}]" if ":" in host else host, "localhost"}
    return {f"{name}:{port}" for name in names} | (names if port == 80 else set())
