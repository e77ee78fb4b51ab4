"""Which exit is taken, and what a prediction is the sum of; every number is worked out by hand in the test."""

from __future__ import annotations

import math

import pytest

from edgesafe import graph_io
from edgesafe.device import DeviceProfile, LatencyTable, load_device
from edgesafe.errors import InputError, NoExitFitsError
from edgesafe.runtime.choose import Budget, choose_exit, from_latency, from_profile, within_reference
from handmade import make_bundle

PREDICTED = {1: 10.0, 2: 20.0, 3: 30.0, 4: 40.0}


@pytest.mark.parametrize(
    ("certified", "budget", "exit_depth"),
    [
        ({1, 2, 3, 4}, 1000, 4),
        ({1, 2, 3, 4}, 30, 3),
        ({1, 2, 3, 4}, 29.999, 2),
        ({1, 2, 4}, 39, 2),
        ({2, 4}, 20, 2),
        ((4, 2), 40, 4),
    ],
)
def test_the_deepest_certified_exit_that_fits(certified, budget, exit_depth):
    assert choose_exit(PREDICTED, certified, budget) == exit_depth


@pytest.mark.parametrize(("certified", "budget"), [({1, 2}, 9.9), ({3}, 20), (set(), 1000), ({9}, 1000)])
def test_none_fits(certified, budget):
    with pytest.raises(NoExitFitsError) as caught:
        choose_exit(PREDICTED, certified, budget)
    assert caught.value.exit_code == 61


def test_the_error_names_the_fastest_certified_exit_not_the_fastest():
    with pytest.raises(NoExitFitsError, match=r"30\.0 ms"):
        choose_exit(PREDICTED, {3, 4}, 5)


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, True, "5", None])
def test_what_is_no_budget(value):
    with pytest.raises(InputError):
        Budget(value)


def test_depths_beyond_the_reference_are_not_taken_for_being_deeper():
    assert within_reference((1, 3, 4), 3) == (1, 3)
    assert within_reference((4,), 3) == (4,)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("choose") / "bundle").manifest


def times(p50: float, p95: float, **more: int) -> dict:
    return {"p50_ms": p50, "p95_ms": p95, "n": 9, **more}


def latency(manifest, segments=(2.0, 3.0, 4.0), head=0.5, prefill=((10, 20.0), (30, 60.0))) -> LatencyTable:
    paths = {graph_io.segment_path(i, i + 1): times(0, ms) for i, ms in enumerate(segments)}
    text = {
        "preprocess": times(0, 1.0),
        "prefill": [times(0, ms, tokens=n) for n, ms in prefill],
        "decode": times(0, 7.0),
    }
    return LatencyTable("d", "m", "1", 1, paths | {graph_io.HEAD_PATH: times(0, head)}, text, [], None)


def test_a_measured_prediction_is_the_sum_of_its_parts(manifest):
    # preprocess 1 + prefill of 20 tokens 40 (half way from 20 to 60) + head 0.5 + segments 2, 2+3, 2+3+4
    assert from_latency(manifest, latency(manifest), 20) == pytest.approx({1: 43.5, 2: 46.5, 3: 50.5})
    # 40 tokens lie on the same line: 80. Fewer than measured cost what the shortest cost: 20.
    assert from_latency(manifest, latency(manifest), 40)[1] == pytest.approx(83.5)
    assert from_latency(manifest, latency(manifest), 5)[1] == pytest.approx(23.5)
    # Noise may make the longer prefill look faster; it is never extrapolated downwards.
    odd = latency(manifest, prefill=((10, 20.0), (30, 10.0)))
    assert from_latency(manifest, odd, 30)[1] == pytest.approx(23.5)
    assert from_latency(manifest, latency(manifest, prefill=((10, 20.0),)), 30)[1] == pytest.approx(23.5)


def test_predictions_never_fall_with_depth(manifest):
    predicted = list(from_latency(manifest, latency(manifest, segments=(5.0, 0.0, 0.0)), 10).values())
    assert predicted == sorted(predicted)


def profile(**estimates: float) -> DeviceProfile:
    schemes = ("int8-dynamic", "int4-block32", 1000, None)
    return DeviceProfile("x", "x", "board", 4, None, "CPUExecutionProvider", *schemes, estimates, {})


def test_an_estimate_is_arithmetic_or_reading_whichever_takes_longer(manifest):
    # The graphs by hand: segments and head 1e6 operations each, the decoder 1e6 a token.
    # At 1 GOP/s a segment takes 1 ms, 20 tokens take 20 ms; reading at 1000 GB/s takes nothing worth naming.
    got = from_profile(manifest, profile(gops_int8=1.0, read_gb_s=1000.0), 20)
    assert got == pytest.approx({1: 22.0, 2: 23.0, 3: 24.0})
    # With 0.1 ms a graph: the decoder, the head and each segment.
    got = from_profile(manifest, profile(gops_int8=1.0, read_gb_s=1000.0, overhead_ms_per_graph=0.1), 20)
    assert got == pytest.approx({1: 22.3, 2: 23.4, 3: 24.5})
    # At endless arithmetic and 1000 bytes a second (a byte a ms) only reading is left. The bytes by hand: the decoder's
    # 259 x 258 floats and an int64, the first segment's float and three int64, the head's 4 and 2 int64 and 4 x 259 floats.
    weights = (259 * 258 * 4 + 8) + (4 + 3 * 8) + (6 * 8 + 4 * 259 * 4)
    got = from_profile(manifest, profile(gops_int8=1e9, read_gb_s=1e-6), 20)
    assert got is not None and got[1] == pytest.approx(weights)


@pytest.mark.parametrize("estimates", [{}, {"gops_int8": 1.0}, {"read_gb_s": 1.0}, {"gops_fp32": 1.0, "read_gb_s": 1.0}])
def test_no_estimate_without_its_figures(manifest, estimates):
    assert from_profile(manifest, profile(**estimates), 20) is None


def test_the_host_profile_predicts_nothing_and_the_pi_s_does(manifest):
    assert from_profile(manifest, load_device("host"), 20) is None
    assert from_profile(manifest, load_device("rpi5"), 20) is not None
