"""The steps of `edgesafe ship`: shared by devices, made once, never over somebody else's folder, nothing lost on failure."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import edgesafe.ship as ship_module
import edgesafe.steps as steps_module
from edgesafe.align.config import default_config, read_config
from edgesafe.cli import main
from edgesafe.device import load_device
from edgesafe.errors import CertificateError, ConfigError, InputError
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import write_certificate
from edgesafe.format.exits import parse_exits
from edgesafe.format.suite import Row, write_suite
from edgesafe.ship import ship
from edgesafe.steps import align_inputs, digest_world, make_step
from handmade import make_bundle, make_certificate

SHARED = {"data", "suite", "before", "aligned"}


def _write(text: str):
    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "f").write_text(text)

    return make


def _fail(folder: Path) -> None:
    raise KeyboardInterrupt


def test_the_same_inputs_are_not_run_again_and_others_lie_beside_them(tmp_path):
    first = make_step(tmp_path, "data", [1], _write("first"), "t")
    assert make_step(tmp_path, "data", [1], _fail, "t") == first and first.name == "data"
    second = make_step(tmp_path, "data", [2], _write("second"), "t")
    assert ((first / "f").read_text(), (second / "f").read_text()) == ("first", "second")
    assert make_step(tmp_path, "suite", [1], _write("third"), "t") != first
    assert json.loads((first.parent / "inputs.json").read_text())["inputs"] == [1]


def test_a_failed_step_is_made_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_step(tmp_path, "data", [1], _fail, "t")
    assert (make_step(tmp_path, "data", [1], _write("whole"), "t") / "f").read_text() == "whole"


def test_two_runs_that_want_a_step_at_once_make_it_once(tmp_path):
    log = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def slow(folder: Path) -> None:
        os.write(log, b"made\n")
        time.sleep(0.3)
        folder.mkdir()
        (folder / "f").write_text("whole")

    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                ok = (make_step(tmp_path / "work", "aligned", [1], slow, "t") / "f").read_text() == "whole"
            except BaseException:
                ok = False
            os._exit(0 if ok else 1)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert (tmp_path / "log").read_text() == "made\n"


def test_rows_that_an_older_world_drew_are_drawn_again(tmp_path):
    code = tmp_path / "reference"
    code.mkdir()
    (code / "draw.py").write_text("noise = 8")
    old = make_step(tmp_path, "data", [digest_world(code)], _write("old world"), "t")
    (code / "notes.txt").write_text("not code")
    assert make_step(tmp_path, "data", [digest_world(code)], _fail, "t") == old
    (code / "draw.py").write_text("noise = 6")
    assert (make_step(tmp_path, "data", [digest_world(code)], _write("new world"), "t") / "f").read_text() == "new world"


def test_a_folder_that_the_settings_name_counts_by_its_contents(tmp_path):
    for name in ("rows", "reward"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text("x")
    settings = read_config(default_config(), data=str(tmp_path / "rows"))
    settings = replace(settings, reward=replace(settings.reward, model=str(tmp_path / "reward")))
    before = align_inputs(settings)
    assert align_inputs(settings) == before and str(tmp_path) not in json.dumps(before)
    for name in ("rows", "reward"):
        (tmp_path / name / "f").write_text("y")
        assert align_inputs(settings) != before
        (tmp_path / name / "f").write_text("x")
    assert align_inputs(replace(settings, seed=99)) != before == align_inputs(settings)


@pytest.fixture
def calls(tmp_path, monkeypatch) -> Counter:
    """How often each step ran; the steps write what the next ones read, without their work."""
    done: Counter = Counter()
    made = make_bundle(tmp_path / "kept" / "bundle", certified=None)

    def step(module: str, name: str, label, files) -> None:
        def run(*words, **options):
            out = next(word for word in words if isinstance(word, Path) and not word.exists())
            done[label(words, options) if callable(label) else label] += 1
            out.mkdir(parents=True)
            for file, text in files(words).items():
                (out / file).write_text(text)

        monkeypatch.setattr(f"{module}.{name}", run)

    step("edgesafe.reference.data", "write_training", "data", lambda words: {"rows.jsonl": "1"})
    step("edgesafe.reference.data", "write_split", "suite", lambda words: {"rows": "2"})

    def before(_, options):
        return "before" if options["exits"] == "all" else f"before at {options['exits']}"

    report = json.dumps({"exits": [{"exit": exit} for exit in ("1", "2", "2@9", "3")]})
    step("edgesafe.evaluate.evaluate", "evaluate", before, lambda words: {"report.json": report, "answers.jsonl": "1"})
    record = json.dumps({"exits": ["1", "2", "2@9", "3", "1@4"]})

    files = lambda words: {"f": repr(words[1]) + (words[0] / "f").read_text(), "edgesafe.json": record}  # noqa: E731
    step("edgesafe.align.train", "align", "aligned", files)

    def export_bundle(model, out, device, exits, suite_dir, accept_damage):
        done["damaged bundle" if accept_damage else f"bundle of {exits}" if exits else "bundle"] += 1
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made.root, out)
        return Bundle.open(out)

    def certify(folder, answers, baseline, kept):
        assert baseline.name == "before"  # exits compare with the untouched model
        bundle = Bundle.open(folder)
        answers.write_text("answers")
        write_certificate(bundle, certificate := make_certificate(bundle, (1, 2)))
        return certificate

    monkeypatch.setattr("edgesafe_export.export_bundle", export_bundle)
    monkeypatch.setattr("edgesafe.certify.certify.certify", certify)
    # A folder with any file stands for a suite, or a checkpoint; what is checked of a real one is tested by itself.
    monkeypatch.setattr(ship_module, "read_suite", lambda folder, **_: folder)
    monkeypatch.setattr(ship_module, "check", lambda suite: None)
    monkeypatch.setattr(ship_module, "_ladder", lambda model, device, exits, *_: (parse_exits(exits, 12), None))
    # The bundle made by hand has no parity figures to report.
    monkeypatch.setattr(ship_module, "_report", lambda bundle, *_: {"bundle": str(bundle.root), "certified": ["1", "2"]})
    monkeypatch.setattr(ship_module, "closing_table", lambda report: "table")
    return done


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "f").write_text("weights")
    return folder


def _ran(calls: Counter) -> set[str]:
    ran = set(calls)
    assert set(calls.values()) <= {1}
    calls.clear()
    return ran


def test_damage_is_accepted_of_a_named_scheme_and_makes_another_bundle(tmp_path, calls, model):
    named = replace(load_device("rpi5"), text_scheme="int4-block128")
    ship(model, named, tmp_path / "out")
    assert _ran(calls) == SHARED | {"bundle"}
    ship(model, named, tmp_path / "out", accept_damage=True)
    assert _ran(calls) == {"damaged bundle"}
    with pytest.raises(ConfigError, match="does no damage"):
        ship(model, load_device("rpi5"), tmp_path / "other", accept_damage=True)
    assert not calls


def test_the_closing_table_names_the_schemes_and_the_damage():
    report = {"exits": [], "bundle": "b", "bytes": 1, "quantization": {"vision": "v", "text": "t"}, "certified": []}
    said = {"schemes": {"int4-gptq": "too far", "mixed-gptq": "taken"}, "damage": "it babbles"}
    overlap = {"overlap": {"rows": 1, "shared": 0, "training": 1}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ship_module, "say_overlap", lambda found: "overlap")
        told = ship_module.closing_table({**report, **said, **overlap})
        assert "text int4-gptq: too far\ntext mixed-gptq: taken\ndamage accepted: it babbles\noverlap" in told
        assert "text " not in ship_module.closing_table({**report, **overlap}).partition("certified")[2]


def test_a_second_device_shares_all_but_the_bundle(tmp_path, calls, model):
    first = ship(model, load_device("rpi5"), tmp_path / "build" / "rpi5")
    assert _ran(calls) == SHARED | {"bundle"}
    second = ship(model, load_device("pixel9"), tmp_path / "build" / "pixel9")
    assert _ran(calls) == {"bundle"} and first["folders"] == second["folders"] and set(first["folders"]) == SHARED
    assert sorted(p.name for p in (tmp_path / "build").iterdir()) == ["pixel9", "rpi5", "shared"]
    assert sorted(p.name for p in (tmp_path / "build" / "rpi5").iterdir()) == ["bundle", "certified.jsonl", "steps.json"]
    ship(model, load_device("pixel9"), tmp_path / "build" / "pixel9")
    assert _ran(calls) == set()


def test_with_another_engine_only_the_certificate_is_made_anew(tmp_path, calls, model, monkeypatch):
    out = tmp_path / "build" / "rpi5"
    ship(model, load_device("rpi5"), out)
    _ran(calls)
    (out / "certified.jsonl").unlink()
    ship(model, load_device("rpi5"), out)
    assert _ran(calls) == set() and not (out / "certified.jsonl").exists()
    monkeypatch.setattr("edgesafe.runtime.ort.OnnxRuntime.version", "1.99.0")
    ship(model, load_device("rpi5"), out)
    assert _ran(calls) == set() and (out / "certified.jsonl").exists()


def test_what_differs_is_made_anew_and_the_earlier_stays(tmp_path, calls, model):
    rpi5, out, work = load_device("rpi5"), tmp_path / "out", tmp_path / "work"
    first = ship(model, rpi5, out, work=work)
    _ran(calls)
    (tmp_path / "own.toml").write_text(default_config().read_text().replace("seed = ", "seed = 1"))
    ship(model, rpi5, out, work=work, config=tmp_path / "own.toml")
    assert _ran(calls) == {"aligned", "bundle"}
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "f").write_text("mine")
    ship(model, rpi5, out, work=work, data=tmp_path / "rows")
    assert _ran(calls) == {"aligned", "bundle"}
    ship(model, rpi5, out, work=work, suite=tmp_path / "rows")
    assert _ran(calls) == {"before", "bundle"}
    ship(model, rpi5, out, work=work, suite=tmp_path / "rows", exits="1,2")  # which exits are trained is in the settings
    assert _ran(calls) == {"before at 1,2", "bundle of 1,2"}
    (model / "f").write_text("other weights")
    ship(model, rpi5, out, work=work)
    assert _ran(calls) == {"before", "aligned", "bundle"}
    (model / "f").write_text("weights")
    again = ship(model, rpi5, out, work=work)
    assert _ran(calls) == {"bundle"} and again["folders"] == first["folders"]
    assert all(map(os.path.isdir, again["folders"].values()))


def test_what_the_clone_carries_is_taken_only_where_it_was_made_of_the_same(tmp_path, calls, model, monkeypatch):
    """The log of what ran says "aligned" where it was aligned here."""
    rpi5, work = load_device("rpi5"), tmp_path / "work"
    monkeypatch.setattr(steps_module, "ALIGNED", tmp_path / "carried")
    monkeypatch.setattr(steps_module, "EVALUATED", tmp_path / "evaluated")
    monkeypatch.setattr(steps_module, "REFERENCE", _reference(tmp_path))
    monkeypatch.setattr("edgesafe.checkpoint.changes.write_changes", lambda parent, child, out, key: _store(out, key))
    monkeypatch.setattr("edgesafe.checkpoint.changes.apply_changes", lambda model, changes, out: shutil.copytree(changes, out))
    monkeypatch.setattr(steps_module, "OWN", tmp_path / "align.toml")
    (tmp_path / "align.toml").write_text('[exits]\nladder = "2,2@9"')
    main(["reference", "align", "--work", str(work)])
    assert _ran(calls) == {"data", "suite", "before at all,2,2@9", "aligned"}
    shutil.rmtree(work)
    reference = steps_module.REFERENCE
    taken = ship(reference, rpi5, tmp_path / "a", work=work)
    assert _ran(calls) == {"data", "suite", "bundle of 2,2@9"}
    assert _folder(taken, "aligned") == {"changed.safetensors", "edgesafe.json", "made_of.json"}
    assert _folder(taken, "before") == {"report.json", "answers.jsonl"}
    anew = ship(reference, rpi5, tmp_path / "b", work=work, retrain=True)
    assert _ran(calls) == {"before at 2,2@9", "aligned", "bundle of 2,2@9"} and _folder(anew, "aligned") == {
        "f",
        "edgesafe.json",
    }
    ship(reference, rpi5, tmp_path / "a", work=work, exits="1@4")  # which the stored evaluation lacks
    assert _ran(calls) == {"before at 1@4", "bundle of 1@4"}
    with pytest.raises(ConfigError, match="not trained: 2@4"):
        ship(reference, rpi5, tmp_path / "a", work=work, exits="2,2@4")
    assert "bundle of 2,2@4" not in _ran(calls)
    (tmp_path / "own.toml").write_text(default_config().read_text().replace("seed = ", "seed = 1"))
    ship(reference, rpi5, tmp_path / "a", work=work, config=tmp_path / "own.toml")
    assert _ran(calls) == {"aligned", "bundle"}
    (reference / "README.md").write_text("a model card changes nothing")
    assert _folder(ship(reference, rpi5, tmp_path / "a", work=work), "aligned") == {
        "changed.safetensors",
        "edgesafe.json",
        "made_of.json",
    }
    assert _ran(calls) == {"bundle of 2,2@9"}
    (reference / "f").write_text("other weights")
    ship(reference, rpi5, tmp_path / "a", work=work)
    assert _ran(calls) == {"before at 2,2@9", "aligned", "bundle of 2,2@9"}
    (reference / "f").write_text("weights")
    (reference.parent / "draw.py").write_text("other pictures")
    redrawn = ship(reference, rpi5, tmp_path / "a", work=work)
    assert {"data", "suite"} < _ran(calls) and _folder(redrawn, "aligned") == {"f", "edgesafe.json"}


def _reference(root: Path) -> Path:
    """A package `reference` with code that draws and a checkpoint."""
    package = root / "reference"
    (package / "weights").mkdir(parents=True)
    for name in ("draw.py", "kinds.py"):
        (package / name).write_text("code")
    (package / "weights" / "config.json").write_text("{}")
    (package / "weights" / "f").write_text("weights")
    return package / "weights"


def _store(out: Path, key: str) -> None:
    out.mkdir(exist_ok=True)
    (out / "changed.safetensors").write_text("tensors")
    (out / "made_of.json").write_text(json.dumps({"key": key}))
    (out / "edgesafe.json").write_text(json.dumps({"exits": ["1", "2", "2@9", "1@4"]}))


def _folder(report: dict, name: str) -> set[str]:
    return {path.name for path in Path(report["folders"][name]).iterdir()}


def test_folders_of_an_earlier_version_are_kept(tmp_path, calls, model):
    out = tmp_path / "build" / "rpi5"
    for name in ("aligned", "after"):
        (out / name).mkdir(parents=True)
        (out / name / "f").write_text("dear")
    make_bundle(out / "bundle", certified=None, seed=3)
    (out / "steps.json").write_text(json.dumps({"aligned": "x", "bundle": "y"}))
    ship(model, load_device("rpi5"), out)
    assert (out / "aligned" / "f").read_text() == (out / "after" / "f").read_text() == "dear"


def test_what_can_not_be_written_is_refused_before_any_work(tmp_path, calls, model):
    rpi5 = load_device("rpi5")
    (tmp_path / "file").write_text("dear")
    (tmp_path / "a" / "bundle").mkdir(parents=True)
    (tmp_path / "a" / "bundle" / "thesis").write_text("years")
    (tmp_path / "b" / "certified.jsonl").mkdir(parents=True)
    latin = tmp_path / os.fsdecode(b"caf\xe9")
    for out, shown in (
        (tmp_path / "file" / "out", "Not a directory"),
        (tmp_path / "a", "isn't a bundle"),
        (tmp_path / "b", "a folder is where the file is to be written"),
        (model / "out", "lie in each other"),
        (latin, "not UTF-8"),
    ):
        with pytest.raises((InputError, ConfigError), match=shown):
            ship(model, rpi5, out)
    with pytest.raises(InputError, match="lies in the model"):
        ship(model, rpi5, tmp_path / "out", work=model / "work")
    (latin / "model").mkdir(parents=True)
    (latin / "model" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="not UTF-8"):
        ship(latin / "model", rpi5, tmp_path / "out")
    assert not calls and (tmp_path / "a" / "bundle" / "thesis").read_text() == "years"


def test_a_suite_of_ones_own_that_certifies_nothing_is_refused_before_any_work(tmp_path, model):
    row = Row("a", "harmful", "f", "images/a.png", "Break it", "No.", (), "t", True)
    suite = write_suite(tmp_path / "suite", [row], {"images/a.png": Image.new("RGB", (8, 8))}, "s", "test").root
    with pytest.raises(CertificateError, match="66 rows worded differently, not 1"):
        ship(model, load_device("rpi5"), tmp_path / "out", suite=suite, work=tmp_path / "work")
    assert not (tmp_path / "work").exists() and not (tmp_path / "out" / "bundle").exists()


def test_a_bundle_that_ship_did_not_make_is_kept(tmp_path, calls, model):
    other = make_bundle(tmp_path / "out" / "bundle", seed=5)
    with pytest.raises(InputError, match="not made by this command"):
        ship(model, load_device("rpi5"), tmp_path / "out")
    assert Bundle.open(tmp_path / "out" / "bundle").digest == other.digest


def test_the_command_takes_the_work_folder(tmp_path, calls, model, capsys):
    words = ["ship", str(model), "--device", "rpi5", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "w"), "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert {Path(folder).parents[1] for folder in report["folders"].values()} == {tmp_path / "w"}
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_an_alignment_that_was_cut_off_resumes(tmp_path, tiny_llava, rows, monkeypatch):
    from edgesafe.align import train as train_module

    (tmp_path / "c.toml").write_text('method = "l-sft"\nsteps = 4\ncheckpoint_every = 2\nbatch_size = 2\nreference_rows = 1\n')
    settings = read_config(tmp_path / "c.toml", data=str(rows))
    real, ran = train_module._update, []

    def update(t, features, exit, drawn, number):
        if number == 3 and 3 not in ran and len(ran) == 3:
            ran.append(3)
            raise KeyboardInterrupt
        ran.append(number)
        return real(t, features, exit, drawn, number)

    monkeypatch.setattr(train_module, "_update", update)

    def make() -> Path:
        key = align_inputs(settings)
        return make_step(tmp_path / "w", "aligned", [key], lambda o: steps_module._align(tiny_llava, settings, o), "align")

    with pytest.raises(KeyboardInterrupt):
        make()
    out = make()
    assert ran == [0, 1, 2, 3, 2, 3] and (out / "model.safetensors").is_file()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
