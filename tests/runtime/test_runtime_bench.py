"""A short slice of `make bench-budget`: that it runs and reckons right. Times are for the bench to report, not asserted."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

import bench.budget as budget
from bench.budget import Run, Watched, bursts, load, oracle_depth, request, run_all, shown, summary, traces, usable_depths
from bench.model import make_bench_bundle
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import read_certificate
from edgesafe.runtime import measure
from mutants import wrong


def test_a_slice_of_the_bench(handmade, copy_of, monkeypatch):
    # Eight questions don't fit the context of the bundle made by hand.
    monkeypatch.setattr(budget, "LONG", f"{budget.SHORT} Why?")
    report = run_all(copy_of(handmade), seconds=0.05, least=2)
    names = [trace.name for trace in traces(1)]
    assert list(report["traces"]) == names and len(names) == 5
    # Depths 1 and 2 of the bundle made by hand are certified.
    assert report["usable_depths"] == (1, 2) and report["certified"]
    for trace in report["traces"].values():
        assert trace["requests"] >= 2
        found = trace["policies"]
        assert set(found) == {"edgesafe", "static", "shallowest", "deepest", "oracle"}
        assert found["shallowest"]["mean_depth"] == 1 and found["deepest"]["mean_depth"] == 2
        assert found["oracle"]["depth_of_oracle"] == 1
        # Whatever the times were, nobody misses fewer than the oracle but one that is never deeper.
        assert found["oracle"]["miss_rate"] <= min(found["static"]["miss_rate"], found["deepest"]["miss_rate"])
    assert all(name in shown(report) for name in names)


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
    assert run.depth == 1 and set(run.true_ms) == {1, 2} and run.true_ms[1] == pytest.approx(run.ttft_ms)
    assert ran == ["vision/blocks_00-01.onnx", "vision/head.onnx", "vision/blocks_01-02.onnx"] and set(ran) < set(graphs)
    assert run.true_ms[2] > run.true_ms[1] and run.static_depth == 1


def test_the_busy_processes_end_with_the_block():
    with load([[(1.0, 0.05)], bursts(1, 1.0)]):
        pass
    spells = bursts(1, 10.0)
    assert spells == bursts(1, 10.0) != bursts(2, 10.0) and {share for share, _ in spells} == {0.0, 1.0}


def test_the_reckoning():
    assert doctest.testmod(budget).failed == 0
    blind = wrong(oracle_depth, ("ms <= run.deadline_ms", "True"))
    assert blind(Run(25.0, 1, 10.0, 1, {1: 10.0, 2: 20.0, 3: 30.0})) == 3
    late = summary([Run(25.0, 3, 30.0, 3, {1: 10.0, 2: 20.0, 3: 30.0})])
    assert late["edgesafe"]["miss_rate"] == late["static"]["miss_rate"] == late["deepest"]["miss_rate"] == 1
    assert late["shallowest"]["miss_rate"] == late["oracle"]["miss_rate"] == 0


def test_the_bench_s_bundle_is_one_that_answers(tmp_path):
    root = make_bench_bundle(tmp_path / "bundle", tokens=6, width=8, text_inner=8)
    assert make_bench_bundle(root) == root and not (tmp_path / "bundle.partial").exists()
    session = Watched(Bundle.open(root), None)
    assert usable_depths(session) == tuple(range(1, 13))
    features = session.vision_states(np.zeros((8, 8, 3), np.uint8), session.manifest.depths)
    # Each block changes the state a little, so that every exit has features of its own, and none grows out of bounds.
    steps = [np.abs(features[d + 1] - features[d]).max() for d in range(1, 12)]
    assert min(steps) > 1e-3 and np.abs(features[12]).max() < 100
