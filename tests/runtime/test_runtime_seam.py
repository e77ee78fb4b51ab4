"""One seam: an engine from outside the package (fake_engine.py) asks, measures, smokes, certifies and serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_engine import NumpyEngine

from edgesafe import Budget, Session
from edgesafe.certify.certify import certify
from edgesafe.certify.smoke import smoke
from edgesafe.errors import BundleError, UncertifiedExitError
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import read_certificate
from edgesafe.format.latency import read_latency
from edgesafe.runtime import decode, measure
from edgesafe.runtime import opened as opened_module
from edgesafe.serve.server import Server, serve
from handmade import ANSWER
from mutants import wrong

PACKAGE = Path(decode.__file__).parents[1]
BLACK, GREY = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 128, np.uint8)
NO_ORT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "onnxruntime":
            raise ModuleNotFoundError(f"{name} was imported", name=name)
sys.meta_path.insert(0, Absent())
"""


@pytest.fixture(params=[False, True], ids=["a function each", "in place"])
def engine(request) -> NumpyEngine:
    return NumpyEngine(in_place=request.param)


def test_it_asks_as_onnxruntime_does_once_it_has_passed_its_smoke(suited_copy, engine):
    with Session.open(suited_copy, engine=engine) as theirs, pytest.raises(UncertifiedExitError, match="made elsewhere"):
        theirs.ask(BLACK, "what?")
    assert smoke(suited_copy, engine=engine).identical == 12
    with Session.open(suited_copy, engine=engine) as theirs, Session.open(suited_copy) as ours:
        for depth in (1, 2, 3):
            options = {"exit": depth, "allow_uncertified": True}
            assert theirs.ask(BLACK, "what?", **options).text == ours.ask(BLACK, "what?", **options).text == ANSWER
        for picture in (BLACK, GREY):
            for exit, features in theirs.vision_states(picture, [1, 2, 3]).items():
                np.testing.assert_allclose(features, ours.vision_states(picture, [exit])[exit], rtol=1e-6)
        assert list(theirs.stream(BLACK, "what?")) == list(ours.stream(BLACK, "what?"))
        talk, other = theirs.conversation(BLACK), ours.conversation(BLACK)
        for prompt in ("what?", "where is it?", "w"):
            assert talk.ask(prompt).text == other.ask(prompt).text and talk.reused_tokens == other.reused_tokens


def test_it_measures_and_its_measurement_is_its_own(suited_copy, engine):
    smoke(suited_copy, engine=engine)
    table = measure(suited_copy, seconds=0.1, engine=engine)
    assert (table.engine, table.engine_version) == ("numpy-by-hand", "7") and read_latency(Bundle.open(suited_copy)) == table
    with Session.open(suited_copy, engine=engine) as session:
        assert session.ask(BLACK, "what?", Budget(60_000, require_measured=True)).prediction == "measured"
    for other in (None, type("Newer", (NumpyEngine,), {"version": "8"})()):
        with Session.open(suited_copy, engine=other, allow_uncertified=True) as session:
            answer = session.ask(BLACK, "what?")
            assert answer.prediction == "none" and "measured with numpy-by-hand 7" in answer.note


def test_it_certifies_what_onnxruntime_certifies_and_says_who_did(suited_copy, engine):
    ours, theirs = certify(suited_copy, progress=False), certify(suited_copy, progress=False, engine=engine)
    assert theirs.environment["engine"] == "numpy-by-hand" and theirs.environment["engine_version"] == "7"
    assert ours.environment["engine"] == "onnxruntime"
    assert replace(theirs, environment={}) == replace(ours, environment={})
    assert read_certificate(Bundle.open(suited_copy)) == theirs


def test_it_smokes(suited_copy, engine, tmp_path):
    report = smoke(suited_copy, junit=tmp_path / "j.xml", engine=engine)
    assert (report.environment["engine"], report.rows, len(report.exits)) == ("numpy-by-hand", 6, 2)
    assert report.exits == smoke(suited_copy).exits and (tmp_path / "j.xml").is_file()


@pytest.mark.enable_socket
def test_it_serves(suited_copy, engine, monkeypatch, capsys):
    def one_question(server):
        thread = threading.Thread(target=Server.handle_request, args=(server,))
        thread.start()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/bundle", timeout=60) as reply:
            assert json.load(reply)["name"] == "handmade"
        thread.join(60)
        assert server.app.session.ask(BLACK, "what?").text == ANSWER

    monkeypatch.setattr(Server, "serve_forever", one_question)
    smoke(suited_copy, engine=engine)
    serve(suited_copy, port=0, engine=engine)
    assert engine.ran and "http://127.0.0.1:" in capsys.readouterr().out


def the_powers_are_used(suited_copy: Path) -> None:
    """No state leaves the engine between two vision graphs, and no cache goes in or out."""
    engine = NumpyEngine(in_place=True)
    with Session.open(suited_copy, engine=engine, allow_uncertified=True) as session:
        session.ask(BLACK, "what?", exit=2)
        assert engine.ran["advanced"] == 3 and engine.ran["copied out"] == 1 and engine.ran["run vision"] == 0
        assert engine.ran["shared"] == 1 and engine.ran["cache copied"] == 0
        assert engine.ran["read in place"] == 9  # the prompt, and one run for each of eight tokens
        talk = session.conversation(BLACK)
        talk.ask("what?")
        talk.ask("why?")
        assert engine.ran["shared"] == 2 and engine.ran["cache copied"] == 0
    before = engine.ran["advanced"]
    measure(suited_copy, seconds=0.1, engine=engine)
    certify(suited_copy, progress=False, engine=engine)
    assert engine.ran["advanced"] > before and engine.ran["cache copied"] == engine.ran["run vision"] == 0


def test_the_shared_cache_and_the_step_without_a_copy_are_used(suited_copy):
    the_powers_are_used(suited_copy)


@pytest.mark.parametrize(
    ("place", "name", "edit"),
    [
        (decode, "open_reader", ("decoder.share(embed, text, length) or ", "")),
        (opened_module.OpenedBundle, "run_vision_graph", ("else graph.advance(state)", "else copied(graph, state)")),
    ],
)
def test_that_check_fails_where_they_are_not_used(suited_copy, monkeypatch, place, name, edit):
    def copied(graph, state):
        (out,) = graph.run(dict.fromkeys(graph.wants, opened_module.as_array(state))).values()
        return out

    monkeypatch.setattr(place, name, wrong(getattr(place, name), edit, copied=copied))
    with pytest.raises(AssertionError):
        the_powers_are_used(suited_copy)


def test_a_plain_engine_runs_its_functions_alone(suited_copy):
    engine = NumpyEngine()
    with Session.open(suited_copy, engine=engine, allow_uncertified=True) as session:
        session.ask(BLACK, "what?", exit=2)
    assert engine.ran["run vision"] == 3 and engine.ran["cache copied"] == 9
    assert not {"advanced", "shared", "read in place"} & engine.ran.keys()


@pytest.mark.parametrize("power", ["advance", "share"])
def test_a_power_that_fails_is_a_bundle_error(suited_copy, power, monkeypatch):
    engine = NumpyEngine(in_place=True)
    with Session.open(suited_copy, engine=engine, allow_uncertified=True) as session:
        for graph in session._graphs.values():
            monkeypatch.setattr(graph, f"_{power}", lambda *_: 1 / 0)
        with pytest.raises(BundleError, match="ZeroDivisionError"):
            session.ask(BLACK, "what?")


def test_all_of_it_without_onnxruntime(suited_copy):
    code = """
from pathlib import Path
import numpy as np
from edgesafe import Session
from edgesafe.certify.certify import certify
from edgesafe.certify.smoke import smoke
from edgesafe.runtime import measure
import edgesafe.serve.server
from fake_engine import NumpyEngine
root, engine = Path(sys.argv[1]), NumpyEngine(in_place=True)
smoke(root, engine=engine)
with Session.open(root, engine=engine) as session:
    print(session.ask(np.zeros((8, 8, 3), np.uint8), "what?").exit)
print(measure(root, seconds=0.05, engine=engine).engine)
print(certify(root, progress=False, engine=engine).environment["engine"], "onnxruntime" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", NO_ORT + code, str(suited_copy)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["2", "numpy-by-hand", "numpy-by-hand", "False"]), done.stderr


def test_onnxruntime_is_imported_in_one_file():
    named = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if imports_ort(path)}
    assert named == {"runtime/ort.py"}


def imports_ort(path: Path) -> bool:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return any(line.startswith(("import onnxruntime", "from onnxruntime")) for line in lines)
