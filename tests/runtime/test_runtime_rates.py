"""A machine's rates without a bundle: graphs that the onnx package takes, figures by hand, and a profile that predicts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from edgesafe import cli
from edgesafe.device import load_device, profile_text
from edgesafe.errors import DeviceError
from edgesafe.machine import machine_name
from edgesafe.runtime import OnnxRuntime, rates
from edgesafe.runtime.rate_graphs import attention, decoder, feed_forward, feeds
from edgesafe.runtime.rates import Sizes, measured_profile

SMALL = Sizes(tokens=64, width=64, heads=4, layers=2, text_width=64, inner=96, part=8, small_layers=3, small=32)
MAKERS = {
    "int8": lambda path: feed_forward(path, 8, 32, "int8"),
    "fp32": lambda path: feed_forward(path, 8, 32, "fp32"),
    "attention": lambda path: attention(path, 8, 32, 4),
    "decoder": lambda path: decoder(path, 2, 32, 64),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_graphs_are_onnx_s_own_and_run(tmp_path, name):
    spec = MAKERS[name](tmp_path / name)
    model = onnx.load(tmp_path / name)
    if name != "decoder":  # onnxruntime's own norm, which its fusions make, is unknown to onnx
        onnx.checker.check_model(model)
    assert [value.name for value in model.graph.input] == [tensor.name for tensor in spec.inputs]
    assert sum(onnx.numpy_helper.to_array(t).nbytes for t in model.graph.initializer) == spec.weight_bytes
    out = OnnxRuntime().open(str(tmp_path / name), spec, 1).run(feeds(spec, 3))
    assert all(np.isfinite(array).all() and array.any() for array in out.values())


def test_a_plain_product_is_what_numpy_makes_of_the_same_weights(tmp_path):
    spec = MAKERS["fp32"](tmp_path / "g")
    w = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "g").graph.initializer}
    x = feeds(spec, 0)["hidden_states"]
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w["w0"] + w["w1"]
    inner = normed @ w["w2"]
    (out,) = OnnxRuntime().open(str(tmp_path / "g"), spec, 1).run({"hidden_states": x}).values()
    assert np.allclose(out, x + (inner / (1 + np.exp(-inner))) @ w["w3"], atol=1e-4)


def test_what_is_measured_is_a_profile_that_is_read_again(tmp_path, monkeypatch):
    # So small that reading takes no time that could be told from the fixed costs; that the figures are right is `_solve`'s.
    monkeypatch.setattr(rates, "_solve", lambda ms, *_: dict.fromkeys(("gops_int8", "read_gb_s"), 2.0) if all(ms) else {})
    base = replace(load_device("rpi5"), title='A "board"')
    made = measured_profile(base, threads=1, seconds=0.0, sizes=SMALL)
    (tmp_path / "board.toml").write_text(profile_text(made), encoding="utf-8")
    read = load_device(tmp_path / "board.toml")
    assert read == replace(made, name="board") and read.estimates == {"gops_int8": 2.0, "read_gb_s": 2.0}
    assert (read.threads, read.measured_on, read.text_scheme) == (1, machine_name(), base.text_scheme)
    assert "edgesafe devices measure" in read.sources["gops_int8"] and read.sources["memory_mib"] == base.sources["memory_mib"]


@pytest.mark.parametrize(("job", "ms"), [("attention", 0.1), ("decode", 0.5), ("graph", 9.0)])
def test_times_that_contradict_each_other_are_no_figures(job, ms):
    times = {"int8": 1.6, "fp32": 3.2, "attention": 4.6, "prefill": 1.0, "decode": 3.0, "layers": 2.5, "graph": 0.5}
    assert rates._solve(times, 1000, SMALL)["gops_int8"] > 0
    with pytest.raises(DeviceError, match="contradict"):
        rates._solve(times | {job: ms}, 1000, SMALL)


def test_the_command_writes_a_profile_and_shows_it(tmp_path, monkeypatch, capsys):
    made = replace(load_device("rpi5"), estimates={"gops_int8": 123.0}, sources={"gops_int8": "here"}, measured_on="a board")
    monkeypatch.setattr(rates, "measured_profile", lambda base, **_: made if base.name == "rpi5" else None)
    out = tmp_path / "board.toml"
    assert cli.main(["devices", "measure", str(out), "--like", "rpi5"]) == 0
    assert "123" in capsys.readouterr().out and load_device(out).measured_on == "a board"
    for words in ([str(tmp_path / "board.json")], [str(out), "--seconds", "0"], [str(tmp_path / "none" / "b.toml")]):
        assert cli.main(["devices", "measure", *words]) == 10
    heats = iter([SimpleNamespace(), SimpleNamespace()])
    monkeypatch.setattr("edgesafe.machine.read_heat", lambda: next(heats))
    monkeypatch.setattr("edgesafe.machine.slowed", lambda *_: ("it is throttled",))
    assert cli.main(["devices", "measure", str(out), "--like", "rpi5", "--json"]) == 0
    assert "slowed down: it is throttled" in capsys.readouterr().err
