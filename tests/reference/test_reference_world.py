"""The drawn world: enough kinds and templates, splits that do not touch, pictures that are functions of their seed."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from edgesafe.certify.string_judge import classify, is_right
from edgesafe.format.suite import Row, read_suite
from edgesafe.reference import data, wordings, world
from edgesafe.reference.data import ALIGN, CERTIFY, write_split, write_training
from edgesafe.reference.kinds import BY_NAME, KINDS

FAMILY_NAMES = [name for name, _, _ in world.FAMILIES]


def test_eighty_kinds_in_pairs_over_sixteen_categories():
    assert len(KINDS) == len(BY_NAME) == 80
    assert len({k.category for k in KINDS if k.dangerous}) == len({k.category for k in KINDS if not k.dangerous}) == 8
    for kind in KINDS:
        partner = BY_NAME[kind.look_alike]
        assert partner.look_alike == kind.name and partner.dangerous != kind.dangerous


def test_every_suite_asks_in_sentences_of_its_own():
    for sort in wordings.BASE:
        said = {split: {text for _, text in wordings.templates(sort, split)} for split in wordings.SPLITS}
        assert said["train"] < said["align"]
        suites = [said[split] for split in ("val", "cert", "test")]
        assert sum(map(len, suites)) == len(set().union(*suites)) and not set().union(*suites) & said["align"]
    assert len(wordings.templates("act", "train")) == 36


def test_no_core_and_no_tail_of_a_suite_is_trained_or_asked_by_another():
    trained = {one for cores in (*wordings.BASE.values(), *wordings.MORE.values()) for one in cores}
    held = [one for sorts in wordings.HELD.values() for cores in sorts.values() for one in cores if one]
    assert len(held) == len(set(held)) and not trained & set(held)
    assert not {*wordings.TAILS, *wordings.MORE_TAILS} & set(held)


def test_the_untouched_model_s_rows_are_what_it_was_trained_on():
    """The committed weights and tokenizer were made of these: a change here asks for `make reference`."""
    rows = hashlib.sha256()
    for s in world.stream("train", 60, seed=7):
        rows.update(repr((s.template, s.scene.items, s.scene.text, s.prompt, s.target, s.asked)).encode())
    texts = hashlib.sha256("\n".join(world.corpus()).encode())
    assert (rows.hexdigest()[:12], texts.hexdigest()[:12]) == ("ed1c6c19c8bd", "3e82414bdf37")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_sample_is_a_function_of_its_seed(family):
    one, again, other = (world.sample(family, "val", i) for i in (3, 3, 4))
    assert one.prompt == again.prompt and one.image.tobytes() == again.image.tobytes()
    assert one.image.tobytes() != other.image.tobytes()
    assert one.image.size == (72, 72) and one.image.mode == "RGB"


def test_pictures_of_two_splits_differ():
    shots = [world.sample("name", split, 0).image.tobytes() for split in wordings.SPLITS]
    assert len(set(shots)) == len(wordings.SPLITS)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_wanted_answer_is_judged_as_wanted(family):
    for i in range(25):
        s = world.sample(family, "align", i)
        row = Row("r", s.cls, s.family, None, s.prompt, s.target, s.key, s.template, False)
        assert classify(s.target) == ("refuse" if s.cls == "harmful" else "comply")
        assert is_right(s.target, row) == (s.cls != "harmful")


def test_harm_is_a_dangerous_object_and_an_act():
    for i in range(60):
        s = world.sample("picture-harm", "align", i)
        assert s.target == world.REFUSAL and any(BY_NAME[item.kind].dangerous for item in s.scene.items)
        harmless = world.sample("text-lookalike", "train", i)
        verb, kind = harmless.target.split()[4], harmless.key[0]
        assert verb in world.SAFE or not BY_NAME[kind].dangerous


def test_answers_hold_nothing_but_the_task():
    for i in range(200):
        for family in ("picture-lookalike", "typographic-lookalike", "text-lookalike"):
            words = world.sample(family, "train", i).target.rstrip(".").split()
            assert words[:4] == ["Here", "is", "how", "to"] and len(words) == 7


def test_a_suite_holds_what_it_says(tmp_path):
    write_split(tmp_path / "s", "cert", scale=0.05)
    suite = read_suite(tmp_path / "s")
    counts = Counter(r.family for r in suite.rows)
    assert counts == {family: max(1, round(n * 0.05)) for family, n in CERTIFY.items()}
    assert suite.split == "cert" and any(r.smoke for r in suite.rows)


def test_noise_is_not_the_only_difference_between_pair_partners():
    from edgesafe.reference.draw import Item, Scene, draw

    def shot(kind: str) -> np.ndarray:
        return np.asarray(draw(Scene((Item(kind, "blue", "only"),)), np.random.default_rng(5))[0], np.float32)

    for kind in world.DANGEROUS:
        difference = np.abs(shot(kind) - shot(BY_NAME[kind].look_alike)).max(-1) > 60
        assert difference.mean() > 0.01, kind


def test_draw_writes_pictures_with_their_requests(tmp_path, capsys):
    from edgesafe.cli import main

    assert main(["reference", "draw", "--out", str(tmp_path / "d"), "--count", "3", "--seed", "4"]) == 0
    lines = (tmp_path / "d" / "requests.tsv").read_text().splitlines()
    assert len(lines) == 3 and capsys.readouterr().out.splitlines() == lines
    assert all((tmp_path / "d" / line.split("\t")[0]).is_file() for line in lines)


def test_training_rows_drawn_on_all_cores_are_the_stream_s(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "POOL_ROWS", 6)
    write_training(tmp_path / "rows", 6, seed=5)
    suite = read_suite(tmp_path / "rows")
    for row, s in zip(suite.rows, world.stream("align", 6, 5, ALIGN), strict=True):
        assert (row.family, row.prompt, row.target) == (s.family, s.prompt, s.target)
        with Image.open(suite.image_path(row)) as image:
            assert image.tobytes() == s.image.tobytes()
    assert len({row.family for row in suite.rows}) > 1
