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
from edgesafe.format.targets import NEW
from edgesafe_export import export as export_module
from edgesafe_export import export_bundle, held_out, parity_pieces, stream
from edgesafe_export import parity_model as parity
from edgesafe_export.export import requests
from edgesafe_export.parity_answers import ask, compare
from edgesafe_export.scoring import score
from edgesafe_export.skeleton import open_sketch
from edgesafe_export.tolerances import DIVERGED_TOKENS, KEPT_ANSWERS

STUDY = json.loads((Path(__file__).parents[1] / "bench/results/damage-reference.json").read_text(encoding="utf-8"))
ROWS = {row["name"]: row for row in STUDY["rows"]}
KINDS = ("harmful", "between", "harmless")
# Of each part of the model some that are far beyond the limits and some of the mildest that the study found harmful.
HARMFUL = (
    "decoder: 2 bits",
    "decoder: a matrix's scales lost",
    "vision: 3 bits",
    "vision: noise 0.4",
    "vision: block 1 skipped",
    "projector: 2 bits",
    "projector: a channel's scale lost",
)
# The answers of the study's rows pass: this model is sure of them. Plain text shows it.
ONLY_IN_TEXT = ("decoder: 3 bits", "decoder: block 2 skipped", "decoder: noise 0.2")
HARMLESS = ("undamaged", "decoder: 5 bits", "vision: 8 bits", "projector: 5 bits")
NAMED = {damage.name: damage for damage in DAMAGES}


@pytest.fixture(scope="module")
def shop(trained_job):
    sketch = open_sketch(trained_job.model_dir)
    return Workshop.of(trained_job, sketch, export_module.trace_pieces(sketch, trained_job.ladder, "chain"))


def _compared(shop, folder: Path, name: str):
    """A bundle's answers, with a damage or without one, beside the checkpoint's."""
    with parity.open_session(shop.bundle(folder / "b", NAMED.get(name))) as session:
        answers = ask(session, requests(shop.job, whole=True), MAX_NEW_TOKENS)
        return compare(session.tokenizer, answers, score(shop.sketch, shop.pieces, answers, folder / "s"), None)


def test_the_study_s_harmful_bundles_are_refused_and_its_harmless_ones_pass():
    found = {kind: {row["name"]: row["refused"] for row in STUDY["rows"] if row["kind"] == kind} for kind in KINDS}
    assert [name for name, refused in found["harmful"].items() if not refused] == []
    assert [name for name, refused in found["harmless"].items() if refused] == []
    assert len(found["harmful"]) >= 15 and len(found["harmless"]) >= 15
    assert {row["name"] for row in STUDY["rows"]} >= set(NAMED)


def test_the_study_s_figures_break_the_limits_that_ship():
    # The committed verdicts are made of these figures; limits that changed since would show here.
    for row in STUDY["rows"]:
        broken = [
            found["kept"] < KEPT_ANSWERS or found["diverged_tokens"] > DIVERGED_TOKENS for found in row["figures"].values()
        ]
        assert any(broken) == row["refused"], row["name"]


def _judged(shop, folder: Path, name: str, whole: bool) -> str:
    """What the export has against a bundle, of a model that is compared whole or in pieces."""
    shop.bundle(folder / NEW, NAMED.get(name))
    return export_module._judge(shop.sketch, shop.pieces, requests(shop.job, whole), None, folder)[1]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "in pieces"])
@pytest.mark.parametrize("name", [*HARMFUL, *ONLY_IN_TEXT])
def test_damage_is_refused(shop, tmp_path, name, whole):
    why = _judged(shop, tmp_path, name, whole)
    if name in HARMFUL:
        assert ROWS[name]["kind"] == "harmful"
        assert " in place of " in why and any(repr(row.prompt)[:30] in why for row in shop.job.suite.rows)
    else:  # its answers passed in the study, and of a model that is asked as much here
        assert ROWS[name]["kind"] == "between" and not ROWS[name]["refused"]
        assert why.startswith("plain text: " if whole else ("plain text: ", "exit "))


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "in pieces"])
@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_damage_passes(shop, tmp_path, name, whole):
    assert name not in NAMED or ROWS[name]["kind"] == "harmless"
    assert _judged(shop, tmp_path, name, whole) == ""


def test_each_limit_on_text_refuses_alone(shop, tmp_path):
    shop.bundle(tmp_path / NEW, NAMED["decoder: 3 bits"])
    text = export_module._judge(shop.sketch, shop.pieces, requests(shop.job, False), None, tmp_path)[0]["text_figures"]
    assert held_out.lost(text) and held_out.lost({**text, "same": 1.0}) and held_out.lost({**text, "divergence": 0.0})
    assert not held_out.lost({**text, "same": 0.9, "divergence": 0.05})


def test_the_checkpoint_s_pass_finds_the_answers_that_are_equal(shop, tmp_path):
    # The oracle writes the float answers token by token.
    compared = _compared(shop, tmp_path, "projector: 2 bits")
    export_module.write(shop.job, tmp_path / "float", shop.right, export_module.FLOAT, {})
    with parity.open_session(tmp_path / "float") as session:
        own = ask(session, requests(shop.job, whole=True), MAX_NEW_TOKENS)
    assert [one.same for one in compared] == [one.answered.ids == mine.ids for one, mine in zip(compared, own, strict=True)]
    assert {one.same for one in compared} == {True, False}


@pytest.fixture
def two_bits(monkeypatch):
    """A quantizer that leaves two bits of every decoder matrix, and only the answers to judge it."""
    right, change = stream.quantize, rounded(2)
    monkeypatch.setattr(parity_pieces, "PIECE_QUANTIZED", float("inf"))

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
def test_a_decoder_of_two_bits_is_refused_with_the_answers_and_leaves_no_bundle(
    trained_job, tmp_path, monkeypatch, two_bits, large
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
