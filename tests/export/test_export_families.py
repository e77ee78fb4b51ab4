"""Every family at every depth, on tiny random checkpoints: exits, tiles, prompts and answers as transformers makes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto
from PIL import Image

from edgesafe.errors import CancelledError, InputError, ParityError
from edgesafe.format import graph_io
from edgesafe.format.bundle import Bundle
from edgesafe.format.exits import Exit, parse_exits
from edgesafe.runtime import decode
from edgesafe.runtime.measure import measure
from edgesafe.runtime.session import Session
from edgesafe.runtime.tokenizer import encode_prompt
from edgesafe.runtime.turns import Cancel
from edgesafe_export import graphs
from edgesafe_export import parity_model as parity
from edgesafe_export.export import probes, trace, write
from edgesafe_export.family import load_family
from edgesafe_export.quantize import EMBED_SCHEME, quantize
from edgesafe_export.tolerances import FLOAT_RELATIVE, QUANTIZED_FEATURES, QUANTIZED_LOGITS
from tiny_families import BLOCKS, NAMES, TILE, Case, make_tiny, truncated

FP32 = {"vision": "fp32", "text": "fp32"}
LADDER = parse_exits("all", BLOCKS)
SIZES = [(24, 24), (64, 64), (30, 100), (100, 30), (7, 7), (200, 3), (3, 200), (75, 50)]


@pytest.fixture(params=NAMES)
def case(request, cases) -> Case:
    return cases(request.param)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8))


def open_bundle(case: Case, folder: Path, **changed: Any) -> Session:
    write(case.job, folder, {**case.parts, **changed}, FP32, {})
    return parity.open_session(folder)


def test_float_graphs_are_transformers_at_every_depth(case, tmp_path):
    found = parity.check_float(case.family, open_bundle(case, tmp_path / "b"), probes(case.job)[:8])
    for kind in ("float_relative", "logits_relative"):
        assert list(found[kind]) == ["1", "2", "3"] and 0 < max(found[kind].values()) < FLOAT_RELATIVE / 5
    assert found["text_answers_equal"] == 4


def _by_hand(family, inputs, depth: int) -> torch.Tensor:
    """The features after `depth` blocks, by transformers' own whole model whose later blocks hand on what they get."""
    tower = family.model.get_submodule(family.recipe.tower)
    later = list(tower.get_submodule(family.recipe.blocks))[depth:]
    for block in later:
        block.forward = lambda states, *_, **__: states
    layer = {family.recipe.reference: -1} if family.recipe.reference else {}
    try:
        keys = ("pixel_values", "image_sizes", "pixel_attention_mask", "batch_num_images")
        with torch.no_grad():
            out = family.model.model.get_image_features(**{k: inputs[k] for k in keys if k in inputs}, **layer)
    finally:
        for block in later:
            del block.forward
    return out.pooler_output[0]


def test_the_oracle_is_the_state_after_so_many_blocks(case):
    inputs = parity.processed(case.family, noise(70, 40), "What is this?")
    wanted = {d: _by_hand(case.family, inputs, d) for d in range(1, case.family.geometry.n_blocks + 1)}
    for depth, want in wanted.items():
        assert torch.equal(case.family.oracle(inputs, Exit(depth)), want)
        for other in {depth - 1, depth + 1} & set(wanted):
            assert parity.relative(wanted[other].numpy(), want.numpy()) > 100 * FLOAT_RELATIVE


def _truncated(family, inputs, depth: int) -> torch.Tensor:
    """The features of the model whose tower has no more than `depth` blocks, read at its last one."""
    keys = ("pixel_values", "image_sizes", "pixel_attention_mask", "batch_num_images")
    with truncated(family, depth) as layer, torch.no_grad():
        return family.model.model.get_image_features(**{k: inputs[k] for k in keys if k in inputs}, **layer).pooler_output[0]


def test_a_truncated_tower_is_transformers_own_selection(case):
    inputs = parity.processed(case.family, noise(40, 70), "What is this?")
    for depth in range(1, case.family.geometry.n_blocks + 1):
        assert torch.equal(_truncated(case.family, inputs, depth), case.family.oracle(inputs, Exit(depth)))
    assert not torch.equal(_truncated(case.family, inputs, 2), case.family.oracle(inputs, Exit(1)))


@pytest.mark.parametrize("check", [parity.check_features, parity.check_logits, parity.check_text])
def test_each_check_fails_on_an_exit_that_is_one_block_off(case, tmp_path, monkeypatch, check):
    session = open_bundle(case, tmp_path / "b")
    right = session.vision_states
    rows = probes(case.job)[:8]
    check(case.family, session, rows)
    off = {Exit(1): Exit(2), Exit(2): Exit(3), Exit(3): Exit(2)}
    monkeypatch.setattr(session, "vision_states", lambda image, exits: {e: right(image, [off[e]])[off[e]] for e in exits})
    with pytest.raises(ParityError):
        check(case.family, session, rows)


def _wrong_head(case: Case, **changes: Any) -> dict[str, Any]:
    """The head with one of its pieces replaced."""
    head = case.family.head()
    for name, value in changes.items():
        setattr(head, name, value)

    class Wrong:
        def __getattr__(self, name: str) -> Any:
            return (lambda: head) if name == "head" else getattr(case.family, name)

    return {graph_io.HEAD_PATH: graphs.head(Wrong())}


def test_a_norm_more_or_less_is_seen(case, tmp_path):
    tower = case.family.model.get_submodule(case.family.recipe.tower)
    norm = None if case.family.recipe.norm_after_blocks else tower.post_layernorm
    session = open_bundle(case, tmp_path / "b", **_wrong_head(case, norm=norm))
    with pytest.raises(ParityError, match="image features"):
        parity.check_features(case.family, session, probes(case.job)[:2])


def test_a_block_s_weights_of_the_next_one_are_seen(case, tmp_path):
    changed = {graph_io.segment_path(1, 2): graphs.segment(case.family, 2, 3)}
    with pytest.raises(ParityError, match="image features"):
        parity.check_features(case.family, open_bundle(case, tmp_path / "b", **changed), probes(case.job)[:2])


def _rms(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


def test_quantized_graphs_stay_within_tolerance_at_every_depth(case, tmp_path):
    scheme = {graph_io.EMBED_PATH: EMBED_SCHEME, graph_io.DECODER_PATH: "int8-block32"}
    quantized = {path: (quantize(m, scheme.get(path, "int8-dynamic")), spec) for path, (m, spec) in case.parts.items()}
    block = quantized[graph_io.segment_path(1, 2)][0].graph
    floats = [t.name for t in block.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2 and min(t.dims) > 1]
    assert floats == []
    plain, small = open_bundle(case, tmp_path / "a"), open_bundle(case, tmp_path / "b", **quantized)
    picture, ids = noise(70, 40), encode_prompt(plain.tokenizer, plain.manifest, "What?", plain.cut(noise(70, 40)))
    want, got = plain.vision_states(picture, LADDER), small.vision_states(picture, LADDER)
    for exit in LADDER:
        assert _rms(got[exit], want[exit]) < QUANTIZED_FEATURES
        off = want[LADDER[exit.depth % len(LADDER)]]
        assert _rms(off, want[exit]) > 2 * QUANTIZED_FEATURES
        logits = [s.prefill(want[exit], ids)[0][0, -1] for s in (small, plain)]
        assert _rms(*logits) < QUANTIZED_LOGITS


def test_pictures_and_prompts_are_the_processor_s(case, tmp_path):
    session, family = open_bundle(case, tmp_path / "b"), case.family
    seen = set()
    for size in SIZES:
        picture = noise(*size)
        inputs = parity.processed(family, picture, "What is <this>?\n\nSay.")
        cut = session.cut(picture)
        seen.add(cut.tiles)
        assert (
            encode_prompt(session.tokenizer, session.manifest, "What is <this>?\n\nSay.", cut)
            == inputs["input_ids"][0].tolist()
        )
        np.testing.assert_allclose(np.concatenate(session.look(picture)), inputs["pixel_values"][0].numpy(), rtol=0, atol=1e-6)
    assert len(seen) > 1


def test_an_ask_a_conversation_and_a_measurement(cases, tmp_path):
    case = cases("smolvlm")
    session = open_bundle(case, tmp_path / "b")
    picture, exit = noise(70, 40), case.family.geometry.reference
    features = session.vision_states(picture, [exit])[exit]
    want = session.answer_features(features, "What?", 8, session.cut(picture))
    answer = session.ask(picture, "What?", exit=exit, max_new_tokens=8)
    assert answer.text == want and answer.exit == exit
    talk = session.conversation(picture, exit=exit)
    assert [talk.ask("What?", max_new_tokens=8).text for _ in range(2)] == [want, want]
    assert talk.reused_tokens > 50
    table = measure(tmp_path / "b", threads=1, seconds=0.1)
    timed = Session.open(tmp_path / "b", allow_uncertified=True, threads=1)
    one, many = timed.predict(100), timed.predict(100, tiles=7)
    path = graph_io.HEAD_PATH
    assert set(table.segments) == {p for e in timed.manifest.exits for p in e.graphs}
    # Round by round, where nothing is rounded: a median is, and seven times one rounded is not the other.
    assert many.rounds[path] == [7 * ms for ms in one.rounds[path]] and len(one.rounds[path]) > 1
    assert many.rounds["prefill"] == one.rounds["prefill"]


def test_a_cancelled_ask_ends_between_two_tiles(cases, tmp_path, monkeypatch):
    session = open_bundle(cases("smolvlm"), tmp_path / "b")
    cancel, ran, real = Cancel(), [], session.run_vision_graph

    def run(path, state):
        ran.append(path)
        cancel.cancel()
        return real(path, state)

    monkeypatch.setattr(session, "run_vision_graph", run)
    with pytest.raises(CancelledError):
        session.ask(noise(70, 40), "What?", exit=3, cancel=cancel)
    assert len(ran) == 1


def test_a_picture_with_more_tiles_than_the_context_holds_is_refused(cases, tmp_path):
    case = cases("llava_onevision")
    session = open_bundle(case, tmp_path / "b")
    short = replace(session.manifest, text=replace(session.manifest.text, context_length=60))
    with pytest.raises(InputError, match="smaller picture"):
        encode_prompt(session.tokenizer, short, "What?", session.cut(noise(72, 72)))


def test_standalone_exits_of_tiles_give_the_chain_s_features(cases, tmp_path):
    case = cases("llava_next")
    chain = open_bundle(case, tmp_path / "chain")
    job = replace(case.job, layout="standalone", ladder=LADDER[1:])
    text = {path: part for path, part in case.parts.items() if path.startswith("text/")}
    write(job, tmp_path / "alone", {**trace(job, text=False), **text}, FP32, {})
    alone = parity.open_session(tmp_path / "alone")
    want = chain.vision_states(noise(50, 90), LADDER[1:])
    for exit, features in alone.vision_states(noise(50, 90), LADDER[1:]).items():
        np.testing.assert_allclose(features, want[exit], rtol=1e-4, atol=1e-4)


def test_one_tile_where_the_checkpoint_says_so(tmp_path):
    family = load_family(make_tiny("smolvlm", tmp_path / "m", do_image_splitting=False))
    assert family.tiles.cut == "never"
    inputs = parity.processed(family, noise(70, 40), "What?")
    from edgesafe.runtime.tiles import preprocess_tiles

    (ours,) = preprocess_tiles(noise(70, 40), family.image_spec, family.tiles)
    np.testing.assert_allclose(ours, inputs["pixel_values"][0].numpy(), rtol=0, atol=1e-6)
    assert ours.shape == (1, 3, TILE, TILE)


def test_the_decoder_s_cache_is_shared_in_every_family(case):
    assert decode.shares_cache(case.parts[graph_io.DECODER_PATH][1])


def test_the_bundle_opens_again_with_its_tiles(case, tmp_path):
    session = open_bundle(case, tmp_path / "b")
    assert session.manifest.tiles
    assert Bundle.open(tmp_path / "b").manifest == session.manifest
