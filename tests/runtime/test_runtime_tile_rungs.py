"""Exits with fewer tiles, on disk and run: what a manifest may say, asked for, capped, chosen by the clock and listed."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from edgesafe import Budget, Session
from edgesafe.certify.ask import check_prompts
from edgesafe.certify.ladder import read_ladder
from edgesafe.errors import BundleError, InputError, NoExitFitsError
from edgesafe.format.bundle import Bundle, write_manifest
from edgesafe.format.exits import Exit, parse_exits
from edgesafe.format.manifest import Manifest
from edgesafe.format.tiles import at_most, caps, most_tiles
from edgesafe.runtime import measure
from edgesafe.runtime.deadline import Course
from edgesafe.runtime.forecast import DECODE, PREFILL, PREPROCESS, Forecast
from edgesafe.runtime.ort import OrtGraph
from edgesafe.serve.page import facts
from handmade import ANSWER, CANVAS, GRID, SIDE, make_bundle
from mutants import wrong
from rungs import with_rungs

# Cut into 2 x 2 tiles and the whole picture: 5 tiles of 4 tokens. At an exit of one tile, 4 tokens.
BLACK = np.zeros((8, 8, 3), np.uint8)
LADDER = ("1x1", "1", "2x1", "2", "3x1", "3")
# A block and the head take 10 ms a tile, the prefill of a long prompt 100 and of a short one 20.
TIMES = {PREPROCESS: 0.0, PREFILL: 20.0, DECODE: 1.0}


@pytest.fixture
def root(tmp_path):
    root = make_bundle(tmp_path / "b", tiles=GRID).root
    with_rungs(root, *LADDER, certified=LADDER)
    return root


def test_an_exit_with_fewer_tiles_is_asked_for(root):
    with Session.open(root, threads=1) as session:
        read = {}
        for exit in ("3", "3x1"):
            talk = session.conversation(BLACK, exit=exit)
            answer = talk.ask("what?")
            assert (answer.text, str(answer.exit), answer.certified, answer.why) == (ANSWER, exit, True, "asked for")
            assert talk.ask("what?").text == ANSWER and str(talk.exit) == exit
            read[exit] = talk.reused_tokens
        # Four tiles of four tokens less, each with "RC" in front, one row end and another, and "a" for "w".
        assert read["3"] - read["3x1"] == 4 * (4 + 2) + 2
        features = session.vision_states(BLACK, LADDER)
        assert {str(exit): len(one) for exit, one in features.items()} == {e: 4 if "x" in e else 20 for e in LADDER}
        with pytest.raises(InputError, match="no exit 3x5"):
            session.ask(BLACK, "what?", exit="3x5")


def test_image_tokens_are_capped_by_tiles(root):
    with Session.open(root, threads=1) as session:
        assert session.ask(BLACK, "what?").exit == session.ask(BLACK, "what?", max_image_tokens=20).exit == Exit(3)
        answer = session.ask(BLACK, "what?", max_image_tokens=19)
        assert (str(answer.exit), answer.why) == ("3x1", "the largest certified")
        for options in ({"max_image_tokens": 3}, {"max_image_tokens": 19, "exit": 3}):
            with pytest.raises(InputError, match="the picture takes (4|20) image tokens"):
                session.ask(BLACK, "what?", **options)


def predicted(session):
    """Every stage's time as `TIMES` says, the vision's by the tile."""
    paths = {path: 10.0 for spec in session.manifest.exits for path in spec.graphs}

    def predict(tokens: int, tiles: int = 1) -> Forecast:
        times = TIMES | paths | ({PREFILL: 100.0} if tokens > 40 else {})
        return Forecast({stage: (ms,) for stage, ms in times.items()}, "measured").tiled(tiles)

    return predict


# In ms, d + 1 graphs of 10 ms a tile: 1x1 40, 2x1 50, 3x1 60, and of 5 tiles 1 200, 2 250, 3 300.
BUDGETS = [(301, "3", 5), (299, "2", 5), (201, "1", 5), (199, "3x1", 1), (59, "2x1", 1), (41, "1x1", 1)]


@pytest.mark.parametrize(("budget_ms", "exit", "tiles"), BUDGETS)
def test_a_budget_settles_the_tiles_before_the_tower_runs(root, monkeypatch, budget_ms, exit, tiles):
    with Session.open(root, threads=1) as session:
        monkeypatch.setattr(session, "predict", predicted(session))
        monkeypatch.setattr(session, "clock", lambda: 0.0)  # nothing takes any time, so the deepest of the tiles is reached
        seen, joined = [], session.joined
        monkeypatch.setattr(session, "joined", lambda state, cut: seen.append((len(state), cut.tiles)) or joined(state, cut))
        answer = session.ask(BLACK, "what?", Budget(budget_ms))
        assert str(answer.planned_exit) == exit and answer.exit.tiles == Exit.parse(exit).tiles and seen == [(tiles, tiles)]
        graphs = session.manifest.exit(answer.exit).graphs
        assert [answer.predicted_ms[path] for path in graphs] == [10.0 * tiles] * len(graphs)
        with pytest.raises(NoExitFitsError):
            session.ask(BLACK, "what?", Budget(39))
        answer = session.ask(BLACK, "what?", Budget(39, on_miss="shallowest"))
        assert answer.why and answer.planned_exit == Exit(1, tiles=1)


def test_a_picture_that_is_too_large_for_the_context_is_seen_by_an_exit_with_fewer_tiles(root, monkeypatch):
    with Session.open(root, threads=1) as session:
        talk = session.conversation(BLACK, exit=3)
        talk.ask("what?")
    made = Bundle.open(root).manifest
    write_manifest(root, replace(made, text=replace(made.text, context_length=talk.prompt_tokens)))
    with_rungs(root, *LADDER, certified=LADDER)
    with Session.open(root, threads=1) as session:
        monkeypatch.setattr(session, "predict", predicted(session))
        answer = session.ask(BLACK, "what?", Budget(1000))
        assert (answer.text, str(answer.exit), str(answer.planned_exit)) == (ANSWER, "3x1", "3x1")
        assert session.ask(BLACK, "what?", exit="2x1").text == ANSWER
        for options in ({"budget": Budget(1000)}, {}):
            with pytest.raises(InputError, match="the prompt takes"):
                session.ask(BLACK, "what?" * (1 if not options else 20), **options)
    assert len(read_ladder(root).rungs) == len(LADDER)


def test_a_row_that_is_too_long_once_its_picture_is_cut_is_refused_before_any_is_asked(root):
    rows = [SimpleNamespace(id=name, image="a.png", prompt=prompt) for name, prompt in (("short", "q"), ("long", "q" * 39))]
    suite = SimpleNamespace(image_path=lambda row: Image.fromarray(BLACK))
    with Session.open(root, threads=1) as session:
        check_prompts(session, suite, rows, [Exit(3, tiles=1)])
        with pytest.raises(InputError, match=r"the prompt takes .* \(row long of the suite\)"):
            check_prompts(session, suite, rows, [Exit(3, tiles=1), Exit(3)])


def test_a_plan_that_forgets_the_tiles_is_seen(root, monkeypatch):
    monkeypatch.setattr(Course, "_forecast", lambda self, _: self.forecast)
    with pytest.raises((AssertionError, NoExitFitsError)):
        test_a_budget_settles_the_tiles_before_the_tower_runs(root, monkeypatch, 199, "3x1", 1)


def test_they_are_measured_and_listed_from_the_dearest_down(root, monkeypatch):
    # Each graph on each tile takes a twentieth of a second more, so that nothing else the machine does decides.
    ran, advance = [], OrtGraph.advance
    monkeypatch.setattr(OrtGraph, "advance", lambda self, state: ran.append(self) or advance(self, state))
    clock = SimpleNamespace(perf_counter=lambda: time.process_time() + len(ran) / 20)
    monkeypatch.setattr(sys.modules["edgesafe.runtime.measure"], "time", clock)
    table = measure(root, threads=1, seconds=0.1)
    assert [row["exit"] for row in table.exits] == list(LADDER)
    told = {row["exit"]: row["ttft_ms"]["p50_ms"] for row in table.exits}
    # One tile was run, and told five times where there are five.
    assert 3 * told["1x1"] < told["1"] and 3 * told["3x1"] < told["3"]
    ladder = read_ladder(root)
    assert [str(rung.exit) for rung in ladder.rungs] == ["3", "2", "1", "3x1", "2x1", "1x1"]
    # A picture of 640 x 480 is as wide as two tiles and as high.
    assert [rung.image_tokens for rung in ladder.rungs] == [20, 20, 20, 4, 4, 4]
    times = {str(rung.exit): rung.ttft_ms for rung in ladder.rungs}
    assert times["3x1"] < times["3"] and times["1x1"] < times["1"]
    with Session.open(root, threads=1) as session:
        shown = facts(session)["exits"]
        assert [one["exit"] for one in shown] == ["1x1", "2x1", "3x1", "1", "2", "3"]
        assert shown[2]["predicted_ms"] < shown[5]["predicted_ms"]


def test_a_manifest_says_what_a_smaller_picture_has(root, tmp_path):
    obj = with_rungs(root, *LADDER).to_dict()
    assert obj["format_version"] == 5 and Manifest.from_dict(obj).to_dict() == obj
    first, *others = obj["exits"]
    for name, changed in {
        "of format 4": {"format_version": 4},
        "as many tiles as there are": {"exits": [*others[:4], {**others[3], "exit": "3x5"}, others[4]]},
        "no such number": {"exits": [{**first, "exit": "1x2"}, *others]},
        "another depth's graphs": {"exits": [{**first, "graphs": others[1]["graphs"]}, *others]},
        "not cut": {"tiles": None},
    }.items():
        with pytest.raises(BundleError, match="exit [13]x"):
            print(name, Manifest.from_dict({**obj, **changed}))
    # A bundle without such exits is as it was.
    assert with_rungs(root, "1", "3").to_dict()["format_version"] == 3


def test_smaller_pictures_by_hand():
    for spec, side, known, most in ((GRID, SIDE, [1], 5), (replace(GRID, longest_edge=25), SIDE, [1, 5, 10], 17)):
        assert caps(spec, side) == known and most_tiles(spec, side) == most
    assert caps(CANVAS, SIDE) == [1, 3] and most_tiles(CANVAS, SIDE) == 5
    assert at_most(CANVAS, SIDE, 3).canvases == ((8, 16), (16, 8)) and at_most(CANVAS, SIDE, 1).canvases == ()
    assert caps(replace(GRID, cut="never"), SIDE) == []
    assert " ".join(map(str, parse_exits("1-2x1,2x10,2", 3))) == "1x1 2x1 2x10 2"
    too_large = wrong(at_most, ("isqrt(tiles - 1)", "isqrt(tiles)"))
    assert too_large(GRID, SIDE, 4) != at_most(GRID, SIDE, 4)
    for text in ("6x", "6x0", "6x1x1", "6@9x1", "x1", "6X1"):
        with pytest.raises(InputError):
            Exit.parse(text)
    with pytest.raises(InputError, match="fewer visual tokens and fewer tiles"):
        Exit(6, 9, 1)
