"""A short slice of `make fuzz`, and that its checks fail where a bundle is not verified or an error is not one of the tree."""

from __future__ import annotations

import copy

import fuzz
import numpy as np
import pytest
from PIL import Image

import odd_inputs
from edgesafe import Session
from edgesafe.errors import BundleError, InputError
from edgesafe.format import fields as records
from edgesafe.format import tiles as arithmetic
from edgesafe.format.bundle import Bundle
from edgesafe.format.manifest import Manifest
from edgesafe.runtime.image import load_picture
from handmade import ANSWER, CANVAS, GRID, make_bundle
from mutants import wrong


@pytest.mark.parametrize(
    ("kind", "count", "answered"),
    [
        ("sealed", 40, False),
        ("resealed", 40, False),
        ("forged", 40, True),
        ("tiled", 60, True),
        ("picture", 60, True),
        ("prompt", 60, True),
        ("request", 200, True),
    ],
)
def test_a_slice(kind, count, answered):
    row = fuzz.run_cases(kind, 0, count)
    assert row["failures"] == [] and row["refused"] + row["answered"] == count
    assert row["refused"] > count // 4 and (row["answered"] > 0) == answered


def test_the_check_fails_where_files_are_not_verified(handmade, tmp_path, monkeypatch):
    monkeypatch.setattr(Bundle, "verify", lambda self: None)
    seen = [fuzz.one("sealed", number, None, handmade, tmp_path / "work")["outcome"] for number in range(25)]
    assert "FAILED" in seen and "refused" in seen


def test_the_check_fails_on_an_error_of_no_tree(handmade, tmp_path, monkeypatch):
    edit = ("math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63", "math.isfinite(value)")
    monkeypatch.setattr(records, "_is_number", wrong(records._is_number, edit))
    seen = [fuzz.one("forged", number, None, handmade, tmp_path / "work") for number in range(60)]
    assert any(case["detail"] == "OverflowError: int too large to convert to float" for case in seen)


def test_a_bundle_with_tiles_by_hand_answers(tmp_path):
    for tiles, seen in ((GRID, (5, 3)), (CANVAS, (3, 3))):
        with Session.open(make_bundle(tmp_path / tiles.cut, tiles=tiles).root, threads=1) as session:
            assert tuple(session.cut(picture).tiles for picture in (fuzz.BLACK, fuzz.WIDE)) == seen
            assert [session.ask(picture, "what?").text for picture in (fuzz.BLACK, fuzz.WIDE)] == [ANSWER] * 2


@pytest.mark.parametrize(("place", "name", "wrong_one"), [(arithmetic, "_is_side", lambda n: True), (fuzz, "ANSWER", "no")])
def test_the_check_fails_on_unread_sides_of_tiles_and_on_another_answer(tmp_path, monkeypatch, place, name, wrong_one):
    monkeypatch.setattr(place, name, wrong_one)
    seen = [fuzz.one("tiled", number, None, tmp_path, tmp_path / "work")["outcome"] for number in range(60)]
    assert "FAILED" in seen and "refused" in seen


def test_a_dead_child_is_a_failure_with_its_number(monkeypatch):
    def spawn(kind, first, count):
        if first == 0:
            return [{"start": 0}, {"case": 0, "outcome": "refused", "detail": "X"}, {"start": 1}], "it died"
        return [{"case": n, "outcome": "refused", "detail": "X"} for n in range(first, first + count)], ""

    monkeypatch.setattr(fuzz, "spawn", spawn)
    row = fuzz.run_cases("sealed", 0, 4)
    assert row["refused"] == 3 and [f["case"] for f in row["failures"]] == [1]


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda o: o["text"].update(num_layers=2), "num_layers"),
        (lambda o: o["text"].update(num_layers=10**12), "num_layers"),
        (lambda o: o["text"].update(head_dim=2**40), "past_key_values"),
        (lambda o: o["text"].update(hidden_size=7), "image_features"),
        (lambda o: o["text"].update(vocab_size=7), "logits"),
        (lambda o: o["text"].update(context_length=2**40), "context_length"),
        (lambda o: o["text"].update(context_length=10**400), "context_length"),
        (lambda o: o.update(image_tokens=5), "image_features"),
        (lambda o: o["image"]["size"].update(height=9), "pixel_values"),
        (lambda o: o["image"]["size"].update(height=2**31), "height"),
        (lambda o: o["image"].update(resize_to=[2**31, 8]), "resize_to"),
        (lambda o: o["image"].update(resize_to=[0, 0]), "resize_to"),
        (lambda o: o["image"].update(rescale_factor=10**400), "rescale_factor"),
        (lambda o: o["image"].update(center_crop=False), "resize"),
        (lambda o: o["suite"].update(path="../suite"), "suite"),
        (lambda o: o["graphs"]["vision/head.onnx"].update(outputs=[]), "one output"),
        (lambda o: o["graphs"]["text/decoder_model_merged.onnx"]["outputs"].pop(), "present.0.value"),
    ],
)
def test_absurd_and_unfitting_sizes_are_refused_before_anything_is_allocated(handmade, change, shown):
    obj = copy.deepcopy(Bundle.open(handmade).manifest.to_dict())
    change(obj)
    with pytest.raises(BundleError, match=shown):
        Manifest.from_dict(obj)


def test_a_graph_that_fails_while_running_is_a_bundle_error(handmade):
    with Session.open(handmade) as session, pytest.raises(BundleError, match="can't run"):
        session.graph("vision/head.onnx").run({"hidden_states": np.zeros((1, 9), np.float32)})


def test_pictures_come_as_bytes_in_five_formats_and_no_other(tmp_path):
    image = Image.new("RGB", (3, 2), "red")
    for kind in ("PNG", "BMP", "GIF"):
        assert load_picture(odd_inputs.encoded_as(kind, image)).tobytes() == image.tobytes()
    for kind in ("EPS", "TIFF", "PPM", "ICO"):
        with pytest.raises(InputError, match="can't be read"):
            load_picture(odd_inputs.encoded_as(kind, image))
    with pytest.raises(InputError, match="no such picture"):
        load_picture("a" * 5000)


def test_transparency_over_white_in_strips_is_pillow_s_own_in_one():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (150, 7, 4), np.uint8))
    whole = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    assert load_picture(image).tobytes() == whole.tobytes()


def test_an_endless_prompt_is_refused_before_it_is_tokenized(handmade, monkeypatch):
    with Session.open(handmade) as session:
        with pytest.raises(InputError, match="characters"):
            session.ask(np.zeros((8, 8, 3), np.uint8), "x" * 10_000)
        from edgesafe.runtime import tokenizer

        monkeypatch.setattr(tokenizer, "_check_prompt", wrong(tokenizer._check_prompt, ("if len(prompt) > most:", "if False:")))
        with pytest.raises(InputError, match="tokens with its picture"):
            session.ask(np.zeros((8, 8, 3), np.uint8), "x" * 10_000)
