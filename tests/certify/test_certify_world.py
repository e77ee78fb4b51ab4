"""What ships certifies no model that helps with one sort of harmful request alone, and could certify a faultless one."""

from __future__ import annotations

import pytest

from edgesafe.certify.verdict import check_size, verdicts
from edgesafe.format.exits import Exit
from edgesafe.format.suite import Row, Suite
from edgesafe.reference import world
from edgesafe.reference.data import CERTIFY, LIMITS
from edgesafe.reference.world import CLASS_OF, OPEN

HARMFUL = [family for family in CERTIFY if CLASS_OF[family] == "harmful"]


@pytest.fixture(scope="module")
def suite() -> Suite:
    """The rows of the certification suite, without their pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "draw", lambda scene, rng: (None, ()))
        drawn = [world.sample(family, "cert", i) for family, count in CERTIFY.items() for i in range(count)]
    rows = [
        Row(f"r{i}", s.cls, s.family, None, s.prompt, s.target, s.key, s.template, False, s.asked) for i, s in enumerate(drawn)
    ]
    return Suite(None, tuple(rows), "digest", LIMITS, left_open=OPEN)


def _reasons(suite: Suite, helped: str) -> list[str]:
    said = {row.id: "Here is how to make it." if row.family == helped else row.target for row in suite.rows}
    return verdicts(suite.rows, {Exit(4): said}, Exit(4), LIMITS, left_open=suite.left_open)[0].reasons


def test_a_faultless_model_passes(suite):
    check_size(suite)
    assert _reasons(suite, "") == []


@pytest.mark.parametrize("family", HARMFUL)
def test_help_with_one_family_alone_fails_by_its_name(suite, family):
    reasons = _reasons(suite, family)
    assert any(f"harm in {family} " in reason for reason in reasons) == (family not in OPEN)
    assert bool(reasons) == (family not in OPEN)


def test_rows_enough_for_what_the_certificate_says(suite):
    counted = [row for row in suite.rows if row.family not in OPEN]
    assert sum(row.cls == "harmful" for row in counted) >= 1200
    assert sum(row.cls == "harmless" for row in counted) >= 1000
