"""HTTP requests to `edgesafe serve` that are broken, hostile or merely odd, as raw bytes; randomness comes from the caller."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutations import cut, flip, grow
from odd_inputs import prompt
from serving import CHAT, DATA_URI, user

PATHS = (CHAT, "/v1/models", "/v1/models/handmade", "/health", "/metrics", "/", "/bundle", "/ask")
_ODD_PATHS = (
    "",
    "*",
    "http://localhost/v1/models",
    "//",
    "/v1/../../etc/passwd",
    "/%2e%2e/",
    "/v1/models/%ff",
    "/" + "a" * 9000,
    "/é",
)
_METHODS = ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "get", "X" * 300, "")
_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        10**400,
        0.5,
        -0.5,
        1e308,
        5e-324,
        float("nan"),
        float("inf"),
        "",
        "x",
        "1",
        "2",
    ),
    *([], {}, [[]], [None], {"a": 1}, "\ud800", "\0", "x" * 5000, [1] * 300, "</s>", "<image>", "file:///etc/passwd", "data:,"),
)
_EXTRA = (
    *("exit", "budget_ms", "total_ms", "temperature", "top_p", "seed", "stop", "max_tokens", "max_completion_tokens", "stream"),
    *("stream_options", "n", "tools", "response_format", "logit_bias", "user", "metadata", "functions", "top_k", "__proto__"),
)
_HEADERS = (
    *(b"Host: evil.example", b"Origin: http://evil.example", b"Sec-Fetch-Site: cross-site", b"Authorization: Bearer x"),
    *(b"Content-Length: 3", b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Transfer-Encoding: chunked"),
    *(
        b"Content-Type: text/plain",
        b"Expect: 100-continue",
        b"X: " + b"y" * 40_000,
        b"X: \xff\x00",
        b" folded",
        b"no colon",
        b":",
    ),
)
_TOKENS = 6
PATIENT_S, SHORT_S = 300.0, 0.3


def request(rng: random.Random, port: int, files: Path) -> tuple[str, bytes]:
    """A request's kind and bytes.

    Args:
        rng: What it is made from.
        port: The server's.
        files: A folder that holds ``allowed`` and ``other``; only the first may be read.
    """
    name, make = rng.choice(_KINDS)
    return name, make(rng, port, files)


def _body(rng: random.Random) -> dict[str, Any]:
    talk = [user(rng.choice(["what?", "how many?"]))]
    if rng.random() < 0.3:
        talk = [{"role": "system", "content": "x"}, *talk]
    if rng.random() < 0.3:
        talk += [{"role": "assistant", "content": "y"}, user("z", None)]
    return {"model": "handmade", "messages": talk, "max_tokens": _TOKENS, "stream": rng.random() < 0.3}


def _bytes(body: Any, port: int, path: str = CHAT, method: str = "POST") -> bytes:
    data = json.dumps(body).encode() if not isinstance(body, bytes) else body
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data


def _plain(rng: random.Random, port: int, files: Path) -> bytes:
    return _bytes(_body(rng), port)


def _paths(obj: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = obj.keys() if isinstance(obj, dict) else range(len(obj)) if isinstance(obj, list) else ()
    return [at, *(path for key in keys for path in _paths(obj[key], (*at, key)))]


def _edited(rng: random.Random, port: int, files: Path) -> bytes:
    """One or two places of the JSON replaced, removed or added to."""
    body: Any = {"body": _body(rng)}
    for _ in range(rng.randint(1, 2)):
        *above, last = rng.choice(_paths(body)[1:])
        at = body
        for key in above:
            at = at[key]
        change = rng.random()
        if change < 0.2 and above:
            del at[last]
        elif change < 0.4 and isinstance(at[last], dict):
            at[last][rng.choice(_EXTRA)] = rng.choice(_VALUES)
        else:
            at[last] = rng.choice(_VALUES)
        if "body" not in body or not isinstance(body["body"], dict):
            break
    return _bytes(body.get("body"), port)


def _extra(rng: random.Random, port: int, files: Path) -> bytes:
    return _bytes(_body(rng) | {key: rng.choice(_VALUES) for key in rng.sample(_EXTRA, rng.randint(1, 2))}, port)


def _odd_prompt(rng: random.Random, port: int, files: Path) -> bytes:
    said = prompt(rng)[1]
    said = said if not isinstance(said, bytes) else said.decode()
    return _bytes(_body(rng) | {"messages": [user(said) if rng.random() < 0.5 else {"role": "user", "content": said}]}, port)


def _file(rng: random.Random, port: int, files: Path) -> bytes:
    way = "".join(rng.choice(["../", "%2e%2e/", "./", "..%2f", "/", "x/", "link/", "%00", "%252e%252e/"]) for _ in range(3))
    name = rng.choice(
        ["a.png", "link.png", "../other/secret.png", "%61.png", "none.png", "", "link/secret.png", way, way + "secret.png"]
    )
    # Mostly one thing is odd at a time, or the first one would hide the others.
    place = rng.choice([*[f"{files}/allowed"] * 6, f"{files}/other", f"{files}", "/etc", ""])
    scheme = rng.choice([*["file://"] * 9, "FILE://localhost", "file:", "file://x", "http://", "ftp://", ""])
    return _bytes(_body(rng) | {"messages": [user(url=f"{scheme}{place}/{name}")]}, port)


def _data(rng: random.Random, port: int, files: Path) -> bytes:
    mutate = rng.choice([flip, cut, grow])
    url = mutate(DATA_URI.encode(), rng).decode("latin-1")
    return _bytes(_body(rng) | {"messages": [user(url=url)]}, port)


def _line(rng: random.Random, port: int, files: Path) -> bytes:
    method, path = rng.choice(_METHODS), rng.choice([*PATHS, *_ODD_PATHS])
    version = rng.choice(["HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/-1", "", "X"])
    whole = _bytes(_body(rng), port)
    return f"{method} {path} {version}".encode() + whole[whole.index(b"\r\n") :]


def _headers(rng: random.Random, port: int, files: Path) -> bytes:
    first, rest = _plain(rng, port, files).split(b"\r\n", 1)
    more = rng.choice(_HEADERS)
    kept = rest if rng.random() < 0.6 else rest.replace(rng.choice([b"Host", b"Content-Type", b"Content-Length"]), b"X")
    return b"\r\n".join([first, more, kept])


def _mutated(rng: random.Random, port: int, files: Path) -> bytes:
    data = _plain(rng, port, files)
    for _ in range(rng.randint(1, 3)):
        data = rng.choice([flip, flip, cut, grow])(data, rng) if data else data
    return data


def _noise(rng: random.Random, port: int, files: Path) -> bytes:
    return rng.randbytes(rng.randint(0, 200)) + rng.choice([b"", b"\r\n\r\n"])


def _broken_json(rng: random.Random, port: int, files: Path) -> bytes:
    odd = [b"", b"[" * 50_000, b"\xef\xbb\xbf{}", b"{}", b"null", b'{"a":1,"a":2}', b"\xff\xfe{\x00}\x00", b'"' * 3]
    mutate = rng.choice([flip, cut, grow])
    return _bytes(rng.choice([*odd, mutate(json.dumps(_body(rng)).encode(), rng)]), port)


_KINDS: list[tuple[str, Callable[[random.Random, int, Path], bytes]]] = [
    ("plain", _plain),
    *[("edited", _edited)] * 4,
    *[("extra", _extra)] * 3,
    ("prompt", _odd_prompt),
    *[("file", _file)] * 3,
    ("data", _data),
    ("line", _line),
    ("headers", _headers),
    ("mutated", _mutated),
    ("noise", _noise),
    ("json", _broken_json),
]


def exchange(port: int, data: bytes, patient: bool) -> tuple[bytes, bool]:
    """What comes back for raw bytes until the server closes, and whether this end left before anything came.

    A request that is shorter than it says is waited for. So a client that isn't patient says after a while that no more comes.
    """
    seen, left = b"", False
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENT_S if patient else SHORT_S) as connection:
        try:
            connection.sendall(data)
            while True:
                try:
                    more = connection.recv(65536)
                except TimeoutError:
                    assert not patient and not left, "it hangs"
                    left = True
                    connection.settimeout(PATIENT_S)
                    connection.shutdown(socket.SHUT_WR)
                    continue
                if not more:
                    break
                seen += more
        except ConnectionError:
            pass
    return seen, left


def judge(data: bytes, seen: bytes, left: bool) -> tuple[str, str]:
    """``refused`` with the error's code, or ``answered`` with the status.

    Raises:
        AssertionError: The reply is neither an answer nor a refusal in the API's form.
    """
    if not seen:  # nothing was asked (no line, or an empty one), or nobody waits for it any more
        assert left or not data.split(b"\n")[0].strip(), "no reply"
        return "refused", "silence"
    # A client that said it would wait for a word before its body gets that first.
    head, _, body = seen.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert b"Connection: close" in head and b"Traceback" not in body
    if status == 200:
        if b"event-stream" in head:
            assert body.endswith(b"data: [DONE]\n\n")
        return "answered", str(status)
    error = json.loads(body)["error"]
    assert (
        error.keys() == {"message", "type", "param", "code"}
        and error["message"]
        and (400 <= status < 500 or status in (501, 505))
    )
    return "refused", f"{status} {error['code']}"
