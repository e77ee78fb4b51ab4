"""Where a server is, and the key that it asks for: what is given on the command line, checked before anything is sent."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from edgesafe.errors import ConfigError

CHAT = "/chat/completions"
_EXPECTED = "http://HOST:PORT/v1 or https://HOST/v1"
_MOST_KEY = 4096


@dataclass(frozen=True)
class Address:
    """An API's base address; ``path`` begins with a slash and does not end with one, or is empty.

    >>> str(Address.parse("http://127.0.0.1:8080")), str(Address.parse("https://example.org/api/v1/chat/completions"))
    ('http://127.0.0.1:8080/v1', 'https://example.org/api/v1')
    """

    secure: bool
    host: str
    port: int | None
    path: str

    @staticmethod
    def parse(text: str, option: str = "--endpoint") -> Address:
        """The address that a URL names; without a path it is that of ``/v1``. ``option`` is where it was given.

        Raises:
            ConfigError: It is not a plain HTTP address, or it holds a name, a password or a query: those may be secrets, and
                addresses are written down.
        """

        def wrong(what: str, shown: str = "") -> ConfigError:
            return ConfigError(what, where=f"{option} {shown}".rstrip(), expected=_EXPECTED)

        if not (text.isascii() and text.isprintable()) or " " in text:
            raise wrong("the address holds characters that no address has")
        try:
            split = urlsplit(text)
            port = split.port
        except ValueError as error:
            raise wrong(f"the address can't be read: {error}") from error
        if "@" in split.netloc or split.query or split.fragment:
            raise wrong("the address holds a name, a password or a query, which may be secret")
        if split.scheme not in ("http", "https") or not split.hostname:
            raise wrong("this is not an HTTP address", text)
        path = split.path.rstrip("/").removesuffix(CHAT)
        return Address(split.scheme == "https", split.hostname, port, path or "/v1")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.secure else ''}://{host}{'' if self.port is None else f':{self.port}'}{self.path}"


def read_key(variable: str | None, file: Path | None, option: str = "--key") -> str | None:
    """The key in an environment variable or a file, without the white space around it; None where neither is named.

    A variable that nobody named is never read: a key must not go to a server that it is not for. ``option`` is how the names of
    the two options begin.

    Raises:
        ConfigError: Both are named, or what is named can't be read or holds nothing that a header can.
    """
    if variable is not None and file is not None:
        raise ConfigError("two keys are named", where=f"{option}-env and {option}-file", expected="one of them")
    if variable is not None:
        where, text = f"{option}-env {variable}", os.environ.get(variable)
        if text is None:
            raise ConfigError("the environment has no such variable", where=where, todo=f"export {variable}=KEY")
    elif file is not None:
        where = f"{option}-file {file}"
        try:
            with file.open("rb") as opened:
                text = opened.read(_MOST_KEY + 2).decode("latin-1")
        except (OSError, ValueError) as error:
            raise ConfigError(f"the key can't be read: {error}", where=where, expected="a file with the key in it") from error
    else:
        return None
    key = text.strip()
    if not key or len(key) > _MOST_KEY or not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError("there is no usable key", where=where, expected="one line of printable ASCII characters")
    return key
