"""Who may ask and what may be read: tokens, addresses, limits of time and size; no file or network but the allowed ones."""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import time

import pytest

from edgesafe import Session, cli
from edgesafe.errors import ConfigError
from edgesafe.serve import access, line, sources, wire
from edgesafe.serve.access import Access, check_host, read_token
from edgesafe.serve.server import Server
from edgesafe.serve.sources import check_folders
from handmade import ANSWER
from mutants import wrong
from serving import CHAT, JSON, PNG, chat, no_way_out, send, serving, until, user

pytestmark = pytest.mark.enable_socket
TOKEN = "a-token-of-24-characters"


@pytest.fixture
def session(handmade):
    with Session.open(handmade) as opened:
        yield opened


@pytest.fixture
def guarded(session):
    with serving(session, token=TOKEN) as server:
        yield server


def the_token_is_asked_for(server):
    paths = ["/v1/models", "/metrics", "/", "/bundle", "/nowhere"]
    almost = (f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN)
    for given in (None, "", "Bearer", "Bearer ", "Bearer wrong", *almost):
        for path in paths:
            status, headers, _ = send(server, path=path, headers={"Authorization": given})
            assert (status, headers.get("WWW-Authenticate")) == (401, "Bearer"), (given, path)
        for path in ("/ask", CHAT):
            assert send(server, "POST", path, b"{}", {**JSON, "Authorization": given})[0] == 401


def test_with_a_token_every_request_brings_it(guarded):
    the_token_is_asked_for(guarded)
    right = {"Authorization": f"bearer {TOKEN}"}
    assert chat(guarded, headers=right)[2]["choices"][0]["message"]["content"] == ANSWER
    assert send(guarded, path="/v1/models", headers=right, host="edge.example")[0] == 200
    assert send(guarded, path="/health", host="edge.example")[0] == 200
    assert [send(guarded, path=path, headers=right)[0] for path in ("/", "/bundle")] == [404, 404]
    assert send(guarded, path="/v1/models", headers={**right, "Origin": "http://evil.example"})[0] == 403


def test_that_check_fails_where_a_beginning_is_enough(guarded, monkeypatch):
    monkeypatch.setattr(access, "_digest", lambda token: token[:8].encode())
    guarded.access = Access(guarded.access.hosts, TOKEN)
    with pytest.raises(AssertionError):
        the_token_is_asked_for(guarded)


def test_the_token_is_compared_as_digests_of_one_length_in_constant_time(guarded, monkeypatch):
    seen, real = [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: seen.append((len(a), len(b))) or real(a, b))
    for token in ("x", TOKEN, "é" * 400):
        send(guarded, path="/v1/models", headers={"Authorization": f"Bearer {token}"})
    assert seen == [(32, 32)] * 3


def test_without_a_token_any_token_will_do(session):
    with serving(session) as server:
        assert send(server, path="/v1/models", headers={"Authorization": "Bearer none"})[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "8.8.8.8"])
def test_an_address_that_others_reach_needs_a_token(session, handmade, host, capsys):
    with pytest.raises(ConfigError, match="others could reach"):
        Server(session, 0, host=host)
    assert cli.main(["serve", str(handmade), "--host", host]) == 10
    assert "--token-file" in capsys.readouterr().err
    assert check_host(host, TOKEN) == host


def test_addresses():
    assert [check_host(host, None) for host in ("localhost", "127.0.0.1", "127.3.2.1", "::1")][0::3] == ["127.0.0.1", "::1"]
    for host in ("edge.example", "", "127.0.0.1:80", "1"):
        with pytest.raises(ConfigError, match="not an address"):
            check_host(host, TOKEN)


@pytest.mark.parametrize(
    ("data", "fine"),
    [
        (f" {TOKEN}\n".encode(), True),
        (b"x" * 16, True),
        (b"x" * 15, False),
        (b"", False),
        (b"two words in one line", False),
        (b"\xff" * 20, False),
        (b"a\0" * 20, False),
        (b"x" * 5000, False),
        (None, False),
    ],
)
def test_token_files(tmp_path, handmade, data, fine, capsys):
    path = tmp_path / "token"
    if data is not None:
        path.write_bytes(data)
    if fine:
        assert read_token(path) == data.decode().strip()
        return
    assert cli.main(["serve", str(handmade), "--token-file", str(path)]) == 10
    assert "--token-file" in capsys.readouterr().err


def test_the_command_takes_folders_and_a_queue(tmp_path, handmade, capsys):
    assert cli.main(["serve", str(handmade), "--files", str(tmp_path / "none")]) == 10
    assert cli.main(["serve", str(handmade), "--queue", "-1"]) == 10
    assert "no such folder" in capsys.readouterr().err


@pytest.fixture
def files(tmp_path):
    """An allowed folder, and a picture beside it that must not be read."""
    allowed, other = tmp_path / "allowed", tmp_path / "other"
    (allowed / "in a").mkdir(parents=True)
    other.mkdir()
    for path in (allowed / "a.png", allowed / "in a" / "é.png", other / "secret.png", tmp_path / "allowed-not"):
        path.write_bytes(PNG)
    (allowed / "link.png").symlink_to(other / "secret.png")
    (allowed / "inner.png").symlink_to("a.png")
    (allowed / "way").symlink_to(other)
    os.mkfifo(allowed / "pipe")
    (allowed / "large.png").write_bytes(PNG + b"\0" * (sources.MAX_PICTURE - len(PNG) + 1))
    return tmp_path


GOOD = ("allowed/a.png", "allowed/in%20a/%C3%A9.png", "allowed/in a/é.png", "allowed/%61.png")
BAD = (
    *("other/secret.png", "allowed/../other/secret.png", "allowed/%2e%2e/other/secret.png", "allowed/..%2fother%2fsecret.png"),
    *("allowed/%252e%252e/other/secret.png", "allowed/./a.png", "allowed//a.png", "allowed", "allowed/", "allowed/in a"),
    *("allowed/link.png", "allowed/inner.png", "allowed/way/secret.png", "allowed/pipe", "allowed-not", "allowed/none.png"),
    *(
        "allowed/a.png%00",
        "allowed/a.png?x",
        "allowed/a.png#x",
        "allowed/%ff.png",
        "allowed/a.png/",
        "allowed/.\n./other/secret.png",
    ),
    *("allowed/" + "x" * 5000, "allowed/..\\other\\secret.png"),
)


def only_the_allowed_are_read(server, root):
    for name in GOOD:
        for url in (f"file://{root}/{name}", f"FILE://localhost{root}/{name}"):
            assert chat(server, user(url=url))[0] == 200, url
    urls = [f"file://{root}/{name}" for name in BAD]
    urls += [
        "file:///etc/hostname",
        "file:///proc/self/environ",
        "file:a.png",
        "file:///",
        "file://",
        f"file://host{root}/{GOOD[0]}",
    ]
    for url in urls:
        status, _, reply = chat(server, user(url=url))
        assert status == 400 and "no such picture in the allowed folders" in reply["error"]["message"], url


def test_files_are_read_below_allowed_folders_alone_and_nothing_is_fetched(session, files):
    with no_way_out(files / "allowed", files) as seen, serving(session, folders=[files / "allowed"]) as server:
        only_the_allowed_are_read(server, files.resolve())
        assert "too large" in chat(server, user(url=f"file://{files}/allowed/large.png"))[2]["error"]["message"]
        for url in ("http://127.0.0.1/a.png", "https://example.com/a.png", "ftp://x/a", "//x/a", str(files / "allowed/a.png")):
            assert chat(server, user(url=url))[0] == 400
        assert chat(server)[0] == 200
    assert seen == []


def test_that_check_sees_a_file_and_a_look_up(files):
    with no_way_out(files / "allowed", files) as seen:
        (files / "allowed" / "a.png").read_bytes()
        (files / "allowed" / "link.png").read_bytes()
        with pytest.raises(RuntimeError, match="getaddrinfo"):
            socket.create_connection(("example.com", 80))
    assert seen == [str(files / "other" / "secret.png"), "socket.getaddrinfo example.com"]


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("_descriptor", ("os.O_RDONLY | os.O_NOFOLLOW", "os.O_RDONLY")),
        ("_parts", ('"", ".", ".."', '"", "."')),
    ],
)
def test_that_check_fails_where_links_or_dots_are_followed(session, files, monkeypatch, name, edit):
    made = wrong(getattr(sources, name), edit)
    monkeypatch.setattr(sources, name, made)
    with serving(session, folders=[files / "allowed"]) as server, pytest.raises(AssertionError):
        only_the_allowed_are_read(server, files.resolve())


def test_a_folder_that_is_a_link_was_allowed_by_its_owner(session, files):
    (files / "named").symlink_to(files / "allowed")
    folders = check_folders([files / "named"])
    assert folders == ((files / "allowed").resolve(),)
    with serving(session, folders=folders) as server:
        assert chat(server, user(url=f"file://{files.resolve()}/allowed/a.png"))[0] == 200


def exchange(server, data, *, wait=True):
    """What comes back for raw bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(data)
        seen = b""
        while wait and (more := connection.recv(65536)):
            seen += more
    return seen


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\r\n" + b"X: %b\r\n" % (b"a" * 40_000), b"431"),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10_000, b"431"),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 101 + b"\r\n", b"431"),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n", b"431"),
        (b"GET /v1/models\r\n\r\n", b"421"),
        (b"GET /v1/models HTTP/9.9\r\n\r\n", b"505"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:PORT\r\nContent-Type: application/json\r\n"
         b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", b"411"),
    ],
)  # fmt: skip
def test_heads_have_limits_and_refusals_the_api_s_form(session, head, status):
    with serving(session) as server:
        seen = exchange(server, head.replace(b"PORT", str(server.port).encode()))
    assert seen.split()[1] == status and b'{"error": {"message": ' in seen and b"Connection: close" in seen


def test_a_refusal_is_read_though_the_body_was_not(guarded, monkeypatch):
    monkeypatch.setattr(wire, "_DRAIN_S", 60)  # on a busy machine too
    size = wire.MAX_BODY
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n".encode()
    assert exchange(guarded, head + b" " * 5_000_000).split()[1] == b"401"


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_slow_client_loses_its_connection_however_steadily_it_sends(session, monkeypatch, part):
    monkeypatch.setattr(wire, "HEAD_S", 0.3)
    monkeypatch.setattr(wire, "_DRAIN_S", 0.1)
    monkeypatch.setattr("edgesafe.serve.handler.BODY_S", 0.3)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost:PORT\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n"
    with serving(session) as server, socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        if part == "body":
            monkeypatch.setattr(wire, "HEAD_S", 60)
            connection.sendall(head.replace("PORT", str(server.port)).encode())
        connection.settimeout(0.02)
        seen, end = b"", time.monotonic() + 60
        while not seen and time.monotonic() < end:
            connection.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                seen = connection.recv(65536)
        assert seen.split()[1] == b"408"
        monkeypatch.undo()
        assert chat(server)[0] == 200


def test_large_bodies_are_read_a_few_at_a_time(session, monkeypatch):
    monkeypatch.setattr(line, "MOST_BODIES", 5000)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost:PORT\r\nContent-Type: application/json\r\nContent-Length: 4000\r\n\r\n"
    with serving(session) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as first:
            first.sendall(head.replace("PORT", str(server.port)).encode())
            until(lambda: server.app.line._bodies == 4000)
            status, headers, reply = chat(server, user("x" * 1000))
            assert status == 429 and int(headers["Retry-After"]) >= 1 and "large" in reply["error"]["message"]
            assert chat(server)[0] == 200
        until(lambda: server.app.line._bodies == 0)
        assert "tokens" in chat(server, user("x" * 1000))[2]["error"]["message"]
