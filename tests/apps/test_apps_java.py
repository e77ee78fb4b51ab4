"""The engine on onnxruntime's Java library, over a Java made in Python: the same answers, and no copy of the cache."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import fakejava
import numpy as np
import pytest

from attention import IDS, SIZE, TABLE, TEXT, VOCAB, check_reads, close, make_graphs
from edgesafe import Session
from edgesafe.runtime import Reader
from handmade import ANSWER
from mutants import wrong

fakejava.install()
import java_engine  # noqa: E402  # the module that it imports exists from here on

BLACK, GREY = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 128, np.uint8)


def reader(folder: Path) -> Reader:
    engine = java_engine.JavaOnnxRuntime()
    embed, decoder = (engine.open(*graph, 1) for graph in make_graphs(folder))
    made = decoder.share(embed, TEXT, 64)
    assert isinstance(made, java_engine.JavaReader)
    return made


def test_it_reads_as_numpy_does(tmp_path):
    check_reads(reader(tmp_path))


def test_a_larger_buffer_takes_over_what_was_read(tmp_path):
    made = reader(tmp_path)
    assert close(made.read(TABLE[IDS[:60]][None]), IDS[:60])
    for n in range(61, 67):
        assert close(made.read_token(int(IDS[n - 1])), IDS[:n])


def test_of_a_token_nothing_is_copied_but_its_logits(tmp_path):
    made = reader(tmp_path)
    made.read(TABLE[IDS[:5]][None])
    fakejava.copied.clear()
    for n in range(10):
        made.read_token(int(IDS[n]))
    assert fakejava.copied == {"out": 10 * 4 * VOCAB}


@pytest.mark.parametrize(
    ("method", "edit"),
    [
        ("_run", ("mask.limit(total)", "mask.limit(tokens)")),
        ("_run", ("self.length = total", "self.length = total - 1")),
        ("rewind", ("= length", "= length + 1")),
        ("reserve", ("array[:, :, : self.length] = old[:, :, : self.length]", "pass")),
    ],
)
def test_a_wrong_reader_is_seen(tmp_path, monkeypatch, method, edit):
    monkeypatch.setattr(java_engine.JavaReader, method, wrong(getattr(java_engine.JavaReader, method), edit))
    with pytest.raises(AssertionError):
        test_it_reads_as_numpy_does(tmp_path)
        test_a_larger_buffer_takes_over_what_was_read(tmp_path)


def test_a_whole_bundle_answers_as_with_onnxruntime(handmade):
    engine = java_engine.JavaOnnxRuntime()
    with Session.open(handmade) as ours, Session.open(handmade, engine=engine, allow_uncertified=True) as theirs:
        for picture in (BLACK, GREY):
            assert theirs.ask(picture, "what?").text == ours.ask(picture, "what?").text == ANSWER
            for exit, features in theirs.vision_states(picture, [1, 2, 3]).items():
                np.testing.assert_allclose(features, ours.vision_states(picture, [exit])[exit], rtol=1e-6)


def test_between_vision_graphs_states_stay_in_java(handmade):
    with Session.open(handmade, engine=java_engine.JavaOnnxRuntime(), allow_uncertified=True) as session:
        fakejava.copied.clear()
        (features,) = session.vision_states(BLACK, [3]).values()
    assert fakejava.copied == {"in": 4 * 3 * 8 * 8, "out": features.nbytes}


def test_every_java_name_is_written_down():
    named = set(re.findall(r'jclass\("([^"]+)"\)', inspect.getsource(java_engine)))
    readme = Path(java_engine.__file__).with_name("README.md").read_text(encoding="utf-8")
    assert named == set(fakejava.CLASSES) and SIZE
    assert {name for name in named if name.replace("$", ".") not in readme} == set()
    called = {name for name in vars(fakejava.OnnxTensor) | vars(fakejava.SessionOptions) if name[0] != "_"} - {"used"}
    assert {name for name in called if name not in readme} == set()
