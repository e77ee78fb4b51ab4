"""Matrices in blocks against onnxruntime's own reading of them; compensated rounding against solving each step anew."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgesafe.errors import ConfigError, ExportError
from edgesafe.runtime.ort import open_in_memory
from edgesafe_export import block_weights, calibrate, stream
from edgesafe_export.block_weights import Blocked, Format, compensate, round_nearest
from edgesafe_export.parity_model import probes
from edgesafe_export.pieces import LAYER
from edgesafe_export.placeholders import fill
from edgesafe_export.quantize import BLOCKS, TABLE, quantize
from edgesafe_export.skeleton import open_sketch
from mutants import wrong

FORMATS = (Format(4, 32), Format(4, 32, symmetric=True), Format(8, 32), TABLE)


def _matmul(matrix: np.ndarray) -> onnx.ModelProto:
    inputs, outputs = matrix.shape
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="y")
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ("s", size)) for n, size in (("x", inputs), ("y", outputs))]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [numpy_helper.from_array(matrix, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _read_by_onnxruntime(model: onnx.ModelProto, inputs: int) -> np.ndarray:
    """The matrix [N, K]: without packed weights onnxruntime makes floats of the whole numbers and multiplies by these."""
    return open_in_memory(model.SerializeToString(), {}).run(None, {"x": np.eye(inputs, dtype=np.float32)})[0].T


@pytest.mark.parametrize("shape", [(48, 96), (20, 100), (7, 33)])
@pytest.mark.parametrize("scheme", ["int4-block32", "int8-block32", "int4-block128"])
def test_onnxruntime_reads_the_matrix_that_was_meant(shape, scheme):
    matrix = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    matrix[3] *= 50
    meant = round_nearest(matrix, BLOCKS[scheme].most).values(shape[1])
    read = _read_by_onnxruntime(quantize(_matmul(np.ascontiguousarray(matrix.T)), scheme), shape[1])
    np.testing.assert_allclose(read, meant, rtol=1e-6, atol=1e-7)
    step = np.abs(matrix).max(1, keepdims=True) * 2 / (2 ** BLOCKS[scheme].most.bits - 1)
    assert (np.abs(read - matrix) <= 0.6 * step + 1e-6).all()


@pytest.mark.parametrize("method", ["packed", "packed_zeros", "values"])
def test_a_wrong_order_of_nibbles_or_zeros_is_seen(monkeypatch, method):
    edits = {
        "packed": ("self.codes[..., ::2] | self.codes[..., 1::2] << 4", "self.codes[..., 1::2] | self.codes[..., ::2] << 4"),
        "packed_zeros": ("even[:, ::2] | even[:, 1::2] << 4", "even[:, 1::2] | even[:, ::2] << 4"),
        "values": ("- zeros", "- zeros - 1"),
    }
    monkeypatch.setattr(Blocked, method, wrong(getattr(Blocked, method), edits[method]))
    with pytest.raises(AssertionError):
        test_onnxruntime_reads_the_matrix_that_was_meant((48, 96), "int4-block32")


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e7])
def test_scales_are_float16_only_where_that_is_fine_enough(scale):
    matrix = (scale * np.random.default_rng(2).standard_normal((8, 64))).astype(np.float32)
    for form in FORMATS:
        blocked = round_nearest(matrix, form)
        assert (blocked.stored_scales().dtype == np.float16) == (scale == 1.0)
        error = np.abs(blocked.values(64) - matrix).max(1) / np.abs(matrix).max(1)
        assert error.max() < 0.51 / (form.middle - 1)
    assert not round_nearest(np.zeros((2, 64), np.float32), TABLE).values(64).any()


def _problem(inputs: int = 96, outputs: int = 5) -> tuple[np.ndarray, torch.Tensor]:
    """A matrix, and the Hessian of inputs that go together."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((400, inputs)) @ (np.eye(inputs) + 0.4 * rng.standard_normal((inputs, inputs)))
    rows *= rng.permutation(np.geomspace(0.2, 5, inputs))
    return rng.standard_normal((outputs, inputs)).astype(np.float32), torch.tensor(rows.T @ rows, dtype=torch.float32)


def _solved_anew(matrix: np.ndarray, hessian: np.ndarray, form: Format) -> np.ndarray:
    """What GPTQ means, without its factorization: after each input the weights that follow are the best ones, float64."""
    inputs = matrix.shape[1]
    hessian = hessian + 0.01 * np.diag(hessian).mean() * np.eye(inputs)
    order = np.argsort(-np.diag(hessian), kind="stable")
    done = np.zeros_like(matrix, np.float64)
    for row, out in zip(matrix.astype(np.float64), done, strict=True):
        blocks = [slice(at, at + form.size) for at in range(0, inputs, form.size)]
        steps = [_best_step(row[block], np.diag(hessian)[block], form) for block in blocks]
        now = row.copy()
        for nth, at in enumerate(order):
            scale, zero = steps[at // form.size]
            out[at] = (np.clip(np.round(now[at] / scale) + zero, 0, 2**form.bits - 1) - zero) * scale
            behind, before = order[nth + 1 :], order[: nth + 1]
            fault = hessian[np.ix_(behind, before)] @ (row[before] - out[before])
            now[behind] = row[behind] + np.linalg.solve(hessian[np.ix_(behind, behind)], fault)
    return done


def _best_step(block: np.ndarray, costs: np.ndarray, form: Format) -> tuple[float, float]:
    tried = []
    most = 2**form.bits - 1
    for share in np.linspace(1, 0.6, 21):
        low, high = min(block.min(), 0) * share, max(block.max(), 0) * share
        scale = float(np.float16((high - low) / most))
        zero = float(np.clip(np.round(-low / scale), 0, most))
        codes = np.clip(np.round(block / scale) + zero, 0, most)
        tried.append((float(((codes - zero) * scale - block) ** 2 @ costs), scale, zero))
    return min(tried)[1:]


@pytest.mark.parametrize("inputs", [96, 192])
def test_compensated_rounding_is_each_step_solved_anew(inputs):
    matrix, hessian = _problem(inputs)
    form = Format(4, 32)
    np.testing.assert_allclose(
        compensate(matrix, hessian, form).values(inputs), _solved_anew(matrix, hessian.numpy(), form), atol=2e-3
    )


COMPENSATE = [
    ("rest[:, end:] -= errors @ factor[start:end, end:]", "pass"),
    ("part[:, at - start + 1 :] -= ", "part[:, at - start + 1 :] += "),
    ("/ factor[at, at]", ""),
    ("costs.reshape(-1, form.size)", "torch.ones(inputs).reshape(-1, form.size)"),
]


@pytest.mark.parametrize("edit", COMPENSATE, ids=["blocks apart", "sign", "scale", "search unweighted"])
def test_wrong_compensation_is_seen(monkeypatch, edit):
    mutant = wrong(block_weights.compensate, edit)
    matrix, hessian = _problem(192)
    want = _solved_anew(matrix, hessian.numpy(), Format(4, 32))
    assert np.abs(mutant(matrix, hessian, Format(4, 32)).values(192) - want).max() > 0.01


def _cost(matrix: np.ndarray, blocked: Blocked, hessian: torch.Tensor) -> float:
    error = torch.from_numpy(blocked.values(matrix.shape[1]) - matrix)
    return float((error @ hessian * error).sum())


def test_outputs_are_closer_than_by_rounding_to_nearest_also_where_an_input_was_never_read():
    matrix, hessian = _problem()
    for never in (False, True):
        if never:
            hessian[7], hessian[:, 7] = 0, 0
        compensated = compensate(matrix, hessian, Format(4, 32))
        assert _cost(matrix, compensated, hessian) < 0.6 * _cost(matrix, round_nearest(matrix, Format(4, 32)), hessian)
    assert np.abs(compensated.values(96)[:, 7] - matrix[:, 7]).max() < 0.5  # its weights are kept, not dropped


def test_inputs_that_go_together_too_well_are_damped_more_and_broken_ones_are_refused():
    matrix, _ = _problem()
    row = torch.linspace(1, 1e4, 96)[None]
    one = compensate(matrix, row.T @ row, Format(4, 32))  # of rank one, over eight magnitudes
    assert np.isfinite(one.values(96)).all()
    with pytest.raises(ExportError, match="can't be used"):
        compensate(matrix, torch.full((96, 96), float("nan")), Format(4, 32))


@pytest.fixture
def few_tokens(monkeypatch):
    monkeypatch.setattr(calibrate, "CALIBRATION_TOKENS", 192)
    monkeypatch.setattr(calibrate, "CALIBRATION_WINDOW", 64)


def _layers(deep, pieces, folder, scheme="mixed-gptq", seed=0, broken=None) -> list[bytes]:
    """The bytes of a deep checkpoint's quantized layers."""
    sketch = open_sketch(deep)
    rows = probes([], 4, sketch.family.geometry.image_size)
    chosen = pieces[: pieces.index(broken)] if broken else pieces
    stream.make_pieces(sketch, chosen, {"vision": "fp32", "text": scheme}, folder, rows[0], rows[1:], seed)
    return [(folder / scheme / piece.name).read_bytes() for piece in chosen if piece.kind == LAYER]


@pytest.fixture(scope="module")
def deep_pieces(deep):
    from edgesafe.format.exits import Exit

    return stream.trace_pieces(open_sketch(deep), (Exit(2), Exit(3)), "chain")


def test_a_calibrated_export_is_the_same_again_also_when_it_was_cut_off(deep, deep_pieces, tmp_path, few_tokens):
    first = _layers(deep, deep_pieces, tmp_path / "a")
    third = [piece for piece in deep_pieces if piece.kind == LAYER][3]
    _layers(deep, deep_pieces, tmp_path / "b", broken=third)
    assert _layers(deep, deep_pieces, tmp_path / "b") == first
    assert _layers(deep, deep_pieces, tmp_path / "c", seed=1) != first
    left = sorted(path.name for path in (tmp_path / "a" / "mixed-gptq" / "calibration").iterdir())
    assert left == ["before_004", "before_005"]  # not one per layer


def test_hessians_are_those_of_what_torch_s_matrices_read(deep, deep_pieces, tmp_path, few_tokens):
    sketch = open_sketch(deep)
    rows = probes([], 3, sketch.family.geometry.image_size)
    calibration = calibrate.Calibration(sketch, deep_pieces, rows, 0, tmp_path / "c")
    piece = next(piece for piece in deep_pieces if piece.kind == LAYER)
    found = calibration.hessians(piece, fill(piece.blueprint, sketch.load(piece.weights)))
    sources = {name: piece.blueprint.sources[name].rows[0].name.rpartition("layers.0.")[2] for name in found}
    windows = calibration._windows()
    assert [len(window) for window in windows] == [64, 32, 64, 32]
    turns = sketch.family.processor.tokenizer.decode(windows[2])
    assert "ASSISTANT:" in turns and "ASSISTANT:" not in sketch.family.processor.tokenizer.decode(windows[0])
    want = _by_hooks(deep, rows, windows, [source.removesuffix(".weight") for source in sources.values()])
    assert len(found) == 4
    for name, sums in found.items():
        torch.testing.assert_close(sums, want[sources[name].removesuffix(".weight")], rtol=1e-3, atol=1e-3)


def _by_hooks(folder, rows, windows, names) -> dict[str, torch.Tensor]:
    """The oracle: transformers' whole model reads the same requests and the same text."""
    from edgesafe_export.family import load_family
    from edgesafe_export.parity_model import processed

    family = load_family(folder)
    layer = family.decoder().model.layers[0]
    sums: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(_, args):
            rows_ = args[0].reshape(-1, args[0].shape[-1])
            sums[name] = sums.get(name, 0) + rows_.T @ rows_

        return hook

    for name in names:
        layer.get_submodule(name).register_forward_pre_hook(keep(name))
    with torch.no_grad():
        for image, prompt in rows:
            inputs = processed(family, image, prompt)
            family.oracle_logits(inputs["input_ids"], inputs, family.geometry.reference)
        for window in windows:
            family.decoder()(torch.tensor([window]))
    return sums


def test_the_last_matrix_of_a_layer_and_the_head_have_eight_bits(parts):
    model = quantize(parts["text/decoder_model_merged.onnx"][0], "int8-block32")
    head = [node for node in model.graph.node if node.op_type == "MatMulNBits"][-1]
    assert {a.name: a.i for a in head.attribute}["block_size"] == TABLE.size and head.output[0] == "logits"


def test_damage_is_accepted_of_a_scheme_by_its_name_alone():
    from edgesafe_export.quantize import check_schemes

    check_schemes("fp32", "int4-block128", accept_damage=True)
    with pytest.raises(ConfigError, match="does no damage"):
        check_schemes("fp32", "auto", accept_damage=True)


def test_a_head_that_is_the_embedding_is_written_once_and_both_graphs_read_it(tmp_path):
    import json

    from edgesafe.device import load_device
    from edgesafe_export import export
    from edgesafe_export.family import load_family
    from edgesafe_export.parity_model import open_session
    from tiny_families import make_tiny

    folder = make_tiny("llava_onevision", tmp_path / "m", tied=True)
    family = load_family(folder)
    assert family.tied
    job = export.Job(family, folder, "tied", "0" * 64, load_device("rpi5"), "chain", (family.geometry.reference,), None, {}, 0)
    schemes = {"vision": "fp32", "text": "int8-block32"}
    parts = {p: (quantize(m, stream.scheme_of(p, **schemes)), s) for p, (m, s) in export.trace(job).items()}
    export.write(job, tmp_path / "b", parts, schemes, {})
    graphs = [onnx.load(tmp_path / "b" / path, load_external_data=False).graph for path in parts if path.startswith("text/")]
    places = [
        {json.dumps([(e.key, e.value) for e in t.external_data]) for t in g.initializer if t.external_data} for g in graphs
    ]
    shared = places[0] & places[1]
    assert shared and places[0] == shared
    table = family.embed_tokens().weight.detach().numpy()
    with open_session(tmp_path / "b") as session:
        ids = np.arange(len(table))[None]
        rows = session.graph(session.manifest.text.embed_tokens).run({"input_ids": ids})["inputs_embeds"][0]
    np.testing.assert_allclose(rows, round_nearest(table, TABLE).values(table.shape[1]), rtol=1e-6)


def test_an_untied_head_shares_nothing(trained_job, trained_parts, tmp_path):
    from edgesafe_export import export

    assert not trained_job.family.tied
    schemes = {"vision": "fp32", "text": "int4-block32"}
    parts = {p: (quantize(m, stream.scheme_of(p, **schemes)), s) for p, (m, s) in trained_parts.items()}
    export.write(trained_job, tmp_path / "b", parts, schemes, {})
    assert not (tmp_path / "b/text/weights.bin").exists()
