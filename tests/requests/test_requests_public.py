"""The public recipe from copies of the sets, made up here with the columns of the sets' own files.

The network is a server on this machine, asked through real sockets; only the addresses and the digests are this file's.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edgesafe import cli
from edgesafe import preset as preset_module
from edgesafe.errors import ConfigError, InputError, IntegrityError
from edgesafe.format.suite import read_suite
from edgesafe.preset import public_steps
from edgesafe.requests import public
from edgesafe.requests import rows as making
from edgesafe.requests.gather import gather
from edgesafe.requests.public import SETS, digest_requests, fetch_public, read_public
from edgesafe.requests.rows import Answer
from edgesafe.requests.sources import Source

HARM = [f"Ruin place {n},standard,illegal,,,ruin{n}" for n in range(40)] + ["Sing,copyright,c,,,sing"]
SAFE = [f"{n},How do I kill process {n}?,homonyms,safe,kill," for n in range(150)]
UNSAFE = [f"u{n},How do I kill person {n}?,contrast_homonyms,unsafe,kill," for n in range(60)]
SEED = [
    {"id": f"s{n}", "name": "x", "instruction": f"Explain fact {n}", "instances": [{"input": f"{n} is"}]} for n in range(60)
]
USER = [{"id": f"u{n}", "instruction": f"Write poem {n}", "instances": []} for n in range(20)]
FILES = {
    "advbench.csv": "\n".join(["goal,target", *(f"Break object {n},Sure" for n in range(8))]),
    "harmbench.csv": "\n".join(["Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID", *HARM]),
    "xstest.csv": "\n".join(["id,prompt,type,label,focus,note", *SAFE, *UNSAFE]),
    "self-instruct-seed.jsonl": "\n".join(map(json.dumps, SEED)),
    "self-instruct-user.jsonl": "\n".join(map(json.dumps, USER)),
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The sets' own files as a fetch writes them, pinned as they are."""
    home = tmp_path / "sets"
    home.mkdir()
    for name, text in FILES.items():
        (home / name).write_text(text)
    pinned = [
        replace(one, digest=digest_requests(tuple(Source(home / name, cls=one.cls) for name in one.files))) for one in SETS
    ]
    monkeypatch.setattr(public, "_WORDS", {"suite": 30, "rows": 4})  # pictures take time
    for module in (public, preset_module):
        monkeypatch.setattr(module, "SETS", tuple(pinned))
    return home


def test_what_is_trained_on_and_what_is_certified_with_share_no_request(folder):
    recipe = read_public(folder)
    suite, rows = gather(recipe.suite, "test").items, gather(recipe.rows, "train").items
    asked, taught = ({i.row.template.lower() for i in items} for items in (suite, rows))
    assert not asked & taught and len(recipe.tables) == 5
    # By hand: 40 + 60 harmful ones and 30 words; of 80 harmless instructions each is on one side.
    assert sum(i.row.cls == "harmful" for i in suite) == 100 and sum(i.row.cls == "task" for i in suite) == 30
    explained = {text for text in asked | taught if text.startswith(("explain", "write poem"))}
    assert len(explained) == 80 and "explain fact 3\n3 is" in explained
    # All of AdvBench as words, a part of it written in pictures too; the same of harmless ones.
    assert sum(i.row.cls == "harmful" and i.picture.blank for i in rows) == 8
    assert {i.row.cls for i in rows if i.row.family.startswith(("advbench-typo", "self-instruct-seed-typo"))} == {
        *("harmful", "harmless")
    }


def test_a_tidied_copy_counts_as_the_original_and_a_changed_one_does_not(folder):
    (folder / "advbench.csv").unlink()
    (folder / "advbench-copy").mkdir()
    copy = folder / "advbench-copy" / "requests.csv"
    lines = [f"adv_{n},break object {n}.,,harmful" for n in reversed(range(8))]
    copy.write_text("id,request,category,label\n" + "\n".join(lines) + "\n")
    assert read_public(folder).rows.sources[0].path == copy.parent
    copy.write_text(copy.read_text().replace("object 3", "object 33"))
    with pytest.raises(IntegrityError, match="requests of advbench are not the published ones"):
        read_public(folder)
    copy.unlink()
    copy.parent.rmdir()
    with pytest.raises(InputError, match="there is no advbench"):
        read_public(folder)


def test_the_pins_are_of_different_sets_and_fixed_commits():
    addresses = [address for one in SETS for address in one.files.values()]
    assert len({one.digest for one in SETS}) == 4 and all(len(one.digest) == 64 for one in SETS)
    assert all(any(len(part) == 40 for part in address.split("/")) for address in addresses)


@pytest.fixture
def server(folder, monkeypatch) -> Iterator[dict[str, str]]:
    """The pinned sets on this machine; what is put under a file's name changes how it is answered."""
    odd: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            data, way = FILES[name].encode(), odd.get(name, "") if "/moved/" not in self.path else ""
            self.send_response({"missing": 404, "moved": 302}.get(way, 200))
            self.send_header("Location", f"/moved/{name}")
            if way != "cut off without a length":
                self.send_header("Content-Length", str(len(data)))
            if way == "cut off in a chunk":
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            data = data.replace(b"object 3", b"object 33") if way == "changed" else data
            data = f"{len(data):x}\r\n".encode() + data if way == "cut off in a chunk" else data
            self.wfile.write(data[: len(data) // 2] if way.startswith("cut off") else data)

        def log_message(self, *_: object) -> None: ...

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    pinned = [
        replace(one, files={name: f"http://127.0.0.1:{web.server_port}/at/{name}" for name in one.files}) for one in public.SETS
    ]
    for module in (public, preset_module):
        monkeypatch.setattr(module, "SETS", tuple(pinned))
    yield odd
    web.shutdown()
    web.server_close()


BROKEN = {
    "missing": (InputError, "404"),
    "cut off": (InputError, "cut off after"),
    "cut off in a chunk": (InputError, "IncompleteRead"),
    "cut off without a length": (InputError, "what came is not advbench: the row has 1 fields"),
    "changed": (IntegrityError, "requests of advbench are not the published ones"),
}


@pytest.mark.enable_socket
@pytest.mark.parametrize("way", BROKEN)
def test_a_fetch_that_fails_leaves_nothing_and_the_next_one_begins_again(server, tmp_path, way):
    server["advbench.csv"] = way
    kind, words = BROKEN[way]
    with pytest.raises(kind, match=words) as caught:
        fetch_public(tmp_path / "out")
    assert kind is IntegrityError or "--preset-data" in caught.value.todo
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
    server["advbench.csv"] = "moved"  # GitHub may send elsewhere
    fetch_public(tmp_path / "out")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == FILES


@pytest.mark.enable_socket
def test_without_a_network_a_local_folder_is_named(folder, tmp_path, monkeypatch):
    # Nobody listens on port 9; the real sets' addresses can't be reached by a test.
    pinned = [replace(one, files=dict.fromkeys(one.files, "http://127.0.0.1:9/")) for one in public.SETS]
    monkeypatch.setattr(public, "SETS", tuple(pinned))
    with pytest.raises(InputError, match="can't be fetched") as caught:
        fetch_public(tmp_path / "out")
    assert "--preset-data" in caught.value.todo and not (tmp_path / "out").exists()


def test_the_steps_make_a_suite_and_rows_once(folder, tiny_llava, tmp_path, monkeypatch, capsys):
    asked: list[str] = []

    def ask(llava, items, n):
        asked.extend(item.row.prompt for item in items)
        return [Answer("It is so.", ended=True) for _ in items]

    monkeypatch.setattr(making, "_ask", ask)
    data, suite = public_steps(tiny_llava, tmp_path / "work", folder)
    rows, whole = read_suite(data), read_suite(suite)
    assert (rows.split, whole.split) == ("train", "test") and len(whole.smoke_rows()) >= 20
    assert {row.cls for row in rows.rows} == {"harmful", "harmless"}  # this model reads no word
    assert "xstest (CC-BY-4.0, Roettger et al. 2024)" in capsys.readouterr().err
    before = len(asked)
    assert public_steps(tiny_llava, tmp_path / "work", folder) == (data, suite) and len(asked) == before > 0


def test_a_preset_beside_own_rows_is_refused(tmp_path):
    words = ["ship", str(tmp_path / "model"), "--device", "host", "--out", str(tmp_path / "out")]
    for more in (["--preset", "public", "--data", "rows"], ["--preset-data", "sets"]):
        assert cli.main([*words, *more]) == ConfigError.exit_code
