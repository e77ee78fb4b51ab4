"""What `make smol` aligns and certifies with: rows and a suite that share nothing. Drawn here; no network."""

from __future__ import annotations

import ast
import base64
import dataclasses
import hashlib
import io
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from edgesafe.certify.overlap import words_of
from edgesafe.certify.smoke_rows import LEAST_ROWS
from edgesafe.certify.string_judge import COMPLY, REFUSE, classify
from edgesafe.certify.verdict import check_size
from edgesafe.cli import main
from edgesafe.errors import CertificateError, InputError
from edgesafe.format.suite import Suite, read_suite
from edgesafe.reference.smol import harm
from edgesafe.reference.smol import wordings as trained
from edgesafe.reference.smol.pictures import MAKERS, Maker
from edgesafe.reference.smol.rows import groups, to_answer
from edgesafe.reference.smol.ship import training
from edgesafe.reference.smol.ship import wordings as own
from edgesafe.reference.smol.ship.suite import COUNTS, LIMITS, USE, USE_HARM, draw_rows, limits, shared_with_training
from edgesafe.reference.smol.ship.training import draw_training, read_answers
from edgesafe.reference.smol.things import THINGS
from edgesafe.reference.smol.wordings import REFS, SAFE, USE_FRAMES

EXITS = Path(__file__).parents[1] / "long" / "smol_exits.py"


@pytest.fixture(scope="module")
def rows():
    return draw_rows(list(dict.fromkeys(THINGS)), COUNTS, 0)


def test_the_suite_s_rows_are_seeded_and_enough_for_its_limits(rows):
    assert rows == draw_rows(list(dict.fromkeys(THINGS)), COUNTS, 0) != draw_rows(list(dict.fromkeys(THINGS)), COUNTS, 1)
    assert Counter(row.family for row in rows) == COUNTS
    check_size(Suite(Path(), tuple(rows), "", LIMITS))
    with pytest.raises(CertificateError, match="so few rows"):  # as many rows of half as many wordings
        check_size(Suite(Path(), tuple(dataclasses.replace(r, prompt=r.prompt[:9]) for r in rows), "", LIMITS))
    assert sum(row.smoke for row in rows) >= LEAST_ROWS
    few = draw_rows(list(dict.fromkeys(THINGS)), {name: round(n * 0.12) for name, n in COUNTS.items()}, 0)
    check_size(Suite(Path(), tuple(few), "", limits(0.12)))


def test_no_wording_stands_twice_in_a_family_and_use_has_one_set_of_them(rows):
    asked = {family: [row.prompt for row in rows if row.family == family] for family in COUNTS}
    assert all(len(set(prompts)) == len(prompts) for prompts in asked.values())
    assert set(asked[USE]) <= set(asked[USE_HARM])  # else a model could tell the dangerous by how they are asked about
    dangerous = {thing.word for thing in THINGS if thing.dangerous}
    assert {row.asked for row in rows if row.family == USE_HARM} == dangerous
    assert not dangerous & {row.asked for row in rows if row.family == USE}


def test_the_suite_shares_nothing_with_training_or_with_the_report(rows):
    tree = ast.parse(EXITS.read_text(encoding="utf-8"))
    constants = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    report = [one for name in ("NAME", "USE", "HARM") for one in ast.literal_eval(constants[name])]
    assert len(report) == 10 and not {tuple(words_of(row.prompt)) for row in rows} & {tuple(words_of(one)) for one in report}
    assert shared_with_training(rows) == {"requests": 0, "runs": 0, "n": sum(COUNTS.values())}
    theirs = (SAFE[0], USE_FRAMES[0].format(ref=REFS[0]))
    found = shared_with_training([dataclasses.replace(rows[0], prompt=prompt) for prompt in theirs])
    assert (found["requests"], found["n"]) == (2, 2)
    named = (vars(own), vars(trained) | vars(harm))
    ours, theirs = ({frame for name, value in one.items() if name.isupper() for frame in value} for one in named)
    assert not {tuple(words_of(frame)) for frame in ours} & {tuple(words_of(frame)) for frame in theirs}
    assert own.OTHER_NAMES.keys() <= {thing.word for thing in THINGS}


def test_the_carried_answers_are_answers_to_what_the_adapter_was_trained_with():
    answers = read_answers()
    assert answers.keys() <= set(to_answer()) and len(answers) > 0.8 * len(set(to_answer()))
    assert all(classify(text, request) == COMPLY for request, text in answers.items())


@pytest.mark.parametrize("left", [None, b"damaged"], ids=["missing", "damaged"])
def test_without_the_carried_answers_nothing_is_fetched(tmp_path, monkeypatch, left):
    path = tmp_path / "answers.json.xz"
    if left:
        path.write_bytes(left)
    monkeypatch.setattr(training, "ANSWERS", path)
    with pytest.raises(InputError, match="clone the repository"):
        training.make_training(tmp_path / "rows", tmp_path / "archives")
    assert not (tmp_path / "rows").exists() and not (tmp_path / "archives").exists()


def test_rows_for_alignment_refuse_what_is_harmful_and_name_the_rest():
    drawing = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    pictures = {name: {thing.emoji: drawing for thing in THINGS} for name in ("a", "b")}
    drawn = groups(read_answers(), 220)
    rows, images = draw_training(drawn, pictures, 0)
    assert (rows, [one.tobytes() for one in images.values()]) == (
        (again := draw_training(drawn, pictures, 0))[0],
        [one.tobytes() for one in again[1].values()],
    )
    assert all((classify(row.target, row.prompt) == REFUSE) == (row.cls == "harmful") for row in rows)
    assert all(row.key[0] in row.target for row in rows if row.cls == "task")
    dangerous = {thing.word for thing in THINGS if thing.dangerous}
    assert {row.asked for row in rows if row.family == "use harmful"} == dangerous
    assert {row.image for row in rows} == images.keys()


def _archive(folder: Path, name: str, paint: int) -> Maker:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for number, thing in enumerate(THINGS):
            picture = io.BytesIO()
            Image.new("RGBA", (4, 4), (paint, number, 9, 255)).save(picture, "PNG")
            info = tarfile.TarInfo(f"package/{thing.emoji}.png")
            info.size = len(picture.getvalue())
            tar.addfile(info, io.BytesIO(picture.getvalue()))
    digest = base64.b64encode(hashlib.sha512(buffer.getvalue()).digest()).decode()
    maker = Maker(f"{name}@1", digest, "package/{}.png", "", held_out=MAKERS[name].held_out)
    folder.mkdir(exist_ok=True)
    (folder / maker.archive).write_bytes(buffer.getvalue())
    return maker


def test_the_command_writes_both_out_of_different_makers_and_counts_what_they_share(tmp_path, monkeypatch, capsys):
    for number, name in enumerate(sorted(MAKERS)):
        monkeypatch.setitem(MAKERS, name, _archive(tmp_path / "pictures", name, 20 * number))
    held_out = {20 * number for number, name in enumerate(sorted(MAKERS)) if MAKERS[name].held_out}
    words = ["reference", "smol-data", "--pictures", str(tmp_path / "pictures"), "--out", str(tmp_path / "out")]
    assert main([*words, "--scale", "0.1"]) == 0
    said = capsys.readouterr().out
    assert "0 of" in said.splitlines()[1] and said.splitlines()[2].endswith("requests, 0 runs of seven words")
    suite, rows = (read_suite(tmp_path / "out" / name) for name in ("suite", "rows"))
    assert (suite.split, rows.split) == ("cert", "train")
    middle = {name: Image.open(suite.root / name).getpixel((56, 56)) for name in suite.images if "blank" not in name}
    assert {red for red, _, _ in middle.values()} == held_out
    trained = {Image.open(rows.root / name).getpixel((56, 56))[0] for name in rows.images}
    assert len(trained) > 1 and not held_out & trained
    assert main([*words, "--scale", "0.1"]) != 0  # there is one already
