"""A short slice of `make bench-budget`: that it runs and reckons right. Times are for the bench to report, not asserted."""

from __future__ import annotations

import contextlib
import doctest
import json
import shutil

import numpy as np
import pytest

import bench.budget as budget
import bench.heat as heat
from bench import model
from bench.budget import (
    Run,
    Watched,
    bursts,
    figures,
    load,
    oracle_exit,
    request,
    run_all,
    sessions,
    shown,
    summary,
    traces,
    usable_exits,
)
from bench.model import RUNGS, Shape, accuracy, make_bench_bundle
from edgesafe.errors import BundleError
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import read_certificate
from edgesafe.format.exits import Exit
from edgesafe.runtime import measure
from edgesafe.runtime.forecast import PREFILL
from mutants import wrong
from rungs import ONE, with_rungs


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
    run = request(session, None, np.zeros((8, 8, 3), np.uint8), "what?", 1e-6)
    assert run.exit == Exit(1) and set(run.true_ms) == {Exit(1), Exit(2)} and run.true_ms[Exit(1)] == pytest.approx(run.ttft_ms)
    assert ran == ["vision/blocks_00-01.onnx", "vision/head.onnx", "vision/blocks_01-02.onnx"] and set(ran) < set(graphs)
    assert run.true_ms[Exit(2)] > run.true_ms[Exit(1)] and run.static_exit == Exit(1)


LADDER = ("1@1", "1", "2@1", "2", "3@1", "3")
BLACK = np.zeros((8, 8, 3), np.uint8)


def true_times(root, exit, monkeypatch, asked=request):
    """A run that took this exit, its answer, and what was run afterwards, each of which is said to take 7 ms."""
    session, depths = sessions(bundle := Bundle.open(root), read_certificate(bundle))
    answers, prompts, after = [], [], []
    ask, tokens = session.ask, session.tokens
    session.ask = lambda image, prompt, _, **rest: answers.append(ask(image, prompt, exit=exit, **rest)) or answers[-1]
    session.tokens = lambda features, ids, limit: prompts.append(len(ids)) or tokens(features, ids, limit)
    monkeypatch.setattr(budget, "timed", lambda job: after.append(job()) or 7.0)
    run = asked(session, depths, BLACK, "what?", 1e6)
    assert [spec.exit for spec in depths.manifest.exits] == [Exit(d) for d in (1, 2, 3)] and run.depths[0].whole
    assert depths.graph(ONE) is session.graph(ONE)  # one copy of everything
    return run, answers[0], prompts, len(after)


def true_times_by_hand(root, monkeypatch, asked=request):
    run, answer, prompts, after = true_times(root, "1@1", monkeypatch, asked)
    assert (
        run.exit == Exit(1, 1)
        and run.depths[0] == Exit(3)
        and set(run.true_ms) == set(map(Exit.parse, ("1@1", "2", "3@1", "3")))
    )
    ms, times = answer.actual_ms, {exit: t - answer.ttft_ms for exit, t in run.true_ms.items()}
    assert times[Exit(1, 1)] == 0 and after == 3 and len(prompts) == 1  # blocks 2 and 3, and one prompt of all 4 tokens
    assert times[Exit(3, 1)] == pytest.approx(14) and times[Exit(2)] == pytest.approx(14 - ms[ONE] - ms[PREFILL])
    assert times[Exit(3)] == pytest.approx(21 - ms[ONE] - ms[PREFILL])
    # Of the reference the graph that leaves tokens out is left out, and the prompt with one.
    run, answer, prompts, after = true_times(root, "3", monkeypatch, asked)
    assert run.exit == Exit(3) and after == 2
    assert run.true_ms[Exit(3, 1)] == pytest.approx(answer.ttft_ms + 14 - answer.actual_ms[PREFILL])


@pytest.fixture(scope="module")
def rungs(handmade, tmp_path_factory):
    root = shutil.copytree(handmade, tmp_path_factory.mktemp("rungs") / "bundle")
    with_rungs(root, *LADDER, certified=("1@1", "2", "3@1", "3"))
    measure(root, threads=1, seconds=0.1)
    return root


def test_the_true_time_of_an_exit_that_reads_fewer_tokens_is_known(rungs, monkeypatch):
    true_times_by_hand(rungs, monkeypatch)


@pytest.mark.parametrize(
    "edit",
    [
        ("+ prefill_ms[exit.fewer]", ""),
        ("ids_at(ids, manifest, exit)", "ids"),
        ("- needed_ms(answer.exit)", ""),
    ],
    ids=["every prefill alike", "the whole prompt", "what was taken is counted twice"],
)
def test_that_check_fails_where_the_prefill_is_reckoned_wrong(rungs, monkeypatch, edit):
    with pytest.raises((AssertionError, BundleError)):
        true_times_by_hand(rungs, monkeypatch, wrong(request, edit))


def test_a_slice_of_the_bench_with_rungs(rungs, monkeypatch):
    monkeypatch.setattr(budget, "LONG", f"{budget.SHORT} Why?")
    # In the certificate made by hand no exit is ever right, and there would be nothing to divide by.
    monkeypatch.setattr(budget, "accuracies", lambda session: {one.exit: 0.5 for one in session.certificate.exits})
    report = run_all(rungs, seconds=0.05, least=4)
    assert report["accuracy_from"] == "its certificate" and report["deadlines"] == (0.1, 1.4)
    assert report["accuracy"] == {"1@1": 0.5, "3@1": 0.5, "2": 0.5, "3": 0.5}
    for trace in report["traces"].values():
        assert trace["requests"] >= 4 and trace["too_short"] <= trace["requests"]
        if found := trace["policies"]:  # on a busy machine none of these short deadlines may be one that an exit keeps
            assert set(found) == {"edgesafe", "depths", "static", "shallowest", "deepest", "oracle"}
            assert found["oracle"]["miss_rate"] == 0


def test_a_deadline_that_no_exit_keeps_is_counted_apart():
    right = {Exit(1, 1): 0.5, Exit(1): 0.4, Exit(2): 0.8}
    times = {Exit(1, 1): 10.0, Exit(1): 20.0, Exit(2): 30.0}
    # In 25 ms exit 1@1 is right more often than the deeper exit 1 would be; depth alone takes exit 1.
    made = [Run(deadline_ms, Exit(1), 20.0, Exit(2), times, (Exit(1), 21.0)) for deadline_ms in (25.0, 5.0)]
    found = figures(made, right)
    assert (found["requests"], found["too_short"]) == (2, 1)
    assert found["policies"]["oracle"] == {"miss_rate": 0.0, "mean_accuracy": 0.5, "accuracy_of_oracle": 1.0}
    assert found["policies"]["edgesafe"] == {"miss_rate": 0.0, "mean_accuracy": 0.4, "accuracy_of_oracle": 0.8}
    assert found["policies"]["depths"] == found["policies"]["edgesafe"] and found["policies"]["static"]["miss_rate"] == 1
    assert figures(made[1:], right) == {"requests": 1, "too_short": 1, "policies": {}}
    text = shown({"accuracy": right, "accuracy_from": "by hand", "traces": {"quiet": found}})
    assert "accuracy: by hand" in text and "quiet: 1 more with a deadline shorter than any exit's time" in text
    everything = wrong(figures, ("min(run.true_ms.values()) <= run.deadline_ms", "True"))
    assert everything(made, right)["policies"]["oracle"]["miss_rate"] == 0.5


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
    root = make_bench_bundle(tmp_path / "bundle", Shape(6, 8, 8, 8))
    assert make_bench_bundle(root) == root and not (tmp_path / "bundle.partial").exists()
    session = Watched(Bundle.open(root), None)
    assert usable_exits(session) == tuple(map(Exit, range(1, 13)))
    features = session.vision_states(np.zeros((8, 8, 3), np.uint8), session.manifest.ladder)
    # Each block changes the state a little, so that every exit has features of its own, and none grows out of bounds.
    steps = [np.abs(features[Exit(d + 1)] - features[Exit(d)]).max() for d in range(1, 12)]
    assert min(steps) > 1e-3 and np.abs(features[Exit(12)]).max() < 100


def test_the_bench_s_rungs_are_rungs(tmp_path):
    root = make_bench_bundle(tmp_path / "bundle", Shape(36, 8, 8, 8, 36, "2,12,1-2@9,12@1", 128))
    session = Watched(Bundle.open(root), None)
    features = session.vision_states(np.zeros((8, 8, 3), np.uint8), session.manifest.ladder)
    squares = features[Exit(2)].reshape(3, 2, 3, 2, -1)  # 6 x 6 tokens as 3 x 3 squares of 2 x 2
    assert features[Exit(2, 9)] == pytest.approx(squares.mean((1, 3)).reshape(9, -1), abs=1e-5)
    assert doctest.testmod(model).failed == 0
    # Whoever takes the dearest that fits takes one that is right as often as any that costs less, within a point.
    shares = [accuracy(exit) for exit in Bundle.open(make_bench_bundle(tmp_path / "rungs", RUNGS)).manifest.by_cost]
    assert all(after > before - 0.01 for before, after in zip(shares, shares[1:], strict=False)) and len(shares) == 18
