"""The HTTP side of `edgesafe serve`, by the standard library's own client and by bare sockets; on loopback, no browser."""

from __future__ import annotations

import base64
import json
import re
import socket

import pytest

from edgesafe import Session, cli
from edgesafe.runtime.scope import Scope
from edgesafe.serve import page
from edgesafe.serve.access import Access
from edgesafe.serve.server import MAX_CONNECTIONS, Server
from edgesafe.serve.wire import MAX_BODY, Reply
from engines import Watched
from handmade import ANSWER
from mutants import wrong
from serving import JSON, PNG, send, serving

pytestmark = pytest.mark.enable_socket
PICTURE = base64.b64encode(PNG).decode()
QUESTION = {"image": PICTURE, "prompt": "what?"}


@pytest.fixture
def running(handmade, gate):
    with Session.open(handmade, engine=Watched(gate)) as session, serving(session) as server:
        yield server
        gate.go()


def ask(server, body=None, **more):
    status, _, data = send(server, "POST", "/ask", {**QUESTION, **(body or {})}, {**JSON, **more})
    return status, [json.loads(line) for line in data.decode().splitlines()]


def test_an_answer_comes_as_lines_with_progress_pieces_and_the_whole(running, gate):
    gate.go()
    status, lines = ask(running, {"exit": "1"})
    assert status == 200
    assert "".join(line.get("piece", "") for line in lines) == ANSWER == lines[-1]["answer"]["text"]
    assert [line["progress"]["stage"] for line in lines if "progress" in line] == ["vision"] * 2 + ["decode"] * 9
    assert lines[-1]["answer"]["exit"] == "1" and lines[-1]["answer"]["certified"] is True


def test_an_answer_longer_than_was_certified_says_so(running, gate, monkeypatch):
    gate.go()
    monkeypatch.setattr(running.app.session, "scope", Scope(max_new_tokens=3))
    for length, certified in ((3, True), (4, False)):
        answer = ask(running, {"max_new_tokens": length})[1][-1]["answer"]
        assert answer["certified"] is certified and ("NOT certified: the answer has 4 tokens" in answer["note"]) != certified


def test_pieces_come_while_the_answer_is_being_made(running, gate):
    body = json.dumps(QUESTION).encode()
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as connection:
        head = f"POST /ask HTTP/1.1\r\nHost: localhost:{running.port}\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        seen = b""
        while b'{"piece": "Z"}' not in seen:
            seen += connection.recv(4096)
        gate.reached()  # the third decoder run is held up, and the first piece is here
        gate.go()
        while more := connection.recv(4096):
            seen += more
    assert b'"answer"' in seen


def test_an_event_does_not_wait_for_the_one_before_to_be_acknowledged(running, gate, monkeypatch):
    gate.go()
    seen, begin = [], Reply.begin

    def watched(self, *words):
        seen.append(self._handler.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        begin(self, *words)

    monkeypatch.setattr(Reply, "begin", watched)
    assert ask(running)[0] == 200 and all(seen) and seen


def test_a_browser_that_goes_away_gives_its_turn_up(running, gate):
    body = json.dumps(QUESTION).encode()
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as connection:
        head = f"POST /ask HTTP/1.1\r\nHost: localhost:{running.port}\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        gate.reached()
    gate.go()
    assert ask(running)[1][-1]["answer"]["text"] == ANSWER
    # The first ask broke off: the kernel takes a line or two before it tells, the whole would have been nine runs.
    assert [name for _, name in running.app.session.engine.ran].count("text/decoder_model_merged.onnx") < 18


def test_the_page_needs_nothing_from_outside(running):
    status, headers, page = send(running)
    text = page.decode()
    nonce = re.search(r'<script nonce="([\w-]+)">', text)[1]
    policy = headers["Content-Security-Policy"]
    assert status == 200 and "default-src 'none'" in policy and f"script-src 'nonce-{nonce}'" in policy
    assert "frame-ancestors 'none'" in policy and headers["X-Content-Type-Options"] == "nosniff"
    assert "NONCE" not in text and nonce not in send(running)[2].decode()
    assert re.findall(r"(?:https?:)?//[a-z0-9]", re.sub(r"//.*$", "", text, flags=re.M)) == []
    assert not re.search(r"<(?:link|img|script|iframe)[^>]+(?:src|href)=\"(?!data:,)", text)
    assert "Access-Control-Allow-Origin" not in headers


def test_the_bundle_s_facts(running):
    status, _, data = send(running, path="/bundle")
    facts = json.loads(data)
    assert status == 200 and facts["name"] == "handmade" and facts["reference"] == "3"
    assert [(e["exit"], e["certified"], e["verdict"]["verdict"]) for e in facts["exits"]] == [
        ("1", True, "passed"),
        ("2", True, "passed"),
        ("3", False, "failed"),
    ]
    assert facts["preferred"] == {"budget": ["1", "2"], "none": ["2"]}  # what the runtime would take, its favourite last
    assert facts["prediction"] == "none" and facts["exits"][0]["predicted_ms"] is None


def foreign_requests_are_refused(server):
    good = f"127.0.0.1:{server.port}"
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1", f"127.0.0.1:{server.port + 1}", ""):
        for path in ("/", "/bundle"):
            assert send(server, path=path, host=host)[0] == 421, host
        assert send(server, "POST", "/ask", QUESTION, JSON, host=host)[0] == 421
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        assert send(server, "POST", "/ask", QUESTION, {**JSON, **headers}, host=good)[0] == 403
    assert server.app.session.engine.ran == []
    assert send(server, host=f"LOCALHOST:{server.port}", headers={"Origin": f"http://{good}"})[0] == 200


def test_other_names_and_other_pages_are_refused(running):
    foreign_requests_are_refused(running)


def test_that_check_fails_where_the_host_is_not_looked_at(running, monkeypatch):
    edit = ("hosts[0].lower() not in self.hosts", "False")
    monkeypatch.setattr(Access, "check", wrong(Access.check, edit))
    with pytest.raises(AssertionError):
        foreign_requests_are_refused(running)


def test_two_hosts_are_refused(running):
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as connection:
        connection.sendall(f"GET / HTTP/1.1\r\nHost: localhost:{running.port}\r\nHost: evil.example\r\n\r\n".encode())
        assert connection.recv(64).startswith(b"HTTP/1.1 421")


def test_it_listens_on_loopback_alone(running):
    assert running.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b"{}", {"Content-Type": None}, 415),
        (b"", {**JSON, "Content-Length": str(MAX_BODY + 1)}, 413),
        (b"", {**JSON, "Content-Length": "9" * 40}, 413),
        (b"", {**JSON, "Content-Length": "-1"}, 411),
        (b"", {**JSON, "Content-Length": "x"}, 411),
        (b"0\r\n\r\n", {**JSON, "Transfer-Encoding": "chunked"}, 411),
        (b"{", JSON, 400),
        (b"[" * 100_000, JSON, 400),
        (b"[]", JSON, 400),
        (b"\xff", JSON, 400),
        ({**QUESTION, "image": "not base64"}, JSON, 400),
        ({**QUESTION, "image": "é"}, JSON, 400),
        ({**QUESTION, "image": base64.b64encode(b"no picture").decode()}, JSON, 400),
        ({**QUESTION, "prompt": ""}, JSON, 400),
        ({**QUESTION, "prompt": 3}, JSON, 400),
        ({**QUESTION, "prompt": "a <image> b"}, JSON, 400),
        ({**QUESTION, "prompt": "\ud800"}, JSON, 400),
        ({**QUESTION, "budget_ms": -1}, JSON, 400),
        ({**QUESTION, "budget_ms": 10**400}, JSON, 400),
        ({**QUESTION, "exit": "9"}, JSON, 400),
        ({**QUESTION, "exit": 1}, JSON, 400),
        ({**QUESTION, "exit": "01"}, JSON, 400),
        ({**QUESTION, "exit": "3"}, JSON, 422),
        ({**QUESTION, "budget_ms": 5}, JSON, 422),
        ({**QUESTION, "allow_uncertified": True}, JSON, 400),
        ({"prompt": "what?"}, JSON, 400),
    ],
)
def test_wrong_questions_are_refused_cleanly(running, gate, body, headers, status):
    gate.go()
    got, _, data = send(running, "POST", "/ask", body, headers)
    error = json.loads(data)["error"]
    assert got == status and error["message"] and "Traceback" not in data.decode()
    assert ask(running)[1][-1]["answer"]["text"] == ANSWER


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/../../etc/passwd", 404), ("GET", "/ask", 405)])
def test_there_are_few_paths_and_two_methods(running, method, path, status):
    assert send(running, method, path)[0] == status
    assert send(running, "POST", "/", b"{}", JSON)[0] == 405
    for other in ("PUT", "DELETE", "OPTIONS", "TRACE", "HEAD"):
        assert send(running, other, "/")[0] == 501


def test_too_many_connections_are_told_to_come_back(running):
    taken = [running.connections.acquire(blocking=False) for _ in range(MAX_CONNECTIONS)]
    status, headers, data = send(running)
    assert all(taken) and status == 503 and headers["Retry-After"] == "1" and json.loads(data)["error"]["code"] == "busy"
    for _ in taken:
        running.connections.release()
    assert send(running)[0] == 200


def test_an_error_in_the_middle_is_the_last_line(running, gate, monkeypatch):
    gate.go()
    running.app.session.engine.before = lambda path: running.app.session.turns.__setattr__("_closed", path.startswith("text/"))
    status, lines = ask(running)
    assert status == 200 and lines[-1]["error"]["code"] == "closed" and not any("answer" in line for line in lines)


def test_a_bug_says_so_and_shows_no_insides(running, monkeypatch, capsys):
    monkeypatch.setattr(page, "facts", lambda session: 1 / 0)
    status, _, data = send(running, path="/bundle")
    assert status == 500 and json.loads(data)["error"]["message"].startswith("ZeroDivisionError")


def test_the_command_refuses_a_taken_port_and_ends_with_ctrl_c(handmade, running, monkeypatch, capsys):
    assert cli.main(["serve", str(handmade), "--port", str(running.port)]) == 10
    assert cli.main(["serve", str(handmade), "--port", "70000"]) == 10

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    assert cli.main(["serve", str(handmade), "--port", "0"]) == 0
    assert re.match(r"http://127\.0\.0\.1:\d+/ ", capsys.readouterr().out)


def test_the_page_is_whole():
    text = page.PAGE.read_text(encoding="utf-8")
    ids = set(re.findall(r'id="([a-z]+)"', text))
    assert set(re.findall(r'\$\("([a-z]+)"\)', text)) <= ids
