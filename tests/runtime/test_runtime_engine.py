"""The seam to the engine: another one answers the same where onnxruntime can't even be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgesafe import Session
from edgesafe.errors import BundleError
from edgesafe.format.bundle import Bundle
from edgesafe.format.exits import Exit
from edgesafe.runtime import OnnxRuntime, RunnableGraph, measure
from engines import ReferenceEvaluator
from handmade import ANSWER, FEATURES, HIDDEN

ROOT = Path(__file__).resolve().parents[2]
BLACK = np.zeros((8, 8, 3), np.uint8)
ALONE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "onnxruntime":
            raise ModuleNotFoundError(f"{name} was imported", name=name)
sys.meta_path.insert(0, Absent())
"""
ASK = """
import numpy as np
from edgesafe import Session
from engines import ReferenceEvaluator
with Session.open(sys.argv[1], engine=ReferenceEvaluator(), allow_uncertified=True) as session:
    answer = session.ask(np.zeros((8, 8, 3), np.uint8), "what?", exit=1)
print(answer.text, answer.exit, answer.finish_reason, "onnxruntime" in sys.modules)
"""


def alone(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it where onnxruntime doesn't exist."""
    return subprocess.run(
        [sys.executable, "-c", ALONE + code, *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )


def test_another_engine_answers_without_onnxruntime(handmade):
    done = alone(ASK, str(handmade))
    assert (done.returncode, done.stdout) == (0, f"{ANSWER} 1 stop False\n"), done.stderr


def test_that_check_fails_where_the_default_engine_is_loaded(handmade):
    done = alone(ASK.replace(", engine=ReferenceEvaluator()", ""), str(handmade))
    assert done.returncode == 1 and "onnxruntime was imported" in done.stderr


def test_importing_the_runtime_loads_no_engine():
    done = alone("import edgesafe.runtime, edgesafe.certify.smoke, edgesafe.serve.server, edgesafe.cli")
    assert done.returncode == 0, done.stderr


def test_the_engines_agree(handmade):
    with Session.open(handmade) as ours, Session.open(handmade, engine=ReferenceEvaluator(), allow_uncertified=True) as theirs:
        for depth in (1, 2, 3):
            a, b = (s.ask(BLACK, "what?", exit=depth, allow_uncertified=True).text for s in (ours, theirs))
            assert a == b == ANSWER
        np.testing.assert_allclose(
            theirs.vision_states(BLACK, [2])[Exit(2)], ours.vision_states(BLACK, [2])[Exit(2)], rtol=1e-6
        )


def test_a_measurement_names_the_engine_that_it_was_made_with(handmade, copy_of):
    root = copy_of(handmade)
    table = measure(root, seconds=0.1)
    assert table.engine == "onnxruntime"
    assert table.engine_version == __import__("onnxruntime").__version__ == OnnxRuntime().version
    with Session.open(root, engine=ReferenceEvaluator(), allow_uncertified=True) as session:
        answer = session.ask(BLACK, "what?")
    assert answer.prediction == "none" and f"onnxruntime {table.engine_version}" in answer.note


def head_of(handmade):
    return Bundle.open(handmade).manifest.graphs["vision/head.onnx"]


def test_an_engine_is_fed_what_the_manifest_lists_and_nothing_else(handmade):
    fed = {}

    def run(inputs):
        fed.update(inputs)
        return {"image_features": [[1.0]], "further": 1}

    graph = RunnableGraph(head_of(handmade), run, "head")
    out = graph.run({"hidden_states": np.ones((1, 5, 4), np.float64), "pixel_values": BLACK})
    assert list(fed) == ["hidden_states"] and fed["hidden_states"].dtype == np.float32
    assert list(out) == ["image_features"] and out["image_features"].shape == (1, 1)


@pytest.mark.parametrize(
    ("feeds", "run", "shown"),
    [
        ({}, lambda inputs: {}, "hidden_states"),
        ({"hidden_states": BLACK}, lambda inputs: {}, "image_features"),
        ({"hidden_states": BLACK}, lambda inputs: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_an_engine_that_fails_is_a_bundle_error(handmade, feeds, run, shown):
    with pytest.raises(BundleError, match=shown):
        RunnableGraph(head_of(handmade), run, "head").run(feeds)


def test_features_have_the_size_that_the_text_side_takes(handmade):
    with Session.open(handmade, engine=ReferenceEvaluator(), allow_uncertified=True) as session:
        assert session.vision_states(BLACK, [1])[Exit(1)].shape == (FEATURES, HIDDEN)
