"""Which exit is taken, and what a prediction is the sum of; every number is worked out by hand in the test."""

from __future__ import annotations

import math

import pytest

from edgesafe.device import DeviceProfile, load_device
from edgesafe.errors import InputError, NoExitFitsError
from edgesafe.format import graph_io
from edgesafe.format.exits import Exit
from edgesafe.format.latency import LatencyTable, stage_times
from edgesafe.format.specs import GraphSpec
from edgesafe.runtime.calibrate import Correction
from edgesafe.runtime.choose import Budget, choose_exit, within_reference
from edgesafe.runtime.forecast import PREFILL, PREPROCESS, Work, decoder_work, from_latency, from_profile, work_ms
from handmade import make_bundle

PREDICTED = {Exit(1): 10.0, Exit(2): 20.0, Exit(3): 30.0, Exit(4): 40.0}


def exits(*depths: int) -> tuple[Exit, ...]:
    return tuple(map(Exit, depths))


@pytest.mark.parametrize(
    ("certified", "budget", "depth"),
    [
        ({1, 2, 3, 4}, 1000, 4),
        ({1, 2, 3, 4}, 30, 3),
        ({1, 2, 3, 4}, 29.999, 2),
        ({1, 2, 4}, 39, 2),
        ({2, 4}, 20, 2),
        ((4, 2), 40, 4),
    ],
)
def test_the_deepest_certified_exit_that_fits(certified, budget, depth):
    assert choose_exit(PREDICTED, exits(*certified), budget) == Exit(depth)


@pytest.mark.parametrize(("certified", "budget"), [({1, 2}, 9.9), ({3}, 20), (set(), 1000), ({9}, 1000)])
def test_none_fits(certified, budget):
    with pytest.raises(NoExitFitsError) as caught:
        choose_exit(PREDICTED, exits(*certified), budget)
    assert caught.value.exit_code == 61


def test_the_error_names_the_fastest_certified_exit_not_the_fastest():
    with pytest.raises(NoExitFitsError, match=r"30\.0 ms"):
        choose_exit(PREDICTED, exits(3, 4), 5)


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, True, "5"])
def test_what_is_no_budget(value):
    for name in ("ttft_ms", "total_ms"):
        with pytest.raises(InputError, match=name):
            Budget(**{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_new_tokens": 5},
        *({"ttft_ms": 1, "quantile": q} for q in (0, 1, 95, -0.5, math.nan, None)),
        *({"ttft_ms": 1, "max_new_tokens": n} for n in (0, 1.5, True)),
        {"ttft_ms": 1, "on_miss": "deepest"},
        {"ttft_ms": 1, "require_measured": "yes"},
    ],
    ids=str,
)
def test_what_else_is_no_budget(options):
    with pytest.raises(InputError):
        Budget(**options)


def test_of_two_exits_of_one_depth_the_one_with_more_tokens_is_the_deeper():
    times = {Exit(2): 30.0, Exit(2, 9): 20.0, Exit(1): 10.0}
    assert [choose_exit(times, times, ms) for ms in (30, 29.9, 19.9)] == [Exit(2), Exit(2, 9), Exit(1)]


def test_exits_beyond_the_reference_are_not_taken_for_being_deeper():
    assert within_reference(exits(4, 1, 3), Exit(3)) == exits(1, 3)
    assert within_reference(exits(4), Exit(3)) == exits(4)
    # 11 comes after 3 as a number, and before it as a text.
    assert within_reference(exits(3, 11), Exit(3)) == exits(3)
    assert within_reference((Exit(3, 9), Exit(4, 9)), Exit(3)) == (Exit(3, 9),)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("choose") / "bundle").manifest


def latency(segments=(2.0, 3.0, 4.0), head=0.5, prefill=((10, 20.0), (30, 60.0))) -> LatencyTable:
    """Each stage in two rounds, the second three times as slow as the first; the medians are the figures given."""

    def times(ms: float, **more: int) -> dict:
        return stage_times([ms / 2, 3 * ms / 2]) | more

    paths = {graph_io.segment_path(i, i + 1): times(ms) for i, ms in enumerate(segments)}
    text = {
        "preprocess": [times(1.0, pixels=100, encoded=False)],
        "prefill": [times(ms, tokens=n) for n, ms in prefill],
        "decode": [times(7.0, context=10), times(9.0, context=30)],
    }
    return LatencyTable("d", "m", "onnxruntime", "1", 1, paths | {graph_io.HEAD_PATH: times(head)}, text, [], None)


def exit_stages(manifest, depth: int) -> tuple[str, ...]:
    return (PREPROCESS, *manifest.exit(Exit(depth)).graphs, PREFILL)


def test_a_measured_prediction_is_the_sum_of_its_parts(manifest):
    # preprocess 1 + prefill of 20 tokens 40 (half way from 20 to 60) + head 0.5 + segments 2, 2+3, 2+3+4
    made = from_latency(manifest, latency(), 20)
    assert [made.expected_ms(exit_stages(manifest, d)) for d in (1, 2, 3)] == pytest.approx([43.5, 46.5, 50.5])
    # Both rounds are known: the sum of the slow one is 1.5 times that of the medians, and half way lies between.
    assert made.quantile_ms(exit_stages(manifest, 1), 1.0) == pytest.approx(1.5 * 43.5)
    assert made.quantile_ms(exit_stages(manifest, 1), 0.75) == pytest.approx(1.25 * 43.5)
    # Twice as slow as measured, and the prefill three times.
    slow = Correction(2.0, {PREFILL: 1.5})
    assert made.expected_ms(exit_stages(manifest, 1), slow) == pytest.approx(2 * 3.5 + 3 * 40)
    # 40 tokens lie on the same line: 80. Fewer than measured cost what the shortest cost: 20.
    assert from_latency(manifest, latency(), 40).typical_ms[PREFILL] == pytest.approx(80)
    assert from_latency(manifest, latency(), 5).typical_ms[PREFILL] == pytest.approx(20)
    # A file of 300 pixels takes 3 ms more than one of 100; of decoded pictures there is one point, which holds for all.
    table = latency()
    files = [
        {**table.text["preprocess"][0], **{"pixels": n, "encoded": True, "p50_ms": ms}} for n, ms in ((100, 2.0), (200, 3.5))
    ]
    table.text["preprocess"] += files
    seen = from_latency(manifest, table, 20)
    assert [seen.for_picture(*of).typical_ms[PREPROCESS] for of in ((300, True), (50, True), (9, False))] == [5.0, 2.0, 1.0]
    # Noise may make the longer prefill look faster; it is never extrapolated downwards.
    odd = latency(prefill=((10, 20.0), (30, 10.0)))
    assert from_latency(manifest, odd, 30).typical_ms[PREFILL] == pytest.approx(20)
    assert from_latency(manifest, latency(prefill=((10, 20.0),)), 30).typical_ms[PREFILL] == pytest.approx(20)
    # Between three points: 40 at 20 tokens, 60 at 30, 100 at 40.
    three = latency(prefill=((10, 20.0), (30, 60.0), (50, 140.0)))
    assert from_latency(manifest, three, 40).typical_ms[PREFILL] == pytest.approx(100)
    assert [made.decode_ms(context) for context in (10, 20, 40)] == pytest.approx([7, 8, 10])


def profile(**estimates: float) -> DeviceProfile:
    schemes = ("int8-dynamic", "int4-block32", 1000, None)
    return DeviceProfile("x", "x", "board", 4, None, "CPUExecutionProvider", *schemes, estimates, {})


def test_an_estimate_is_arithmetic_or_reading_whichever_takes_longer(manifest):
    # The graphs by hand: segments and head 1e6 operations each, the decoder 1e6 a token, of which 2 * 259 * 258 the head's,
    # which counts for the last token alone. Attention's two products over 20 tokens of width 259 are 2 * 2 * 20 * 20 * 259.
    # At 1 GOP/s a segment takes 1 ms; reading at 1000 GB/s takes nothing worth naming.
    read = 20 - 19 * 2 * 259 * 258 / 1e6 + 4 * 20 * 20 * 259 / 1e6

    def expected(tokens: int, **estimates: float) -> list[float]:
        made = from_profile(manifest, profile(**estimates), tokens)
        assert made is not None and made.source == "estimated"
        return [made.expected_ms(exit_stages(manifest, depth)) for depth in (1, 2, 3)]

    assert expected(20, gops_int8=1.0, read_gb_s=1000.0) == pytest.approx([read + 2, read + 3, read + 4], abs=1e-4)
    # With 0.1 ms a graph: the decoder, the head and each segment.
    assert expected(20, gops_int8=1.0, read_gb_s=1000.0, overhead_ms_per_graph=0.1) == pytest.approx(
        [read + 2.3, read + 3.4, read + 4.5], abs=1e-4
    )
    # At endless arithmetic and 1000 bytes a second (a byte a ms) only reading is left. The bytes by hand: the decoder's
    # 259 x 258 floats and an int64, the first segment's float and three int64, the head's 4 and 2 int64 and 4 x 259 floats.
    weights = (259 * 258 * 4 + 8) + (4 + 3 * 8) + (6 * 8 + 4 * 259 * 4)
    assert expected(20, gops_int8=1e9, read_gb_s=1e-6)[0] == pytest.approx(weights)
    # One number has no spread, so any quantile of it is the number.
    made = from_profile(manifest, profile(gops_int8=1.0, read_gb_s=1000.0), 20)
    assert made is not None and made.quantile_ms(exit_stages(manifest, 1), 0.99) == pytest.approx(read + 2, abs=1e-4)


def test_attention_blocks_of_weights_and_layers_have_figures_of_their_own(manifest):
    text = manifest.text  # one layer, 259 wide, 258 tokens of vocabulary
    work = decoder_work(GraphSpec((), (), 10**6, 500), text, 400, 100)
    # Parts of 200 tokens look at the 100 before, at 0 or 200 of the earlier part and at all of their own: 300 on average + 100.
    assert work.attention == 4 * 259 * (200 * (100 + 200) + 200 * (100 + 400))
    assert (work.layers, work.read_bytes) == (1, 500 + 8 * 259 * 100)
    one = Work(2e9, 1e9, 1e6, layers=3)
    found = {"gops_int8": 1.0, "gops_int4": 2.0, "gops_fp32": 4.0, "read_gb_s": 1.0}
    assert [work_ms(one, profile(**found), scheme) for scheme in ("int8-dynamic", "int4-block32", "fp32")] == [3e3, 1.5e3, 750]
    device = profile(**found, gops_attention=0.5, overhead_ms_per_graph=7.0, overhead_ms_per_layer=2.0)
    assert work_ms(one, device, "int8-dynamic") == 2e3 + 2e3 + 7 + 3 * 2
    assert work_ms(Work(0, 0, 5e6, layers=3), device, "int4-block32") == 5 + 7 + 3 * 2


@pytest.mark.parametrize("estimates", [{}, {"gops_int8": 1.0}, {"read_gb_s": 1.0}, {"gops_fp32": 1.0, "read_gb_s": 1.0}])
def test_no_estimate_without_its_figures(manifest, estimates):
    assert from_profile(manifest, profile(**estimates), 20) is None


def test_the_host_profile_predicts_nothing_and_the_pi_s_does(manifest):
    assert from_profile(manifest, load_device("host"), 20) is None
    assert from_profile(manifest, load_device("rpi5"), 20) is not None
