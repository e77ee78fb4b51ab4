"""The camera example, fed with arrays: one question a motion, and what is kept."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import camera
import numpy as np
import pytest
from answers import REFUSAL, Says, answer
from camera import Motion

from edgesafe.errors import InputError

RNG = np.random.default_rng(0)


def frame(at: int | None = None, light: int = 100) -> np.ndarray:
    """A grey wall with a sensor's noise; a white thing of 64 pixels' width stands ``at`` some place."""
    picture = np.clip(RNG.normal(light, 4, (120, 160, 3)), 0, 255).astype(np.uint8)
    if at is not None:
        picture[40:104, at : at + 64] = 250
    return picture


def asked(frames: list[np.ndarray], **options: int) -> list[int]:
    motion = Motion(**options)
    return [i for i, picture in enumerate(frames) if motion.asks(picture)]


WALL = [frame() for _ in range(8)]
COMES = [frame(at) for at in (0, 20, 40)]
STAYS = [frame(40) for _ in range(8)]


def test_a_motion_is_asked_about_once_when_it_stands_still():
    assert asked(WALL + COMES + STAYS) == [len(WALL) + len(COMES)]
    assert asked(WALL + COMES + STAYS + COMES[::-1] + WALL) == [11, 23]


def test_a_pause_within_a_motion_is_no_other_motion():
    assert asked(WALL + COMES + [frame(40)] * 3 + [frame(60), frame(80)] + STAYS[:2]) == [11]


def test_a_motion_that_does_not_end_is_asked_about_after_a_while():
    assert asked(WALL + [frame(20 * (i % 5)) for i in range(60)], patience=10) == [len(WALL) + 9]


@pytest.mark.parametrize("frames", [WALL * 5, [frame(light=40)] * 5 + [frame(light=200)] * 20, [], [frame(0)]])
def test_noise_and_light_are_no_motion(frames):
    assert asked(frames) == []


def test_another_size_starts_anew():
    assert asked([*WALL, frame()[:60], *WALL]) == []


def test_every_answer_and_refusal_is_kept_without_its_picture(tmp_path):
    frames = (WALL + COMES + STAYS) * 2
    session = Says(answer(), answer(REFUSAL), InputError("the picture can't be used"))
    rows = list(camera.watch(frames, session, "What is it?", tmp_path / "log.jsonl", Motion()))
    # The repetition begins with a motion of its own: the thing is gone at once.
    assert len(rows) == len(session.asked) == 3
    picture, question, budget, _ = session.asked[0]
    assert picture is frames[11] and question == "What is it?" and budget.ttft_ms == camera.BUDGET_MS
    kept = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row.get("refused") for row in kept] == [False, True, None]
    assert kept[0]["exit"] == "6" and kept[0]["certified"] and "InputError" in kept[2]["error"]
    assert all(row["bundle"] == "b" * 64 for row in kept) and (tmp_path / "log.jsonl").stat().st_size < 3000


def test_the_program_asks_what_picamera2_sees(handmade, tmp_path, monkeypatch, capsys):
    formats = []

    class Picamera2:
        left = iter(WALL + COMES + STAYS)

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            formats.append("closed")

        def create_video_configuration(self, main):
            return main

        def configure(self, main) -> None:
            formats.append(main["format"])

        def start(self) -> None:
            formats.append("started")

        def capture_array(self, name):
            found = next(self.left, None)
            if found is None:
                raise KeyboardInterrupt
            return found

    module = ModuleType("picamera2")
    module.Picamera2 = Picamera2
    monkeypatch.setitem(sys.modules, "picamera2", module)
    monkeypatch.setattr(camera, "BUDGET_MS", 1e6)
    words = [str(handmade), "--question", "what?", "--log", str(tmp_path / "log.jsonl")]
    assert camera.main(words) == 0 and formats[:2] == ["BGR888", "started"]
    (row,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert capsys.readouterr().out.strip() in (row.get("text"), row.get("error"))


def test_without_picamera2_it_says_where_it_comes_from(handmade, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "picamera2", None)
    with pytest.raises(SystemExit, match="apt install python3-picamera2"):
        camera.main([str(handmade), "--log", str(tmp_path / "log.jsonl")])
