"""What the clone carries of the reference model: its evaluation, whole and still what the model answers, and its settings."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path

import pytest

from edgesafe import steps
from edgesafe.align.config import default_config
from edgesafe.carried import unpack_evaluation
from edgesafe.errors import IntegrityError
from edgesafe.format.suite import read_suite
from edgesafe.steps import EVALUATED, OWN, REFERENCE, settings_for


def test_the_stored_evaluation_is_what_the_untouched_model_answers(tmp_path):
    """A few rows asked again, at an early exit and at the reference: evaluation that has changed since would show."""
    from edgesafe.evaluate.evaluate import evaluate
    from edgesafe.reference.data import write_split

    unpack_evaluation(EVALUATED, tmp_path / "stored")
    write_split(tmp_path / "suite", "cert", scale=0.01)
    evaluate(REFERENCE, tmp_path / "suite", tmp_path / "now", exits="5")
    stored, now = (_answers(tmp_path / name) for name in ("stored", "now"))
    assert len(now) == 2 * len(read_suite(tmp_path / "suite").rows)
    # Another processor may turn a near-tie.
    assert sum(stored[key] != answer for key, answer in now.items()) <= len(now) // 20


def _answers(folder: Path) -> dict[tuple[str, str], str]:
    lines = map(json.loads, (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines())
    return {(line["exit"], line["id"]): line["answer"] for line in lines}


def test_a_stored_evaluation_that_was_damaged_is_refused(tmp_path):
    for name, text in (("report.json", b"{}"), ("answers.jsonl.xz", b"cut"), ("answers.jsonl.xz", lzma.compress(b"others"))):
        shutil.copytree(EVALUATED, tmp_path / "e", dirs_exist_ok=True)
        (tmp_path / "e" / name).write_bytes(text)
        with pytest.raises(IntegrityError, match="--retrain"):
            unpack_evaluation(tmp_path / "e", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_the_untouched_model_is_evaluated_again_only_where_its_answers_may_differ(tmp_path, monkeypatch):
    """For `make align`: other weights of the aligned model change nothing of it, another suite or exit does."""
    evaluated, suite, asked = tmp_path / "evaluated", tmp_path / "suite", []
    unpack_evaluation(EVALUATED, tmp_path / "before")
    suite.mkdir()

    def before(model, work, tower, suite, carried, exits):
        asked.append(exits)
        return tmp_path / "before"

    for name, value in {"EVALUATED": evaluated, "ALIGNED": tmp_path / "aligned", "_before": before}.items():
        monkeypatch.setattr(steps, name, value)
    monkeypatch.setattr(steps, "_rows", lambda work: suite)
    monkeypatch.setattr(steps, "_suite", lambda work: suite)
    monkeypatch.setattr(steps, "_aligned", lambda *_: REFERENCE)
    monkeypatch.setattr(steps, "carried_key", lambda *_: "key")
    monkeypatch.setattr("edgesafe.checkpoint.changes.write_changes", lambda *_: None)
    counts = []
    for change in ("nothing there", "", "suite", "", "exits"):
        if change == "suite":
            (suite / "rows.jsonl").write_text("others")
        if change == "exits":
            monkeypatch.setattr(steps, "has_exits", lambda folder, exits: False)
        steps.carry(tmp_path)
        counts.append(len(asked))
    assert counts == [1, 1, 2, 2, 3]
    assert all("all" in exits and "6@9" in exits for exits in asked)


def test_only_the_reference_model_has_settings_of_its_own(tmp_path):
    copied = Path(shutil.copytree(REFERENCE, tmp_path / "copied"))
    assert settings_for(REFERENCE) == settings_for(copied) == OWN != default_config()
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")  # of the same shape, and another model
    assert settings_for(copied) == default_config()
    (copied / "config.json").write_text("{}")
    assert settings_for(copied) == settings_for(Path("org/name")) == default_config()
