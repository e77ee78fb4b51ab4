"""Parity can fail: the right graphs pass at every depth, each listed wrong version is refused by the check named beside it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from edgesafe.errors import BundleError, ParityError
from edgesafe.format import graph_io
from edgesafe.format.bundle import Bundle
from edgesafe.format.exits import Exit
from edgesafe.format.targets import NEW
from edgesafe_export import calibrate, graphs, held_out, stream
from edgesafe_export import export as export_module
from edgesafe_export import parity_model as parity
from edgesafe_export import parity_pieces as compare
from edgesafe_export.export import probes, write
from edgesafe_export.modules import Head, Segment
from edgesafe_export.quantize import AUTO
from edgesafe_export.skeleton import open_sketch
from edgesafe_export.tolerances import FLOAT_RELATIVE

FP32 = {"vision": "fp32", "text": "fp32"}
FIRST, SECOND = graph_io.segment_path(0, 1), graph_io.segment_path(1, 2)


def check(job, parts, folder: Path):
    write(job, folder, parts, FP32, {})
    return parity.check_float(job.family, parity.open_session(folder), probes(job))


def test_the_right_graphs_pass_at_every_depth(job, parts, tmp_path):
    found = check(job, parts, tmp_path / "b")
    for kind in ("float_relative", "logits_relative"):
        assert list(found[kind]) == ["1", "2", "3"] and 0 < max(found[kind].values()) < 1e-5
    assert found["text_answers_equal"] == 4


def test_the_oracle_is_transformers_own_hidden_state(job):
    # hidden_states[d] is the state after d blocks, embeddings first: counted here without the code under test.
    model, pixels = job.family.model, torch.randn(1, 3, 72, 72)
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        for depth in (1, 2, 3, 4):
            want = model.model.multi_modal_projector(states[depth][:, 1:])[0]
            assert torch.equal(job.family.oracle({"pixel_values": pixels}, Exit(depth)), want)


def test_neighbouring_exits_differ_far_beyond_the_tolerance(job):
    pixels = torch.randn(1, 3, 72, 72)
    states = [job.family.oracle({"pixel_values": pixels}, Exit(d)).numpy() for d in (1, 2, 3, 4)]
    assert min(parity.relative(a, b) for a, b in zip(states, states[1:], strict=False)) > 100 * FLOAT_RELATIVE


class _Family(SimpleNamespace):
    """A family with one method replaced, for tracing a wrong piece."""

    def __init__(self, family, **changes):
        super().__init__(**{**vars(family), **changes})
        for name in ("segment", "head", "embed_tokens", "decoder"):
            if name not in changes:
                setattr(self, name, getattr(family, name))


def _next_block_s_weights(job, parts):
    return {SECOND: graphs.segment(job.family, 2, 3)}


def _one_block_too_many(job, parts):
    return {FIRST: graphs.segment(job.family, 0, 2)}


def _embeddings_norm_skipped(job, parts):
    right = job.family.segment(0, 1)
    wrong = Segment(list(right.blocks), right.embeddings, torch.nn.Identity()).eval()
    return {FIRST: graphs.segment(_Family(job.family, segment=lambda *_: wrong), 0, 1)}


def _norm_after_the_exit(job, parts):
    class Normed(Head):
        def forward(self, x):
            return super().forward(torch.nn.functional.layer_norm(x, x.shape[-1:]))

    wrong = Normed(job.family.head().projector, 1).eval()
    return {graph_io.HEAD_PATH: graphs.head(_Family(job.family, head=lambda: wrong))}


def _cls_kept_and_the_last_patch_dropped(job, parts):
    class Kept(Head):
        def forward(self, x):
            return self.projector(x[:, :-1])[0]

    wrong = Kept(job.family.head().projector, 1).eval()
    return {graph_io.HEAD_PATH: graphs.head(_Family(job.family, head=lambda: wrong))}


def _embedding_rows_off_by_one(job, parts):
    model, spec = copy.deepcopy(parts[graph_io.EMBED_PATH])
    (table,) = model.graph.initializer
    table.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(table), 1, axis=0), table.name))
    return {graph_io.EMBED_PATH: (model, spec)}


def _decoder_layers_swapped(job, parts):
    causal = job.family.decoder()
    layers = causal.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    try:
        return {graph_io.DECODER_PATH: graphs.decoder(_Family(job.family, decoder=lambda: causal))}
    finally:
        layers[0], layers[1] = layers[1], layers[0]


def _edited_decoder(parts, edit):
    model, spec = copy.deepcopy(parts[graph_io.DECODER_PATH])
    edit(model.graph)
    return {graph_io.DECODER_PATH: (model, spec)}


def _positions_ignored(job, parts):
    def edit(graph: onnx.GraphProto):
        for tensor in graph.initializer:
            if tensor.name in ("cos_cache", "sin_cache"):
                table = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(np.repeat(table[:1], len(table), axis=0), tensor.name))

    return _edited_decoder(parts, edit)


def _keys_and_values_of_the_cache_swapped(job, parts):
    def edit(graph: onnx.GraphProto):
        names = {graph_io.present_key(0): graph_io.present_value(0), graph_io.present_value(0): graph_io.present_key(0)}
        for node in graph.node:
            for i, name in enumerate(node.output):
                node.output[i] = names.get(name, name)

    return _edited_decoder(parts, edit)


def _attention_scale_dropped(job, parts):
    def edit(graph: onnx.GraphProto):
        node = next(n for n in graph.node if n.op_type == "GroupQueryAttention")
        for attribute in list(node.attribute):
            if attribute.name == "scale":
                node.attribute.remove(attribute)
        node.attribute.append(helper.make_attribute("scale", 1.0))

    return _edited_decoder(parts, edit)


@pytest.mark.parametrize(
    ("mutate", "refused_by"),
    [
        (_next_block_s_weights, "image features"),
        (_one_block_too_many, "image features"),
        (_embeddings_norm_skipped, "image features"),
        (_norm_after_the_exit, "image features"),
        (_cls_kept_and_the_last_patch_dropped, "image features"),
        (_embedding_rows_off_by_one, "logits"),
        (_decoder_layers_swapped, "logits"),
        (_positions_ignored, "logits"),
        (_keys_and_values_of_the_cache_swapped, "logits"),
        (_attention_scale_dropped, "logits"),
    ],
)
def test_a_wrong_graph_is_refused(job, parts, tmp_path, mutate, refused_by):
    changed = mutate(job, parts)
    assert set(changed) <= set(parts)
    with pytest.raises(ParityError, match=refused_by):
        check(job, {**parts, **changed}, tmp_path / "b")


def test_a_swapped_cache_hides_from_the_prefill_alone(job, parts, tmp_path):
    # Why the logits are compared with a cache too: the first token is right.
    wrong = {**parts, **_keys_and_values_of_the_cache_swapped(job, parts)}
    write(job, tmp_path / "b", wrong, FP32, {})
    session = parity.open_session(tmp_path / "b")
    image, prompt = probes(job)[0]
    inputs = parity.processed(job.family, image, prompt)
    ids = inputs["input_ids"]
    logits, _ = session.prefill(session.vision_states(image, [Exit(3)])[Exit(3)], ids[0].tolist())
    want = job.family.oracle_logits(ids, inputs, Exit(3))[-1].numpy()
    assert parity.relative(logits[0, -1], want) < FLOAT_RELATIVE


@pytest.mark.parametrize(
    ("change", "refused_by"),
    [
        ({"chat": "suffix"}, "prompt's ids"),
        ({"image_spec": "mean"}, "image features"),
        ({"image_spec": "resample"}, "image features"),
    ],
)
def test_wrong_words_around_the_prompt_or_wrong_preprocessing_are_refused(job, parts, tmp_path, change, refused_by):
    if change.get("image_spec") == "mean":
        change = {"image_spec": replace(job.family.image_spec, mean=(0.5, 0.5, 0.5))}
    elif change.get("chat") == "suffix":
        change = {"chat": replace(job.family.chat, suffix=" ASSISTANT")}
    elif change.get("image_spec") == "resample":
        change = {"image_spec": replace(job.family.image_spec, resample="nearest")}
    family = copy.copy(job.family)
    for name, value in change.items():
        setattr(family, name, value)
    with pytest.raises(ParityError, match=refused_by):
        check(replace(job, family=family), parts, tmp_path / "b")


def test_another_number_of_image_tokens_is_refused_before_anything_is_asked(job, parts, tmp_path):
    family = copy.copy(job.family)
    family.geometry = replace(family.geometry, image_tokens=35)
    with pytest.raises(BundleError, match="image_features is"):
        check(replace(job, family=family), parts, tmp_path / "b")


def _write_checked(job, text, folder: Path, accept: bool = False) -> Bundle:
    export_module._write_checked(job, open_sketch(job.model_dir), "int8-dynamic", text, accept, folder)
    return Bundle.open(folder / NEW)


def _bits(bundle: Bundle) -> set[int]:
    graph = onnx.load(bundle.graph_path(graph_io.DECODER_PATH)).graph
    return {a.i for n in graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "bits"}


def _break(monkeypatch, broken: str):
    """Make one scheme lose its scales, and let the answers alone be the judge of it."""
    right = stream.quantize
    monkeypatch.setattr(compare, "PIECE_QUANTIZED", float("inf"))

    def wrong(model, scheme, *more):
        model = right(model, scheme, *more)
        for tensor in model.graph.initializer:
            if "scale" in tensor.name and scheme == broken:
                tensor.CopyFrom(numpy_helper.from_array(np.ones_like(numpy_helper.to_array(tensor)), tensor.name))
        return model

    monkeypatch.setattr(stream, "quantize", wrong)


@pytest.mark.parametrize(("scheme", "bits"), [("int4-block32", 4), ("int8-block32", 8)])
def test_quantized_graphs_keep_the_trained_model_s_answers(trained_job, tmp_path, scheme, bits):
    bundle = _write_checked(trained_job, scheme, tmp_path)
    assert _bits(bundle) == {bits, 8}  # the head always
    assert set(bundle.manifest.parity["answer_figures"]) == {str(exit) for exit in trained_job.ladder}
    assert bundle.manifest.parity["schemes_why"] == {scheme: "taken"}


@pytest.mark.parametrize("broken", ["int4-block32", "int8-dynamic", "int8-table"])
def test_dropped_scales_in_any_quantized_graph_are_refused(trained_job, tmp_path, monkeypatch, broken):
    _break(monkeypatch, broken)
    with pytest.raises(ParityError, match="quantization changes the answers"):
        _write_checked(trained_job, "int4-block32", tmp_path)


@pytest.mark.parametrize("broken", [1, 2])
def test_auto_takes_the_next_finer_scheme_where_one_changes_answers_and_says_so(trained_job, tmp_path, monkeypatch, broken):
    for scheme in AUTO[:broken]:
        _break(monkeypatch, scheme)
    bundle = _write_checked(trained_job, "auto", tmp_path)
    assert _bits(bundle) == ({8} if AUTO[broken].startswith("int8") else {4, 8})
    assert bundle.manifest.quantization == {"vision": "int8-dynamic", "text": AUTO[broken]}
    assert set(bundle.manifest.parity["schemes_tried"]) == set(AUTO[: broken + 1])
    assert all("below" in bundle.manifest.parity["schemes_why"][scheme] for scheme in AUTO[:broken])
    assert "damage" not in bundle.manifest.parity
    assert bundle.manifest.parity["schemes_why"][AUTO[broken]] == "taken"


def test_a_scheme_that_answers_well_but_reads_plain_text_otherwise_is_refused_or_says_so_for_ever(trained_job, tmp_path):
    # Blocks of 128 keep this model's short answers; its distributions over text have moved by 0.08 nats.
    with pytest.raises(ParityError, match="plain text: .* divergence 0.0[5-9]") as caught:
        _write_checked(trained_job, "int4-block128", tmp_path / "refused")
    assert "--accept-damage" in str(caught.value)
    bundle = _write_checked(trained_job, "int4-block128", tmp_path / "accepted", accept=True)
    assert "plain text" in bundle.manifest.parity["damage"]
    assert bundle.manifest.parity["schemes_why"] == {"int4-block128": bundle.manifest.parity["damage"]}
    assert bundle.manifest.parity["text_figures"]["tokens"] >= 256


@pytest.mark.parametrize("text", held_out.PASSAGES)
def test_passages_are_no_calibration_text(text):
    assert text[:40] not in calibrate.neutral_text(0)


def test_what_is_calibrated_on_is_not_what_is_asked(trained_job):
    asked = export_module.requests(trained_job, whole=True)
    examples = export_module.examples(trained_job, asked)
    assert len(examples) == 8 and not {prompt for _, prompt in examples} & {prompt for (_, prompt), _ in asked}
    alone = replace(trained_job, suite=None)
    made_up = [image.tobytes() for image, _ in export_module.examples(alone, export_module.requests(alone, whole=True))]
    assert len(set(made_up)) == 8
    assert not {image.tobytes() for (image, _), _ in export_module.requests(alone, whole=True)} & set(made_up)


def test_relative_refuses_shapes_and_values_that_compare_as_nothing():
    # NaN compares false with every bound, and shapes broadcast: both would pass a careless check.
    assert parity.relative(np.array([np.nan]), np.array([1.0])) == float("inf")
    assert parity.relative(np.zeros((1, 3)), np.zeros(3)) == float("inf")
