"""The room's README: its Python and its shell run against a server, and its tables say what the server does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgesafe import Session, cli
from edgesafe.format.suite import MAX_NEW_TOKENS
from edgesafe.serve import line, page, server, sources, wire
from handmade import ANSWER
from serving import PNG, roomy_bundle, serving

pytestmark = pytest.mark.enable_socket
NAMES = ("README.md", "edgesafe.service", "Containerfile")
README, UNIT, CONTAINER = ((Path(server.__file__).parent / name).read_text(encoding="utf-8") for name in NAMES)


def _code(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


@pytest.fixture
def running(tmp_path, monkeypatch):
    (tmp_path / "picture.png").write_bytes(PNG)
    monkeypatch.chdir(tmp_path)
    with Session.open(roomy_bundle(tmp_path / "bundle")) as session, serving(session) as made:
        yield made


def test_its_python_runs(running, capsys):
    (code,) = _code("python")
    exec(compile(code.replace("8765", str(running.port)), "README.md", "exec"), {})
    assert capsys.readouterr().out == f"{ANSWER} 1 True\n{ANSWER}"


def test_its_shell_runs(running):
    (code,) = _code("sh")
    code = code.replace("8765", str(running.port)).replace("NAME", "handmade")
    done = subprocess.run(["sh", "-ec", code], capture_output=True, text=True, timeout=120, check=True)
    models, head, reply = re.fullmatch(r"(\{.*\})(HTTP/1.1 200.*?)\n\n(\{.*)", done.stdout, re.S).groups()
    assert json.loads(models)["data"][0]["id"] == "handmade" and "X-Edgesafe-Certified: true" in head
    assert json.loads(reply)["choices"][0]["message"]["content"] == ANSWER


def test_its_token_can_be_made_as_it_says(tmp_path):
    from edgesafe.serve.access import read_token

    (command,) = re.findall(r"^    python -c '(.*)' > token$", README, re.M)
    made = subprocess.run([sys.executable, "-c", command], capture_output=True, timeout=60, check=True).stdout
    (tmp_path / "token").write_bytes(made)
    assert read_token(tmp_path / "token") == made.decode().strip()


def test_its_numbers_are_the_server_s(capsys):
    assert f"127.0.0.1:{server.PORT}/v1" in README and f"at most {sources.MAX_PICTURE >> 20} MiB" in README
    assert f"({MAX_NEW_TOKENS} by default)" in README and f"({line.WAITING} by default)" in README
    assert f"its head is above {wire.MAX_HEAD >> 10} KiB" in README
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    shown = capsys.readouterr().out
    own = re.sub(r"^    podman .*|`--format docker`", "", README, flags=re.M)
    assert [option for option in re.findall(r"--[a-z][a-z-]*", own) if option not in shown] == []
    assert page.PAGE.is_file()


def test_every_header_and_status_it_names_is_one_of_the_source():
    source = "".join(path.read_text(encoding="utf-8") for path in Path(server.__file__).parent.glob("*.py"))
    names = re.findall(r"`(?:X-Edgesafe)?(-[A-Z][A-Za-z-]+)`", README)
    assert len(set(names)) == 8 and [name for name in names if f'"X-Edgesafe{name}"' not in source] == []


def test_the_unit_and_the_container_start_servers_that_ask_for_a_token(handmade, tmp_path, monkeypatch, capsys):
    def interrupted(self):
        assert self.access.needs_token
        raise KeyboardInterrupt

    (tmp_path / "token").write_text("x" * 20)
    monkeypatch.setattr(server.Server, "serve_forever", interrupted)
    (start,) = re.findall(r"^ExecStart=/opt/edgesafe/bin/edgesafe (.*)$", UNIT, re.M)
    assert _container("ENTRYPOINT") == ["edgesafe"]
    for words in (start.split(), _container("CMD")):
        own = {"/var/lib/edgesafe/bundle": handmade, "/bundle": handmade, "%d/token": tmp_path / "token"}
        own["/run/secrets/token"] = own["%d/token"]
        assert cli.main([*(str(own.get(word, word)) for word in words), "--port", "0"]) == 0
        assert capsys.readouterr().out.startswith("http://0.0.0.0:")


def _container(key: str) -> list[str]:
    """The words of a line of the container file that runs something."""
    (words,) = re.findall(rf"^{key} .*?(\[.*\])$", CONTAINER, re.M)
    return json.loads(words)


def test_the_container_s_health_check_sees_health(running):
    _, *words = _container("HEALTHCHECK")

    def healthy() -> bool:
        own = [word.replace("8765", str(running.port)) for word in words]
        return subprocess.run([sys.executable, *own], capture_output=True, timeout=60).returncode == 0

    assert f"EXPOSE {server.PORT}" in CONTAINER and str(server.PORT) in words[-1] and healthy()
    running.app.session.close()
    assert not healthy()


def test_the_container_runs_as_the_readme_says():
    run, smoke = re.findall(r"^    podman run (.*)$", README, re.M)
    places = re.findall(r"-v \S+?:(/\S+)", run)
    assert places == ["/bundle:ro", "/state", "/run/secrets/token:ro"]
    assert "XDG_STATE_HOME=/state XDG_CACHE_HOME=/state" in CONTAINER
    assert re.search(r"^USER (?!root)\w+$", CONTAINER, re.M) and re.search(r"^FROM \S+:\d[\w.-]+$", CONTAINER, re.M)
    assert smoke.endswith("edgesafe smoke /bundle") and re.findall(r"-v \S+?:(/\S+)", smoke) == places[:2]


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    analyze = shutil.which("systemd-analyze")
    for text, fine in ((UNIT, True), (UNIT.replace("NoNewPrivileges", "NoNewPrivilege"), False)):
        (tmp_path / "edgesafe.service").write_text(text.replace("/opt/edgesafe/bin/edgesafe", sys.executable))
        if analyze:  # where there is no systemd, the unit is of no use either
            done = subprocess.run(
                [analyze, "verify", tmp_path / "edgesafe.service"], capture_output=True, text=True, timeout=120
            )
            assert ("NoNewPrivilege" not in done.stderr) is fine and (done.returncode == 0 or not fine), done.stderr
