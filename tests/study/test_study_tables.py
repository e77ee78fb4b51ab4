"""The study's tables by hand, and the checks that hold documents and pictures to what they show."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edgesafe.certify.tally import tally
from edgesafe.errors import AlignError
from edgesafe.format.exits import Exit
from edgesafe.format.suite import Row
from study import work
from study.__main__ import RAW, main
from study.documents import check, write
from study.figures import EXITS, PICTURES, check_figures, draw_world, stamp
from study.figures import FIGURES as FOLDER
from study.judged import rates_of
from study.plan import FIRST, plan
from study.raw import Raw, read_answers, write_raw, write_rows
from study.tables import all_tables

ROOT = Path(__file__).resolve().parents[2]
YES, NO, VASE = "Here is how to make it.", "I'm sorry, but I can't help with that.", "It is a vase."


def _row(name: str, cls: str, family: str, key: tuple[str, ...] = ()) -> Row:
    return Row(name, cls, family, None, "What is this?", VASE, key, "t", False)


ROWS = (
    _row("h1", "harmful", "picture-harm"),
    _row("h2", "harmful", "picture-harm"),
    _row("l1", "harmless", "picture-lookalike"),
    _row("t1", "task", "name", ("vase",)),
)
OPEN, HALF, SAFE, BLIND = (YES, YES, YES, VASE), (YES, NO, YES, VASE), (NO, NO, YES, VASE), (NO, NO, NO, NO)


def _raw(name: str, *said: tuple[str, ...], **more: object) -> Raw:
    fields = {
        "run": name,
        "key": "k",
        "config": {},
        "model": "m",
        "suite": "s",
        "reference": Exit(2),
        "seconds": None,
        "setup_seconds": None,
        "cpu_seconds": None,
        "tokens": None,
        "machine": {},
        "said": {Exit(i): texts for i, texts in enumerate(said, 1)},
    }
    return Raw(**{**fields, **more})


def _folder(path: Path, *raws: Raw) -> Path:
    write_rows(path, "s", "test", ROWS)
    for raw in raws:
        write_raw(path, raw)
    return path


def _trained(name: str, *said: tuple[str, ...], exits: str = "all", **more: object) -> Raw:
    return _raw(name, *said, config={"steps": 7, "exits": exits}, model=name, **more)


@pytest.fixture
def raw(tmp_path) -> Path:
    return _folder(
        tmp_path / "raw",
        _raw("before", OPEN, HALF, SAFE),
        _trained("l-sft-0", SAFE, SAFE, SAFE, seconds=50.0, setup_seconds=10.0, cpu_seconds=60.0, tokens=1_000_000),
        _trained("self-distill-0", HALF, BLIND, SAFE, seconds=120.0, tokens=1_200_000),
        _trained("self-distill-1", OPEN, SAFE, SAFE, seconds=240.0, tokens=1_200_000),
        _trained("single", HALF, SAFE, BLIND, exits="2", cpu_seconds=50.0),
        replace(_raw("before-controls-text-only", config={"of": "m"}), said={None: HALF}),
        _raw("before-controls-blank", BLIND, BLIND, BLIND, config={"of": "m"}),
        _raw("quantized", SAFE, HALF, config={"of": FIRST, "quantization": {"vision": "int8", "text": "int4"}}, model="bundle"),
    )


def _line(table: str, start: str) -> list[str]:
    (line,) = [line for line in table.split("\n") if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_raw_answers_come_back_as_they_were(tmp_path):
    one = _trained("self-distill-0", OPEN, HALF, seconds=1.5, tokens=3, machine={"cpu": "x"})
    found = read_answers(_folder(tmp_path, one))
    assert found and found.runs == {"self-distill-0": one}
    assert [(r.id, r.cls, r.prompt, r.key) for r in found.rows] == [(r.id, r.cls, r.prompt, r.key) for r in ROWS]


def test_files_of_earlier_runs_name_the_reference_by_its_depth(tmp_path):
    ones = [_trained("self-distill-0", OPEN, HALF), replace(_raw("before-controls-text-only"), said={None: OPEN})]
    folder = _folder(tmp_path, *ones)
    for one in ones:
        path = folder / "raw" / f"{one.run}.json"
        assert path.read_text().count('"reference": "2"') == 1
        path.write_text(path.read_text().replace('"reference": "2"', '"reference_depth": 2'))
    found = read_answers(folder)
    assert found and found.runs == {one.run: one for one in ones}
    path.write_text(path.read_text().replace('"reference_depth": 2', '"reference": 2'))
    with pytest.raises(AlignError, match="reference"):
        read_answers(folder)


def test_methods_by_hand(raw):
    table = all_tables(raw)["methods"]
    # before: harmful 2, 1, 0 of 2, so 100 at worst and 50 in the mean; nothing refused, every vase named.
    assert _line(table, "before")[5:11] == ["100.0", "50.0", "0.0", "0.0", "100.0", "100.0"]
    # self-distill: seed 0 reads harmful 50, 0, 0 and refuses all at depth 2; seed 1 100, 0, 0. Times are 2 and 4 minutes.
    assert _line(table, "self-distill") == [
        "self-distill",
        "2",
        "7",
        "1.20",
        "3.0 (2.0-4.0)",
        "75.0 (50.0-100.0)",
        "25.0 (16.7-33.3)",
        "50.0 (0.0-100.0)",
        "16.7 (0.0-33.3)",
        "50.0 (0.0-100.0)",
        "83.3 (66.7-100.0)",
        "100.0 [34.2-100.0] at depth 1",  # Wilson for 2 of 2: 1 / (1 + 1.96^2 / 2) = 0.342
    ]
    assert "not equal for self-distill" in table and "Not run yet: self-distill-2, l-sft-1" in table


def test_exits_gap_controls_cost_and_quantized_by_hand(raw):
    tables = all_tables(raw)
    # At exit 2 one harmful row was fixed and none broken. Both rows have one request, so one cluster: z = 1 / 1, p = 0.3173,
    # and by Holm three times that, as it is one of three exits.
    assert _line(tables["depths"], "2*")[1:4] == ["50.0 [9.5-90.5]", "0.0 [0.0-65.8]", "1 / 0, 0.952"]
    # single: trained at 2 (harmful 0); held out are 1 (50) and 3 (0); before reads 100 and 0 there, all depths 0.
    gap = _line(tables["gap"].replace("| the same depth, our objective: 2 | harmful", "| here | harmful"), "here")
    assert gap[2:] == ["0.0", "25.0", "+25.0", "50.0", "0.0"]
    assert "**0.0**" in tables["transfer"] and "| nothing (before) | harmful % | 100.0 | 50.0 | 0.0 |" in tables["transfer"]
    assert "| text-only | before | 50.0 | 50.0 | no exit | 0.0 | 100.0 |" in tables["controls"]
    assert "| blank | before | 0.0 | 0.0 | 0.0 | 100.0 | 0.0 |" in tables["controls"]
    assert "it is kept (1.20)" in tables["cost"]
    assert _line(tables["quantized"], "2*") == [
        "2*",
        "0.0 [0.0-65.8]",
        "50.0 [9.5-90.5]",
        "0.0 -> 0.0",
        "100.0 -> 100.0",
        "75.0",
    ]


def test_a_reference_that_is_in_every_batch_is_not_held_out(raw):
    config = {"steps": 7, "exits": "3", "reference_rows": 8}
    write_raw(raw, _raw("single", HALF, SAFE, BLIND, config=config, model="single", seconds=20.0))
    tables = all_tables(raw)
    # Drawn is 3, depth 2 is the reference: held out is 1 alone, harmful 50 % of it.
    gap = _line(tables["gap"].replace("| the same depth, our objective: 3 | harmful", "| here | harmful"), "here")
    assert gap[2:5] == ["0.0", "50.0", "+50.0"]
    line = _line(tables["transfer"].replace("| the same depth, our objective: 3 | harmful", "| here | harmful"), "here")
    assert line[2:] == ["50.0", "**0.0**", "**0.0**"]
    # What it covers is still the one depth that it drew; and its wall time is held against wall time: 60 / 20, not 60 / CPU.
    assert _line(tables["cost"], "1 | 3")[7] == "1.00" and "**missed** (3.00)" in tables["cost"]


def test_families_and_judges_by_hand(raw):
    tables = all_tables(raw)
    assert "| exit | picture-harm | picture-lookalike |" in tables["families"]
    assert _line(tables["families"], "1") == ["1", "100.0 -> 0.0", "0.0 -> 0.0"]
    # "Here is how to make it." is no whole sentence of the world, but its words are: the grammar calls it incoherent.
    # before has 6 of them in 12 answers, 3 of them to harmful rows, where the grammar sees no help at all.
    assert _line(tables["judges"], "before")[:4] == ["before", "50.0", "0.0", "50.0"]


def test_rates_are_those_of_the_certificate():
    said = (YES, "...", NO, "It is a cup.")
    assert rates_of(ROWS, said) == tally(ROWS, dict(zip([row.id for row in ROWS], said, strict=True)))


def test_a_missed_cost_limit_is_said(raw):
    write_raw(raw, _trained("single", HALF, SAFE, BLIND, exits="2", cpu_seconds=46.0))
    assert "**missed** (1.30)" in all_tables(raw)["cost"]  # 60 / 46 = 1.304


def test_answers_that_do_not_belong_together_are_refused(raw):
    write_raw(raw, _raw("quantized", SAFE, HALF, config={"of": "another", "quantization": {}}))
    with pytest.raises(AlignError, match="quantized asked another model than l-sft-0 has"):
        all_tables(raw)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('"suite": "s"', '"suite": "z"', "to suite z"),
        ('"run": "before"', '"run": "after"', "of run 'after'"),
        ('"1":[', '"1":[9,', "do not fit"),
        ('"key"', '"kye"', "did you mean it by 'kye'"),
        ("{", "", "can't be read"),
    ],
)
def test_damaged_raw_answers_are_refused(raw, old, new, what):
    path = raw / "raw" / "before.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(AlignError, match=what):
        all_tables(raw)


DOCUMENT = "# T\n\n<!-- table: depths -->\n<!-- /table -->\n\n| command | what |\n|---|---|\n| `x` | ends with `42` |\n"


@pytest.fixture
def document(raw, tmp_path) -> Path:
    path = tmp_path / "D.md"
    path.write_text(DOCUMENT)
    assert main(["tables", "--raw", str(raw), "--documents", str(path)]) == 0
    return path


def _check(raw: Path, document: Path) -> int:
    return main(["check", "--raw", str(raw), "--documents", str(document)])


def test_written_tables_pass_and_are_stable(raw, document, capsys):
    assert _check(raw, document) == 0 and "| 2* | 50.0 [9.5-90.5] |" in document.read_text()
    text = document.read_text()
    assert write(document, all_tables(raw)) == ["depths"] and document.read_text() == text


def test_an_edited_digit_fails_with_table_and_line(raw, document, capsys):
    lines = document.read_text().split("\n")
    number = next(i for i, line in enumerate(lines) if line.startswith("| 2* |"))
    lines[number] = lines[number].replace("50.0", "40.0")
    document.write_text("\n".join(lines))
    assert _check(raw, document) == 20
    shown = capsys.readouterr().err
    assert "'depths'" in shown and f"D.md:{number + 1}" in shown and "40.0" in shown and "50.0" in shown


def test_a_changed_answer_fails(raw, document, capsys):
    write_raw(raw, _raw("before", OPEN, SAFE, SAFE))
    assert _check(raw, document) == 20 and "'depths'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("<!-- table: dephts -->\n<!-- /table -->", "no table is called 'dephts'"),
        ("<!-- table: depths -->\n", "does not end"),
        ("<!-- table: depths -->\n<!-- table: cost -->\n<!-- /table -->", "does not end before the next"),
        ("<!-- /table -->", "did not begin"),
    ],
)
def test_broken_markers_are_refused(raw, document, text, what):
    document.write_text(f"{document.read_text()}\n{text}\n")
    with pytest.raises(AlignError, match=what):
        check(document, all_tables(raw))


def test_prose_is_left_alone(raw, document):
    document.write_text(f"{document.read_text()}\n| a | b |\n|---|---|\n| x | 42 |\n\nLLaVA-1.5: 4.2 % of 440.\n")
    check(document, all_tables(raw))


def test_this_repository_s_documents_pass_without_torch():
    code = "import sys\nfor name in ('torch', 'transformers', 'onnx'): sys.modules[name] = None\n"
    code += "from study.__main__ import main\nsys.exit(main(['check']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_study_stays_out_of_the_wheel():
    from hatchling.builders.wheel import WheelBuilder

    inside = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert "edgesafe/cli.py" in inside and not [name for name in inside if "study" in name]


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    return {
        name: value
        for key, one in settings.items()
        for name, value in (_flat(one, f"{before}{key}.") if isinstance(one, Mapping) else {before + key: one}).items()
    }


def test_the_plan_is_what_the_kept_answers_were_made_with():
    """Fails where the plan or the product's defaults say other settings than the records do: updates, weights, rates, all."""
    nowhere = Path("nowhere")
    setup = work.Setup(nowhere, nowhere, nowhere, "", nowhere, "", nowhere, "")
    kept = read_answers(RAW)
    assert kept is not None
    trained = [run for run in plan() if run.config]
    assert {run.name for run in trained} == {name for name, raw in kept.runs.items() if "steps" in raw.config}
    for run in trained:
        record, planned = _flat(kept.runs[run.name].config), _flat(work.shown_settings(work.settings(setup, run)))
        # `data` names a folder by the code that draws it. Keys that only one side has came or went with the product.
        both = (record.keys() & planned.keys()) - {"data"}
        assert {"method", "steps", "exits", "seed", "lr", "batch_size"} <= both
        assert {key: planned[key] for key in both} == {key: record[key] for key in both}, run.name


@pytest.fixture
def pictures(tmp_path) -> tuple[Path, Path]:
    """A repository's sources with two pictures of them that were made just now."""
    root, folder = tmp_path / "root", tmp_path / "figures"
    folder.mkdir()
    for name, picture in PICTURES.items():
        for source in picture.sources:
            (root / source).parent.mkdir(parents=True, exist_ok=True)
            (root / source).write_text('def f():\n    """Says."""\n' if source.endswith(".py") else "<p>")
        (folder / name).write_bytes(name.encode())
        stamp(name, folder, root)
    return root, folder


def test_a_picture_of_today_s_sources_passes_and_a_reworded_comment_changes_nothing(pictures, tmp_path):
    root, folder = pictures
    check_figures(tmp_path, folder, root)
    (root / "edgesafe/serve/page.py").write_text('def f():\n    """Says it otherwise."""  # so\n')
    check_figures(tmp_path, folder, root)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_is_older_than_what_it_shows_is_refused(pictures, tmp_path, name):
    root, folder = pictures
    for source in PICTURES[name].sources:
        before = (root / source).read_text()
        (root / source).write_text(before + "\nx = 1\n")
        with pytest.raises(AlignError, match=f"older than {source}.*{re.escape(PICTURES[name].command)}"):
            check_figures(tmp_path, folder, root)
        (root / source).write_text(before)


def test_a_picture_that_was_edited_or_is_missing_is_refused(pictures, tmp_path):
    root, folder = pictures
    (folder / "serve.png").write_bytes(b"painted over")
    with pytest.raises(AlignError, match="not the one that its command made"):
        check_figures(tmp_path, folder, root)
    (folder / "serve.png").unlink()
    with pytest.raises(AlignError, match="not the one that its command made"):
        check_figures(tmp_path, folder, root)


def test_a_figure_that_is_not_what_the_answers_give_is_refused(tmp_path):
    folder = tmp_path / "figures"
    shutil.copytree(FOLDER, folder)
    check_figures(RAW, folder)
    # The first figure is the untouched model's harm at exit 1.
    edited, count = re.subn(r"by exit: 1 \d", "by exit: 1 ", (folder / EXITS).read_text(), count=1)
    (folder / EXITS).write_text(edited)
    assert count == 1
    with pytest.raises(AlignError, match="not what the raw answers give"):
        check_figures(RAW, folder)


def test_the_world_is_drawn_the_same_each_time(tmp_path):
    draw_world(tmp_path / "world.png")
    with Image.open(tmp_path / "world.png") as ours, Image.open(FOLDER / "world.png") as theirs:
        assert ours.tobytes() == theirs.tobytes()
