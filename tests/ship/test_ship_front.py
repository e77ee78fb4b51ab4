"""The exits that `ship` exports where nobody names any: those that no faster one equals on the settings' validation suite."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from edgesafe import ship as ship_module
from edgesafe.align.config import parse_config, shipped_exits
from edgesafe.device import load_device
from edgesafe.errors import ConfigError, InputError
from edgesafe.ship import ship
from edgesafe.ship_plan.plan import plan_ship

TRAINED = "1-4,2@4,3@9"  # of the tiny model, whose depths are 1 to 4 and whose reference is 3
RIGHT = {"1": 0.2, "2@4": 0.1, "2": 0.6, "3@9": 0.5, "3": 0.7, "4": 0.7}


class Stop(Exception):
    """Nothing is exported here."""


@pytest.fixture
def run(tmp_path, tiny_llava, monkeypatch):
    """Runs `ship` up to its export: which exits were evaluated before and after alignment, and which would be exported."""
    asked: list = []
    (tmp_path / "aligned").mkdir()
    (tmp_path / "aligned" / "edgesafe.json").write_text(json.dumps({"exits": [*"1234", "2@4", "3@9"]}))
    (tmp_path / "val").mkdir()

    def evaluate(model, suite, out, exits):
        asked.append(("after", model.name, suite.name, exits))
        out.mkdir(parents=True)
        rates = [{"exit": exit, "accuracy": {"rate": rate, "n": 10}} for exit, rate in RIGHT.items()]
        (out / "report.json").write_text(json.dumps({"split": "val", "exits": rates}))

    def shared_steps(model, work, *, exits, **_):
        asked.append(("before", exits))
        return SimpleNamespace(aligned=tmp_path / "aligned", suite=tmp_path / "suite")

    def bundle(*words):
        asked.append(("export", words[-1]))
        raise Stop

    monkeypatch.setattr("edgesafe.evaluate.evaluate.evaluate", evaluate)
    monkeypatch.setattr(ship_module, "shared_steps", shared_steps)
    rows = [SimpleNamespace(cls="harmful"), SimpleNamespace(cls="task")]
    suites = {"val": SimpleNamespace(split="val", rows=rows), "harm": SimpleNamespace(split="val", rows=rows[:1])}
    suites |= {"cert": SimpleNamespace(split="cert", rows=rows)}
    monkeypatch.setattr(ship_module, "read_suite", lambda folder: suites[folder.name])
    monkeypatch.setattr(ship_module, "_bundle", bundle)

    rpi5 = load_device("rpi5")  # slowed down, for the tiny model's times are rounded to nothing
    slow = replace(rpi5, estimates={name: figure / 1e6 for name, figure in rpi5.estimates.items()})

    def run(settings: str, **options) -> list:
        asked.clear()
        (tmp_path / "c.toml").write_text(settings)
        with pytest.raises(Stop):
            ship(tiny_llava, slow, tmp_path / "out", config=tmp_path / "c.toml", **options)
        return list(asked)

    run.asked = asked
    return run


def test_the_trained_exits_that_no_faster_one_equals_are_exported(run, tmp_path):
    settings = f'[exits]\ntrain = "{TRAINED}"\n[eval]\nsuite = "{tmp_path / "val"}"\n'
    before, after, export = run(settings)
    assert before == ("before", TRAINED) and after[:3] == ("after", "aligned", "val")
    assert set(after[3].split(",")) == set(RIGHT)
    # By time: 2@4, 3@9, 1, 2, 3, 4, for the tiny model's prompt is dearer than its blocks. 4 is no better than 3.
    assert export == ("export", "2@4,2,3@9,3")
    assert run(settings) == [before, export]  # the evaluation is kept


def test_named_exits_come_first_and_without_a_suite_the_trained_ones_ship(run, tmp_path):
    suite = f'[eval]\nsuite = "{tmp_path / "val"}"\n'
    assert run(f'[exits]\ntrain = "{TRAINED}"\n') == [("before", TRAINED), ("export", TRAINED)]
    assert run(f'[exits]\ntrain = "{TRAINED}"\n{suite}', exits="2@4") == [("before", "2@4"), ("export", "2@4")]
    ladder = f'[exits]\ntrain = "{TRAINED}"\nladder = "1,3@9"\n{suite}'
    assert run(ladder) == [("before", "1,3@9"), ("export", "1,3@9")]
    assert run(f'[exits]\ntrain = "1,2"\n{suite}') == [("before", None), ("export", None)]  # depths alone: as ever


@pytest.mark.parametrize(
    ("exits", "said"),
    [("3,all@9", "not trained: 1@9, 2@9, 4@9 \\(--exits\\)"), ("9", "must lie within 1..4"), ("3@5", "36 visual tokens")],
)
def test_exits_that_can_t_ship_are_refused_before_the_work(run, tmp_path, tiny_llava, exits, said):
    (tmp_path / "c.toml").write_text(f'[exits]\ntrain = "{TRAINED}"\n')
    with pytest.raises(ConfigError, match=said):
        ship(tiny_llava, load_device("rpi5"), tmp_path / "out", config=tmp_path / "c.toml", exits=exits)
    assert run.asked == []
    with pytest.raises(ConfigError, match=said):
        plan_ship(str(tiny_llava), load_device("rpi5"), tmp_path / "out", config=tmp_path / "c.toml", exits=exits)


@pytest.mark.parametrize(
    ("suite", "device", "said"),
    [
        ("val", replace(load_device("rpi5"), estimates={}), "no time is predicted"),
        ("cert", load_device("rpi5"), "of the split 'cert'"),
        ("harm", load_device("rpi5"), "no accuracy"),
    ],
)
def test_what_can_t_choose_exits_is_refused_before_the_work(run, tmp_path, tiny_llava, suite, device, said):
    (tmp_path / "c.toml").write_text(f'[exits]\ntrain = "{TRAINED}"\n[eval]\nsuite = "{tmp_path / suite}"\n')
    with pytest.raises(InputError, match=said):
        ship(tiny_llava, device, tmp_path / "out", config=tmp_path / "c.toml")
    assert run.asked == []


def test_a_plan_knows_that_a_validation_suite_thins_many_exits(tmp_path, tiny_llava, rows):
    """20 exits with fewer tokens are too many for a bundle, unless some are chosen, which takes its time."""
    words, settings = (str(tiny_llava), load_device("rpi5"), tmp_path / "out"), tmp_path / "c.toml"
    settings.write_text("[exits]\ntokens = [25, 16, 9, 4]\n")
    with pytest.raises(ConfigError, match="at most 12"):
        plan_ship(*words, config=settings)
    settings.write_text(f'[exits]\ntokens = [25, 16, 9, 4]\n[eval]\nsuite = "{rows}"\n')
    steps = {step.name: step for step in plan_ship(*words, config=settings, data=rows).steps}
    assert steps["choose"].what.startswith("48 rows at 20 exits") and steps["choose"].seconds > 0
    named = plan_ship(*words, config=settings, data=rows, exits="1,2@9").steps
    assert "choose" not in {step.name for step in named}


def test_what_the_settings_ship():
    assert shipped_exits(parse_config({}, "here")) is None
    assert shipped_exits(parse_config({"exits": {"train": "all", "tokens": [4]}}, "here")) == "all,all@4"
    assert shipped_exits(parse_config({"exits": {"train": "1,2@4", "ladder": "1"}}, "here")) == "1"
