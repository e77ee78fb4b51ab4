"""The export refuses each harmful damage and passes each harmless one; `tests/long/damage.py` has found which is which."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from damages import DAMAGES, SCHEMES, Workshop, rounded
from edgesafe.cli import main
from edgesafe.device import load_device
from edgesafe.errors import ParityError
from edgesafe.format.bundle import Bundle
from edgesafe.format.suite import MAX_NEW_TOKENS
from edgesafe_export import export as export_module
from edgesafe_export import export_bundle, stream
from edgesafe_export import parity_model as parity
from edgesafe_export.export import requests
from edgesafe_export.parity_answers import ask, changed, compare, figures
from edgesafe_export.scoring import score
from edgesafe_export.skeleton import open_sketch

STUDY = json.loads((Path(__file__).parents[1] / "bench/results/damage-reference.json").read_text(encoding="utf-8"))
ROWS = {row["name"]: row for row in STUDY["rows"]}
NAMED = {damage.name: damage for damage in DAMAGES}


@pytest.fixture(scope="module")
def shop(trained_job):
    sketch = open_sketch(trained_job.model_dir)
    return Workshop.of(trained_job, sketch, export_module.trace_pieces(sketch, trained_job.ladder, "chain"))


def _compared(shop, folder: Path, name: str):
    """The export's own check of a bundle with a damage, or without one."""
    with parity.open_session(shop.bundle(folder / "b", NAMED.get(name))) as session:
        answers = ask(session, requests(shop.job, whole=True), MAX_NEW_TOKENS)
        return compare(session.tokenizer, answers, score(shop.sketch, shop.pieces, answers, folder / "s"), None)


@pytest.fixture
def three_bits(monkeypatch):
    """A quantizer that leaves three bits of every decoder matrix: each piece is within its own limit."""
    right, change = stream.quantize, rounded(3)

    def wrong(model: onnx.ModelProto, scheme: str, *more):
        copied = onnx.ModelProto()
        copied.CopyFrom(model)
        for tensor in copied.graph.initializer:
            if scheme == SCHEMES["text"] and len(tensor.dims) == 2 and "_cache" not in tensor.name:
                columns = change("", numpy_helper.to_array(tensor).T)
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(columns.T), tensor.name))
        return right(copied, scheme, *more)

    monkeypatch.setattr(stream, "quantize", wrong)


def _export(job, out: Path) -> Bundle:
    words = {"vision_scheme": SCHEMES["vision"], "text_scheme": SCHEMES["text"], "suite_dir": job.suite.root}
    return export_bundle(job.model_dir, out, load_device("host"), exits=",".join(map(str, job.ladder)), **words)


@pytest.mark.parametrize("large", [False, True], ids=["whole", "in pieces"])
def test_a_decoder_of_three_bits_is_refused_with_the_answers_and_leaves_no_bundle(
    trained_job, tmp_path, monkeypatch, three_bits, large
):
    if large:
        monkeypatch.setattr(export_module, "WHOLE_WEIGHTS", 0)
    with pytest.raises(ParityError, match="quantization changes the answers") as caught:
        _export(trained_job, tmp_path / "b")
    assert " in place of " in str(caught.value) and "of its answers, below" in str(caught.value)
    assert any(repr(row.prompt)[:30] in str(caught.value) for row in trained_job.suite.rows)
    assert not (tmp_path / "b").exists()


def test_a_large_model_s_bundle_answers_too_and_the_figures_are_kept(trained_job, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_module, "WHOLE_WEIGHTS", 0)
    exits = ",".join(map(str, trained_job.ladder))
    words = ["export", str(trained_job.model_dir), "--device", "rpi5", "--exits", exits, "--suite", str(trained_job.suite.root)]
    assert main([*words, "--out", str(tmp_path / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["parity"]
    assert found["check"] == "pieces" and found["answers"] == 24 and found == Bundle.open(tmp_path / "b").manifest.parity
    assert set(found["answer_figures"]) == {str(exit) for exit in trained_job.ladder}
    for figures_ in found["answer_figures"].values():
        assert figures_["kept"] >= 0.9 and "same_class" not in figures_ and figures_["token_agreement"] > 0.9
