"""Sessions on the bundle made by hand (handmade.py says what its graphs compute)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from edgesafe import Budget, Session
from edgesafe.errors import (
    BundleError,
    FormatVersionError,
    InputError,
    IntegrityError,
    NoExitFitsError,
    NotMeasuredError,
    UncertifiedExitError,
)
from edgesafe.format.bundle import Bundle
from edgesafe.format.exits import Exit
from edgesafe.format.latency import LatencyTable, read_latency, stage_times, write_latency
from edgesafe.format.seal import seal, unseal
from edgesafe.runtime import decode, measure
from edgesafe.runtime.ort import OrtGraph
from edgesafe.runtime.tokenizer import encode_prompt
from engines import slow_session
from handmade import ANSWER, CONTEXT, FEATURES, HIDDEN, IMAGE_ID, make_bundle, make_tokenizer

BLACK = np.zeros((8, 8, 3), np.uint8)
WHITE = np.full((8, 8, 3), 255, np.uint8)


@pytest.fixture(scope="module")
def session(handmade) -> Session:
    return Session.open(handmade)


def test_ask_takes_the_deepest_certified_exit(session):
    answer = session.ask(BLACK, "what?")
    assert (answer.text, answer.finish_reason, answer.exit, answer.certified) == (ANSWER, "stop", Exit(2), True)
    assert 0 < answer.ttft_ms <= answer.total_ms
    # Nothing was measured and the host's profile estimates nothing: said, not made up.
    assert (answer.predicted_ttft_ms, answer.prediction) == (None, "none")
    assert "edgesafe measure" in answer.note


def test_stream_never_splits_a_character_and_joins_to_the_answer(session):
    stream = session.stream(BLACK, "what?")
    # One token a byte: é is two of them and € three, so eight tokens make five pieces.
    assert list(stream) == ["Z", "é", "1", "€", "."]
    assert stream.answer.text == ANSWER == session.ask(BLACK, "what?").text


def test_length_ends_in_the_middle_of_a_character_without_losing_it_silently(session):
    answer = session.ask(BLACK, "what?", max_new_tokens=2)
    assert (answer.text, answer.finish_reason) == ("Z\ufffd", "length")
    assert session.ask(BLACK, "what?", max_new_tokens=1).text == "Z"
    # Nine tokens with the end: exactly enough stops, one less is cut.
    assert session.ask(BLACK, "what?", max_new_tokens=9).finish_reason == "stop"
    assert session.ask(BLACK, "what?", max_new_tokens=8).finish_reason == "length"


@pytest.mark.parametrize(("picture", "mean"), [(BLACK, -2.0), (WHITE, 2.0)])
def test_vision_states_by_hand(session, picture, mean):
    # (0 - 0.5) / 0.25 = -2 for black, (1 - 0.5) / 0.25 = 2 for white; each block adds 1.
    states = session.vision_states(picture, [3, Exit(1), "2"])
    assert list(states) == [Exit(1), Exit(2), Exit(3)]
    for exit, features in states.items():
        assert features.shape == (FEATURES, HIDDEN) and features.dtype == np.float32
        np.testing.assert_allclose(features[:, -1], mean + exit.depth, atol=1e-5)
        assert not features[:, :-1].any()


def test_shared_segments_run_once(session, monkeypatch):
    ran = []
    run = OrtGraph.advance
    monkeypatch.setattr(OrtGraph, "advance", lambda self, state: ran.append(len(ran)) or run(self, state))
    session.vision_states(BLACK, [1, 2, 3])
    # Three segments and a head for each of three exits; one by one it would have been 1 + 2 + 3 segments.
    assert len(ran) == 6
    ran.clear()
    session.vision_states(BLACK, [2])
    assert len(ran) == 3


def test_answer_features(session):
    features = session.vision_states(BLACK, [2])[Exit(2)]
    assert session.answer_features(features, "what?") == ANSWER
    with pytest.raises(BundleError, match="image features"):
        session.answer_features(features[:2], "what?")


def test_prompt_ids_by_hand(session):
    # Prefix "U <image> ", the prompt, suffix " A:", one token a byte, the image token FEATURES times.
    ids = encode_prompt(session.tokenizer, session.manifest, "hi")
    plain = make_tokenizer()
    assert ids == [*plain.encode("U ").ids, *[IMAGE_ID] * FEATURES, *plain.encode(" hi A:").ids]


def test_features_stand_where_the_image_token_was(session):
    ids = [1, *[IMAGE_ID] * FEATURES, 2]
    features = np.arange(FEATURES * HIDDEN, dtype=np.float32).reshape(FEATURES, HIDDEN)
    embeds = decode.merge_features(session.graph(session.manifest.text.embed_tokens), ids, IMAGE_ID, features)
    np.testing.assert_array_equal(embeds[0, 1:-1], features)
    assert embeds[0, 0].argmax() == 1 and embeds[0, -1].argmax() == 2


def test_the_cache_grows_by_what_was_read(session):
    features = session.vision_states(BLACK, [2])[Exit(2)]
    ids = encode_prompt(session.tokenizer, session.manifest, "hi")
    logits, cache = session.prefill(features, ids)
    assert cache["past_key_values.0.key"].shape == (1, 1, len(ids), HIDDEN)
    text = session.manifest.text
    new = session.graph(text.embed_tokens).run({"input_ids": np.array([[5]])})["inputs_embeds"]
    _, cache = decode.step(session.graph(text.decoder), text, new, cache)
    assert cache["past_key_values.0.value"].shape == (1, 1, len(ids) + 1, HIDDEN)
    assert decode.argmax_token(logits) == ord("Z")


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(BundleError, match="finite"):
        decode.argmax_token(np.array([[[1.0, np.nan]]]))


@pytest.mark.parametrize("prompt", ["", "   \n", None, 3, "a <image> b", "stop</s>", "\ud800", "x" * 200])
def test_bad_prompts(session, prompt):
    with pytest.raises(InputError):
        session.ask(BLACK, prompt)


def test_the_context_s_edge(session):
    # "U " 2 + image 4 + " " 1 + prompt + " A:" 3 = prompt + 10 tokens; one place must be left for an answer.
    room = CONTEXT - 1 - 10
    answer = session.ask(BLACK, "x" * room, max_new_tokens=48)
    assert (answer.text, answer.finish_reason) == ("Z", "length")
    with pytest.raises(InputError, match="by 1 tokens or more"):
        session.ask(BLACK, "x" * (room + 1))


@pytest.mark.parametrize(
    "options",
    [
        {"exit": 9},
        {"exit": 0},
        {"exit": True},
        {"exit": "9"},
        {"exit": "1@2"},
        {"exit": "06"},
        {"exit": 1.0},
        {"exit": 1, "budget": Budget(5)},
        {"budget": 5.0},
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.0},
        {"sampling": 0.7},
    ],
    ids=str,
)
def test_bad_options(session, options):
    with pytest.raises(InputError):
        session.ask(BLACK, "what?", **options)


def test_no_picture_and_wrong_threads(session, handmade):
    with pytest.raises(InputError):
        session.ask(None, "what?")
    with pytest.raises(InputError):
        Session.open(handmade, threads=0)


def test_an_uncertified_exit_is_refused_until_it_is_allowed_and_then_said(session, handmade):
    with pytest.raises(UncertifiedExitError) as caught:
        session.ask(BLACK, "what?", exit=3)
    assert caught.value.exit_code == 51
    for answer in (
        session.ask(BLACK, "what?", exit=3, allow_uncertified=True),
        Session.open(handmade, allow_uncertified=True).ask(BLACK, "what?", exit=3),
    ):
        assert (answer.exit, answer.certified) == (Exit(3), False)
        assert "NOT certified" in answer.note
    # Allowing it doesn't take it: the deepest certified exit stays the default.
    assert session.ask(BLACK, "what?", allow_uncertified=True).exit == Exit(2)


def test_without_a_certificate_nothing_is_certified(handmade, copy_of):
    root = copy_of(handmade)
    (root / "certificate.json").unlink()
    session = Session.open(root)
    for options in ({}, {"exit": 1}, {"budget": Budget(1000)}):
        with pytest.raises(UncertifiedExitError, match="edgesafe certify"):
            session.ask(BLACK, "what?", **options)
    answer = session.ask(BLACK, "what?", allow_uncertified=True)
    assert (answer.exit, answer.certified) == (Exit(3), False)


def test_a_certificate_in_which_all_failed(tmp_path):
    session = Session.open(make_bundle(tmp_path / "b", certified=()).root)
    with pytest.raises(UncertifiedExitError):
        session.ask(BLACK, "what?")


def test_a_budget_needs_a_prediction(session):
    with pytest.raises(NotMeasuredError, match="edgesafe measure"):
        session.ask(BLACK, "what?", Budget(1000))


def test_the_profile_s_estimate_is_marked_as_one(tmp_path):
    session = Session.open(make_bundle(tmp_path / "b", device="rpi5").root)
    answer = session.ask(BLACK, "what?", Budget(10_000))
    assert (answer.exit, answer.prediction) == (Exit(2), "estimated")
    assert "Raspberry Pi 5" in answer.note
    assert session.threads <= 4


@pytest.mark.parametrize(("budget", "depth"), [(1000, 2), (20, 2), (19.9, 1), (10, 1)])
def test_a_smaller_budget_takes_a_shallower_exit(measured, budget, depth):
    answer = slow_session(measured[0]).ask(BLACK, "what?", Budget(budget))
    assert (answer.exit, answer.planned_exit, answer.prediction) == (Exit(depth), Exit(depth), "measured")
    assert answer.predicted_ttft_ms == answer.ttft_ms == 10 * depth
    assert answer.certified and answer.note == "" and answer.deadline_met is True
    blocks = {path: ms for path, ms in answer.actual_ms.items() if "blocks" in path}
    assert list(blocks.values()) == [10.0] * depth and blocks.items() <= answer.predicted_ms.items()


def test_blocks_that_take_longer_than_measured_end_at_an_earlier_exit_and_are_remembered(measured):
    # Planned: 2 blocks, 20 ms of 45. The first took 40: there is no time for the second.
    session = slow_session(measured[0], block_ms=40)
    answer = session.ask(BLACK, "what?", Budget(45))
    assert (answer.exit, answer.planned_exit, answer.deadline_met, answer.ttft_ms) == (Exit(1), Exit(2), True, 40)
    assert "exit 2 was predicted to need" in answer.why
    assert session.correction.speed == 1  # the first run of a stage is no measure of the next ...
    assert session.ask(BLACK, "what?", Budget(45)).exit == Exit(1) and session.correction.speed > 1  # ... but the second is
    # Exit 3 failed its certification: it isn't taken with all the time of the world, and the reference is the end.
    assert slow_session(measured[0]).ask(BLACK, "what?", Budget(1e6)).exit == Exit(2)
    assert slow_session(measured[0]).ask(BLACK, "what?", Budget(1e6), allow_uncertified=True).exit == Exit(2)


def test_total_ms_cuts_the_answer_and_says_so(measured):
    root, table = measured
    text = {**table.text, "decode": [{"context": 10, **stage_times([5.0] * 5)}]}
    write_latency(Bundle.open(root), replace(table, text=text))
    # 20 ms of vision and 5 a token: the seventh of eight tokens ends at 55, the eighth, which is the full stop, would at 60.
    session = slow_session(root, step_ms=5)
    answer = session.ask(BLACK, "what?", Budget(total_ms=59))
    assert (answer.finish_reason, answer.text, answer.deadline_met) == ("deadline", ANSWER[:-1], True)
    assert answer.total_ms == pytest.approx(55)
    whole = session.ask(BLACK, "what?", Budget(total_ms=1000))
    assert (whole.finish_reason, whole.text, whole.deadline_met) == ("stop", ANSWER, True)
    assert session.ask(BLACK, "what?", Budget(1000, max_new_tokens=1)).text == "Z"
    assert session.ask(BLACK, "what?", Budget(1000, max_new_tokens=5), max_new_tokens=1).text == "Z"


def test_on_miss(measured):
    with pytest.raises(NoExitFitsError):
        slow_session(measured[0]).ask(BLACK, "what?", Budget(9))
    answer = slow_session(measured[0]).ask(BLACK, "what?", Budget(9, on_miss="shallowest"))
    assert (answer.exit, answer.deadline_met, answer.ttft_ms) == (Exit(1), False, 10)


def test_a_budget_below_the_fastest_certified_exit(measured):
    with pytest.raises(NoExitFitsError, match=r"10\.0 ms"):
        Session.open(measured[0]).ask(BLACK, "what?", Budget(9.9))


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"machine": "another"}, "another machine"),
        ({"engine_version": "1.0"}, "onnxruntime 1.0"),
        ({"bundle_digest": "0" * 64}, "another bundle"),
        ({"segments": {}}, "every exit"),
    ],
)
def test_a_measurement_of_something_else_is_ignored_with_a_note(measured, change, shown):
    root, table = measured
    write_latency(Bundle.open(root), LatencyTable.from_dict({**table.to_dict(), **change}))
    answer = Session.open(root).ask(BLACK, "what?")
    assert answer.prediction == "none" and shown in answer.note
    with pytest.raises(NotMeasuredError, match=shown):
        Session.open(root).ask(BLACK, "what?", Budget(1000))


def test_measured_threads_are_used_unless_others_are_asked_for(measured):
    root, table = measured
    write_latency(Bundle.open(root), LatencyTable.from_dict({**table.to_dict(), "threads": 3, "cores": [0]}))
    session = Session.open(root)
    assert (session.threads, session.tuning.cores) == (3, (0,))
    session = Session.open(root, threads=2)
    assert (session.threads, session.tuning.cores) == (2, None)
    assert "measured with 3 threads" in session.ask(BLACK, "what?").note


def test_an_estimate_is_refused_where_a_measurement_is_demanded(tmp_path, measured):
    root = make_bundle(tmp_path / "b", device="rpi5").root
    assert Session.open(root).ask(BLACK, "what?", Budget(60_000)).prediction == "estimated"
    with pytest.raises(NotMeasuredError, match="only an estimate") as caught:
        Session.open(root).ask(BLACK, "what?", Budget(60_000, require_measured=True))
    assert caught.value.exit_code == 62
    assert slow_session(measured[0]).ask(BLACK, "what?", Budget(60, require_measured=True)).prediction == "measured"


def test_a_measurement_of_an_older_format_is_ignored_with_a_note_and_measured_anew(measured):
    root, _ = measured
    old = {"bundle_digest": "x", "machine": "y", "segments": {}, "threads": 2, "source": "measured"}
    (root / "latency.json").write_bytes(seal(old))
    answer = Session.open(root).ask(BLACK, "what?")
    assert "latency.json was ignored: the measurement was written by an older edgesafe" in answer.note
    with pytest.raises(FormatVersionError, match="edgesafe measure"):
        read_latency(Bundle.open(root))
    (root / "latency.json").write_bytes(seal({**old, "format_version": 5}))
    assert "another edgesafe (format 5)" in Session.open(root).ask(BLACK, "what?").note
    measure(root, seconds=0.1)
    assert Session.open(root).ask(BLACK, "what?").prediction == "measured"


def test_a_measurement_that_lacks_a_round_is_refused(measured):
    root, table = measured
    obj = table.to_dict()
    obj["text"]["decode"][0]["ms"].pop()
    with pytest.raises(BundleError, match="every round"):
        LatencyTable.from_dict(obj)
    obj["text"]["decode"][0]["ms"] = [1.0, 1.0, 1.0, 1.0, -1.0]
    with pytest.raises(BundleError, match="below 0"):
        LatencyTable.from_dict(obj)


def test_a_broken_measurement_is_refused(measured):
    root, _ = measured
    data = (root / "latency.json").read_bytes()
    (root / "latency.json").write_bytes(data.replace(b"10.0", b"1.0"))
    with pytest.raises(IntegrityError):
        Session.open(root)
    obj = unseal(data, "x")
    (root / "latency.json").write_bytes(seal({**obj, "threads": "two"}))
    with pytest.raises(BundleError, match="threads"):
        Session.open(root)


def test_measure_writes_a_table_that_predicts(handmade, copy_of):
    root = copy_of(handmade)
    table = measure(root, seconds=0.5)
    assert read_latency(Bundle.open(root)) == table
    assert set(table.segments) == {path for e in Bundle.open(root).manifest.exits for path in e.graphs}
    for key in ("p50_ms", "p95_ms"):
        column = [row["ttft_ms"][key] for row in table.exits]
        assert column == sorted(column) and column[0] > 0
    assert [row["exit"] for row in table.exits] == ["1", "2", "3"]
    for rows, key in ((table.text["prefill"], "tokens"), (table.text["decode"], "context")):
        lengths = [row[key] for row in rows]
        assert len(lengths) == 3 and lengths == sorted(set(lengths)) and lengths[-1] < CONTEXT
    assert table.sweep[0]["threads"] == 1 and table.threads in [row["threads"] for row in table.sweep]
    assert Session.open(root).threads == table.threads and table.session_open_ms > 0
    assert set(table.conditions) == {"cpu_model", "governor", "temperature_c", "slowed", "measured_at"}
    answer = Session.open(root).ask(BLACK, "what?", Budget(60_000))
    assert answer.prediction == "measured" and answer.predicted_ttft_ms > 0


def test_measure_json_keys(handmade, copy_of):
    assert set(measure(copy_of(handmade), seconds=0.1).to_dict()) == {
        "bundle_digest",
        "machine",
        "engine",
        "engine_version",
        "threads",
        "segments",
        "text",
        "exits",
        "peak_rss_mib",
        "source",
        "format_version",
        "cores",
        "sweep",
        "session_open_ms",
        "conditions",
    }


def test_a_graph_that_is_not_what_the_manifest_says(tmp_path, handmade):
    manifest = Bundle.open(handmade).manifest
    head = manifest.graphs["vision/head.onnx"]
    with pytest.raises(BundleError, match="inputs"):
        OrtGraph(str(handmade / "text/embed_tokens.onnx"), head, 1)
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="can't load"):
        OrtGraph(str(tmp_path / "broken.onnx"), head, 1)


def test_pil_pictures_and_paths_answer_alike(session, tmp_path):
    Image.fromarray(WHITE).save(tmp_path / "w.png")
    assert session.ask(tmp_path / "w.png", "what?").text == session.ask(Image.fromarray(WHITE), "what?").text
