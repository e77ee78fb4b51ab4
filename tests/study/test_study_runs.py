"""The study's runs: every one in its own process, done once, gone on with, and told apart by what it depends on."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from edgesafe import ship as shipping
from edgesafe.align.files import CHECKPOINT
from edgesafe.certify.certify import certify
from edgesafe.errors import AlignError, ConfigError
from edgesafe.evaluate.evaluate import evaluate
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import read_certificate
from edgesafe.format.exits import Exit
from edgesafe.format.suite import read_suite
from edgesafe.reference.data import write_split
from handmade import widen_limits
from study import run as runner
from study import work
from study.__main__ import main
from study.code import code_digest, without_docstrings
from study.plan import BUNDLE, CONTROLS, Run, plan
from study.raw import read_answers
from study.shipped import export_table, import_export
from study.tables import all_tables

NAMED = {run.name: run for run in plan()}


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    """One row a family."""
    folder = tmp_path_factory.mktemp("suite") / "test"
    write_split(folder, "test", scale=0.01)
    return widen_limits(folder)


@pytest.fixture
def setup(tiny_llava, rows, suite, tmp_path) -> work.Setup:
    return work.make_setup(tmp_path / "out", tmp_path / "build", tiny_llava, rows, suite, trial=2)


def test_runs_are_run_once_and_their_tables_come_out(setup):
    only = ["before", "l-sft-0"]
    assert runner.run_study(setup, only=only, jobs=2) == only
    found = read_answers(setup.out)
    assert found is not None and set(found.runs) == set(only)
    trained = found.runs["l-sft-0"]
    assert trained.config["steps"] == 2 and trained.config["data"] == "train" and trained.seconds > 0 and trained.tokens > 1000
    assert list(trained.said) == list(map(Exit, (1, 2, 3, 4))) and trained.reference == Exit(3)
    assert trained.model != found.runs["before"].model
    assert "| l-sft | 1 | 2 |" in all_tables(setup.out)["methods"]
    assert runner.run_study(setup, only=only) == []
    shutil.rmtree(setup.build / "l-sft-0")  # the answers are enough, unless another run asks the checkpoint
    assert runner.to_do(setup, [NAMED["l-sft-0"]], NAMED) == []
    assert [r.name for r in runner.to_do(setup, [NAMED["after-controls"]], NAMED)] == ["l-sft-0", "after-controls"]


def test_what_a_run_depends_on_is_in_its_key(setup, monkeypatch):
    run = NAMED["l-sft-0"]
    keys = {work.run_key(setup, run, NAMED)}
    for changed in ({"trial": 3}, {"model_digest": "x"}, {"data_digest": "x"}, {"suite_digest": "x"}):
        keys.add(work.run_key(dataclasses.replace(setup, **changed), run, NAMED))
    keys.add(work.run_key(setup, dataclasses.replace(run, seed=1), NAMED))
    keys.add(work.run_key(setup, dataclasses.replace(run, exits="2"), NAMED))
    monkeypatch.setattr(work, "code_digest", lambda *_: "other code")
    keys.add(work.run_key(setup, run, NAMED))
    assert len(keys) == 8
    monkeypatch.undo()
    assert work.run_key(dataclasses.replace(setup, threads=2), run, NAMED) in keys


def test_comments_and_docstrings_are_no_code():
    one = 'def f(a):\n    """Says."""\n    return a\n'
    two = 'def f(a):\n    """Says it otherwise."""\n    return a  # so\n'
    three = "def f(a):\n    return -a\n"
    dumps = [ast.dump(without_docstrings(ast.parse(text))) for text in (one, two, three)]
    assert dumps[0] == dumps[1] != dumps[2]
    assert code_digest(["edgesafe.align.train"]) != code_digest(["edgesafe.align.train"], ["edgesafe.checkpoint.exit_model"])
    with pytest.raises(AlignError, match=r"no module edgesafe\.nowhere"):
        code_digest(["edgesafe.nowhere"])


def test_an_interrupted_training_goes_on(setup, monkeypatch):
    whole, _ = work.checkpoint(setup, NAMED["l-sft-0"])
    run = dataclasses.replace(NAMED["l-sft-0"], name="cut")
    real = work.settings
    often = lambda s, r: dataclasses.replace(real(s, r), checkpoint_every=1)  # noqa: E731
    monkeypatch.setattr(work, "settings", often)
    from edgesafe.align import files

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_model", killed)
        with pytest.raises(KeyboardInterrupt):
            work.checkpoint(setup, run)
    partial = setup.build / "cut" / "aligned.partial"
    assert (partial / CHECKPOINT).is_file()
    folder, times = work.checkpoint(setup, run)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert times["cpu_seconds"] is None and len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_failed_run_is_named_and_the_others_end(setup, capsys):
    broken = dataclasses.replace(setup, data=setup.suite)  # no training on the test split
    with pytest.raises(AlignError, match=r"1 runs failed: l-sft-0 .*log\.txt"):
        runner.run_study(broken, only=["before", "l-sft-0"])
    assert read_answers(setup.out).runs.keys() == {"before"}
    assert "ConfigError" in (setup.build / "l-sft-0" / "log.txt").read_text()


def test_a_killed_study_ends_its_runs(setup, monkeypatch):
    process = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(runner, "_start", lambda *_: process)
    monkeypatch.setattr(runner, "_collect", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        runner.run_study(setup, only=["before"])
    assert process.poll() == -signal.SIGTERM


def test_what_waits_for_a_failed_run_fails_too(setup):
    queue = runner._Queue([NAMED["after-controls"]], failed=["l-sft-0"])
    runner._start_ready(setup, queue, 2)
    assert queue.failed == ["l-sft-0", "after-controls"] and not queue.running and not queue.waiting


def test_controls_and_the_bundle_are_asked(setup, tiny_bundle, monkeypatch):
    import edgesafe_export

    def exported(model: Path, out: Path, device: object, **_: object) -> Bundle:
        return Bundle.open(shutil.copytree(tiny_bundle, out))

    monkeypatch.setattr(edgesafe_export, "export_bundle", exported)
    runs = {r.name: r for r in (NAMED["before"], NAMED["before-controls"], Run("small", of="before", how=BUNDLE))}
    runner.write_rows(setup.out, setup.suite_digest, "test", read_suite(setup.suite).rows)
    for run in runs.values():
        assert work.do(setup, run, runs) and work.is_done(setup, run, work.run_key(setup, run, runs))
    found = read_answers(setup.out).runs
    assert list(found["before-controls-text-only"].said) == [None]
    assert list(found["before-controls-blank"].said) == list(map(Exit, (1, 2, 3, 4)))
    # Exported in float32, so it answers the same, but for the end of an answer that the limit cuts within a character.
    starts = [[text[:40] for text in found[name].said[Exit(2)]] for name in ("small", "before")]
    assert starts[0] == starts[1]
    assert found["small"].config["of"] == found["before"].model and runs["before-controls"].how == CONTROLS


def test_other_names_suites_and_folders_are_refused(setup, suite, tmp_path, capsys):
    with pytest.raises(ConfigError, match="no run is called 'l-sfd-0'"):
        runner.run_study(setup, only=["l-sfd-0"])
    runner.write_rows(setup.out, "another", "test", read_suite(suite).rows)
    (setup.out / "raw").mkdir()
    (setup.out / "raw" / "x.json").write_text("{}")
    with pytest.raises(AlignError, match="another suite"):
        runner.run_study(setup, only=["before"])
    assert main(["run", "--trial", "2", "--build", str(tmp_path)]) == 10
    assert "not the study's" in capsys.readouterr().err


@pytest.fixture(scope="module")
def shipped(tiny_llava, suite, tmp_path_factory) -> Path:
    """What `edgesafe ship` leaves, without the alignment: the tiny checkpoint before, and its float bundle after."""
    from edgesafe.device import load_device
    from edgesafe_export import export_bundle

    out = tmp_path_factory.mktemp("shipped") / "out"
    evaluate(tiny_llava, suite, before := out.with_name("shared") / "before")
    export_bundle(tiny_llava, out / "bundle", load_device("host"), vision_scheme="fp32", text_scheme="fp32", suite_dir=suite)
    certify(out / "bundle", progress=False, answers=out / shipping.CERTIFIED, baseline=before)
    bundle = Bundle.open(out / "bundle")
    shared = shipping.Shared(data=suite, suite=suite, before=before, aligned=tiny_llava, carried=())
    report = shipping._report(bundle, read_certificate(bundle), shared)
    (out / "report.json").write_text(json.dumps({**report, "folders": {"before": str(before)}}))
    (out / "table.txt").write_text(shipping.closing_table(report) + "\n")
    return out


def test_the_export_table_comes_from_raw_answers(shipped, tmp_path):
    folder = import_export(shipped, tmp_path)
    # Of four exits, 3 is the reference; nothing is aligned here, so before and after are the same.
    summary = all_tables(tmp_path)["summary"].splitlines()
    assert summary[2].startswith("| 1 of 3 |") and summary[-1].startswith("| 3 of 3 |")
    assert export_table(folder) == f"```\n{(shipped / 'table.txt').read_text()}```"
    assert all_tables(tmp_path)["export"] == export_table(folder)
    import_export(shipped, tmp_path, "smol")
    assert all_tables(tmp_path)["smol"] == export_table(folder)
    path = folder / "raw" / "after.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "strings": ["I'm sorry, but I can't help with that."] * len(raw["strings"])}))
    assert export_table(folder) != f"```\n{(shipped / 'table.txt').read_text()}```"


def test_an_export_whose_answers_are_not_its_table_is_refused(shipped, tmp_path):
    copy = shutil.copytree(shipped, tmp_path / "copy")
    (copy / "table.txt").write_text((copy / "table.txt").read_text().replace("failed", "passed", 1))
    with pytest.raises(AlignError, match="do not give the printed table"):
        import_export(copy, tmp_path / "raw")
    (copy / shipping.CERTIFIED).unlink()
    with pytest.raises(AlignError, match="edgesafe certify"):
        import_export(copy, tmp_path / "raw")
    assert not (tmp_path / "raw").exists()
