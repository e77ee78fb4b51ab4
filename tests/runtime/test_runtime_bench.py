"""A short slice of `make bench-budget`: that it runs and reckons right. Times are for the bench to report, not asserted."""

from __future__ import annotations

import contextlib
import doctest
import json

import numpy as np
import pytest

import bench.budget as budget
import bench.heat as heat
from bench.budget import Run, Watched, bursts, load, oracle_exit, request, run_all, shown, summary, traces, usable_exits
from bench.model import make_bench_bundle
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import read_certificate
from edgesafe.format.exits import Exit
from edgesafe.runtime import measure
from mutants import wrong


def test_a_slice_of_the_bench(handmade, copy_of, monkeypatch):
    # Eight questions don't fit the context of the bundle made by hand.
    monkeypatch.setattr(budget, "LONG", f"{budget.SHORT} Why?")
    report = run_all(copy_of(handmade), seconds=0.05, least=2)
    names = [trace.name for trace in traces(1)]
    assert list(report["traces"]) == names and len(names) == 5
    # Depths 1 and 2 of the bundle made by hand are certified.
    assert report["exits"] == ["1", "2"] and report["certified"]
    for trace in report["traces"].values():
        assert trace["requests"] >= 2
        found = trace["policies"]
        assert set(found) == {"edgesafe", "static", "shallowest", "deepest", "oracle"}
        assert found["shallowest"]["mean_depth"] == 1 and found["deepest"]["mean_depth"] == 2
        assert found["oracle"]["depth_of_oracle"] == 1
        # Whatever the times were, nobody misses fewer than the oracle but one that is never deeper.
        assert found["oracle"]["miss_rate"] <= min(found["static"]["miss_rate"], found["deepest"]["miss_rate"])
    assert all(name in shown(report) for name in names)


@pytest.mark.parametrize("ramp", heat.RAMPS)
def test_ten_minutes_of_growing_heat_keep_the_budget_and_without_learning_they_do_not(ramp):
    found = heat.summary(heat.requests(ramp, seed=1))
    assert found["requests"] > 200 and found["oracle_miss_rate"] == 0
    assert found["miss_rate"] <= 0.05 and found["depth_of_oracle"] > 0.95
    assert heat.summary(heat.requests(ramp, seed=1, learning=False))["miss_rate"] > 0.5


def test_a_run_knows_its_true_time_at_every_depth(handmade, copy_of):
    root = copy_of(handmade)
    measure(root, seconds=0.1)
    bundle = Bundle.open(root)
    session = Watched(bundle, read_certificate(bundle))
    ran: list[str] = []
    graphs = {path: session.graph(path) for path in session.manifest.graphs}
    session.run_vision_graph = lambda path, state: ran.append(path) or Watched.run_vision_graph(session, path, state)
    # With no time at all the first exit is taken; what it left out of the second is run afterwards, each graph once.
    run = request(session, np.zeros((8, 8, 3), np.uint8), "what?", 1e-6)
    assert run.exit == Exit(1) and set(run.true_ms) == {Exit(1), Exit(2)} and run.true_ms[Exit(1)] == pytest.approx(run.ttft_ms)
    assert ran == ["vision/blocks_00-01.onnx", "vision/head.onnx", "vision/blocks_01-02.onnx"] and set(ran) < set(graphs)
    assert run.true_ms[Exit(2)] > run.true_ms[Exit(1)] and run.static_exit == Exit(1)


@pytest.fixture
def started(monkeypatch):
    """The processes that the bench starts, which end with the test whatever happens."""
    made, popen = [], budget.subprocess.Popen
    monkeypatch.setattr(budget.subprocess, "Popen", lambda *words: made.append(popen(*words)) or made[-1])
    yield made
    for process in made:
        process.kill()
        process.wait()


def processes_end_with_the_block(loaded, started):
    """They run inside of it, one for each schedule, and none does after it, however it ended."""
    schedules = [[(1.0, 0.05)], bursts(1, 1.0)]
    for error in (None, KeyError):
        del started[:]
        with pytest.raises(KeyError) if error else contextlib.nullcontext(), loaded(schedules):
            assert [process.poll() for process in started] == [None, None]
            assert [json.loads(process.args[-1]) for process in started] == [[[*s] for s in spells] for spells in schedules]
            if error:
                raise error
        assert None not in [process.returncode for process in started]


def test_the_busy_processes_end_with_the_block(started):
    processes_end_with_the_block(load, started)


@pytest.mark.parametrize(
    "edit",
    [
        ("process.kill()\n            process.wait()", "pass"),
        ("finally:", "except ZeroDivisionError:"),
        ("for i, schedule in enumerate(schedules)", "for i, schedule in enumerate(schedules[:1])"),
    ],
    ids=["left running", "only where nothing is raised", "one of two"],
)
def test_that_check_fails_where_they_go_on(started, edit):
    with pytest.raises(AssertionError):
        processes_end_with_the_block(wrong(load, edit), started)


def test_bursts_are_those_of_their_seed():
    spells = bursts(1, 10.0)
    assert spells == bursts(1, 10.0) != bursts(2, 10.0) and {share for share, _ in spells} == {0.0, 1.0}


def test_the_reckoning():
    assert doctest.testmod(budget).failed == 0
    blind = wrong(oracle_exit, ("ms <= run.deadline_ms", "True"))
    times = {Exit(1): 10.0, Exit(2): 20.0, Exit(3): 30.0}
    assert blind(Run(25.0, Exit(1), 10.0, Exit(1), times)) == Exit(3)
    late = summary([Run(25.0, Exit(3), 30.0, Exit(3), times)])
    assert late["edgesafe"]["miss_rate"] == late["static"]["miss_rate"] == late["deepest"]["miss_rate"] == 1
    assert late["shallowest"]["miss_rate"] == late["oracle"]["miss_rate"] == 0


def test_the_bench_s_bundle_is_one_that_answers(tmp_path):
    root = make_bench_bundle(tmp_path / "bundle", tokens=6, width=8, text_inner=8)
    assert make_bench_bundle(root) == root and not (tmp_path / "bundle.partial").exists()
    session = Watched(Bundle.open(root), None)
    assert usable_exits(session) == tuple(map(Exit, range(1, 13)))
    features = session.vision_states(np.zeros((8, 8, 3), np.uint8), session.manifest.ladder)
    # Each block changes the state a little, so that every exit has features of its own, and none grows out of bounds.
    steps = [np.abs(features[Exit(d + 1)] - features[Exit(d)]).max() for d in range(1, 12)]
    assert min(steps) > 1e-3 and np.abs(features[Exit(12)]).max() < 100
