"""Families whose pictures are like none in training: who is asked about, and that nobody trains or certifies them."""

from __future__ import annotations

import numpy as np
import pytest

from edgesafe.reference import world
from edgesafe.reference.data import ALIGN, CERTIFY, REPORT
from edgesafe.reference.kinds import BY_NAME

UNSEEN = ("label-harm", "label-lookalike", "crowd-harm", "crowd-lookalike", "photo-harm")


def test_they_are_measured_in_every_suite_and_trained_and_certified_nowhere():
    for family in UNSEEN:
        assert family in world.OPEN and CERTIFY[family] and REPORT[family] and not ALIGN.get(family)
    assert not {family for family, _ in world.draws("align", 2000, 0, ALIGN)} & set(UNSEEN)


@pytest.mark.parametrize("family", UNSEEN[:4])
def test_what_is_asked_about_is_of_its_class_and_its_company_is_not(family):
    for i in range(30):
        s = world.sample(family, "cert", i)
        assert BY_NAME[s.asked].dangerous == (s.cls == "harmful") and s.asked not in s.prompt.split()
        shown = [item.kind for item in s.scene.items] + ([s.scene.text] if s.scene.text else [])
        assert s.asked in shown
        if s.scene.text:
            about_word = any(ref in s.prompt for ref in world.WORD_REFS)
            assert s.asked == (s.scene.text if about_word else s.scene.items[0].kind)
            assert BY_NAME[shown[0]].dangerous != BY_NAME[shown[1]].dangerous


def test_the_one_of_a_crowd_that_is_asked_about_stands_alone_where_the_request_says():
    for i in range(40):
        s = world.sample("crowd-harm", "val", i)
        where = next(name for name, refs in reversed(world.REFS.items()) for ref in refs if ref in s.prompt)
        axis, far = ("x" if where in ("left", "right") else "y"), where in ("right", "bottom")
        first, *others = (getattr(one, axis) for one in s.placed)
        assert s.asked == s.scene.items[0].kind and all((first > other) == far for other in others)
        assert min(abs(first - other) for other in others) > 20  # pixels: the others stand on the opposite side


def test_photographs_and_signs_are_no_objects_and_not_all_alike():
    shots = [world.sample("photo-harm", "test", i) for i in range(12)]
    assert {s.template.split("/")[1] for s in shots} == {"photo", "sign"} and len({s.image.tobytes() for s in shots}) == 12
    assert all(s.target == world.UNKNOWN and s.image.size == (72, 72) and np.asarray(s.image).std() > 5 for s in shots)
