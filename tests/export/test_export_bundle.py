"""The exporter on a tiny random checkpoint: weights once, both layouts, the manifest, nothing half done."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from edgesafe.cli import main
from edgesafe.device import load_device, profile_of
from edgesafe.errors import ConfigError, InputError
from edgesafe.format.bundle import Bundle
from edgesafe.format.exits import Exit
from edgesafe_export import export as export_module
from edgesafe_export import export_bundle
from edgesafe_export import parity_model as parity
from edgesafe_export.export import write
from edgesafe_export.quantize import quantize
from edgesafe_export.stream import scheme_of

FLOAT = {"vision_scheme": "fp32", "text_scheme": "fp32"}
PICTURE = Image.radial_gradient("L").convert("RGB")


def _graph_bytes(bundle: Bundle) -> int:
    return sum(f.bytes for p, f in bundle.manifest.files.items() if p.startswith(("vision/", "text/")))


def _written(job, parts, folder: Path, vision: str = "fp32", text: str = "fp32") -> Bundle:
    """A bundle of traced parts in a scheme, without the parity checks."""
    chosen = {path: (quantize(m, scheme_of(path, vision, text)), spec) for path, (m, spec) in parts.items()}
    write(job, folder, chosen, {"vision": vision, "text": text}, {})
    return Bundle.open(folder)


def test_all_exits_take_the_bytes_of_the_deepest_one(trained_job, trained_parts, tmp_path):
    # A ladder of the reference model against its deepest exit alone, in whole bundles' bytes; text graphs are the same ones.
    last = trained_job.family.geometry.reference
    ladder, deepest = (
        replace(trained_job, ladder=(*map(Exit, range(1, last.depth, 2)), last)),
        replace(trained_job, ladder=(last,)),
    )
    text = {path: part for path, part in trained_parts.items() if path.startswith("text/")}
    traced = [{**export_module.trace(job, text=False), **text} for job in (ladder, deepest)]
    for schemes in (("fp32", "fp32"), ("int8-dynamic", "int4-block32")):
        sizes = []
        for job, parts in zip((ladder, deepest), traced, strict=True):
            bundle = _written(job, parts, tmp_path / f"{len(job.ladder)} {schemes[0]}", *schemes)
            sizes.append(sum(path.stat().st_size for path in bundle.root.rglob("*") if path.is_file()))
        assert sizes[0] <= 1.05 * sizes[1], (schemes, sizes)


def test_standalone_weights_once_too(job, parts, standalone_parts, tmp_path):
    bundle = _written(replace(job, layout="standalone"), standalone_parts, tmp_path / "standalone")
    assert all(len(e.graphs) == 1 for e in bundle.manifest.exits)
    assert _graph_bytes(bundle) < 1.1 * _graph_bytes(_written(job, parts, tmp_path / "chain"))


@pytest.mark.parametrize("vision", ["fp32", "int8-dynamic"])
def test_standalone_exits_give_the_chain_s_features(job, parts, standalone_parts, tmp_path, vision):
    alone = replace(job, layout="standalone")
    whole = parity.open_session(_written(alone, standalone_parts, tmp_path / "standalone", vision).root)
    chain = parity.open_session(_written(job, parts, tmp_path / "chain", vision).root)
    for exit, features in chain.vision_states(PICTURE, chain.manifest.ladder).items():
        np.testing.assert_allclose(whole.vision_states(PICTURE, (exit,))[exit], features, rtol=1e-4, atol=1e-5)


def test_a_standalone_graph_loads_outside_of_edgesafe(job, standalone_parts, tmp_path):
    import onnxruntime as ort

    bundle = _written(replace(job, layout="standalone"), standalone_parts, tmp_path / "b")
    path = str(bundle.graph_path("vision/exit_03.onnx"))
    onnx.checker.check_model(path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (features,) = session.run(None, {"pixel_values": np.zeros((1, 3, 72, 72), np.float32)})
    assert features.shape == (36, 64)


def test_the_command_writes_a_bundle_and_says_what_it_measured(tiny_llava, tmp_path, capsys):
    out = tmp_path / "new" / "bundle"
    schemes = ["--vision-scheme", "fp32", "--text-scheme", "fp32"]
    assert main(["export", str(tiny_llava), "--device", "host", "--out", str(out), "--exits", "2", "--json", *schemes]) == 0
    report = json.loads(capsys.readouterr().out)
    bundle = Bundle.open(out)
    assert report["digest"] == bundle.digest and report["exits"] == ["2", "3"] and report["bundle"] == str(out)
    assert report["parity"]["float_relative"].keys() == report["parity"]["logits_relative"].keys() == {"2", "3"}
    manifest = bundle.manifest
    assert manifest.name == tiny_llava.name and manifest.family == "llava" and manifest.reference == Exit(3)
    assert (manifest.image_tokens, manifest.text.num_layers, manifest.n_blocks) == (36, 2, 4)
    assert manifest.chat.prefix.count("<image>") == 1 and manifest.chat.suffix.strip() == "ASSISTANT:"
    assert str(tmp_path) not in (out / "manifest.json").read_text()
    assert [p.name for p in out.parent.iterdir()] == ["bundle"]


def test_the_bundle_keeps_a_device_profile_of_ones_own(job, parts, tmp_path):
    own = replace(load_device("rpi5"), name="my-board", title="my board", threads=3)
    profile = {k: v for k, v in vars(own).items() if k != "name"}
    bundle = _written(replace(job, device=own, config={"device_profile": profile}), parts, tmp_path / "b")
    assert profile_of(bundle) == own


def _copy(tiny_llava: Path, to: Path) -> Path:
    return Path(shutil.copytree(tiny_llava, to))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused(tiny_llava, tmp_path, value):
    folder = _copy(tiny_llava, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("q_proj.weight"))
    weights[name][0, 0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="not finite"):
        export_bundle(folder, tmp_path / "out", load_device("host"), **FLOAT)


def test_missing_and_truncated_weights_are_refused(tiny_llava, tmp_path):
    folder = _copy(tiny_llava, tmp_path / "model")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError):
        export_bundle(folder, tmp_path / "out", load_device("host"), **FLOAT)
    weights = load_file(tiny_llava / "model.safetensors")
    weights.pop(sorted(weights)[3])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="missing"):
        export_bundle(folder, tmp_path / "out", load_device("host"), **FLOAT)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError):
        export_bundle(folder, tmp_path / "out", load_device("host"), **FLOAT)
    with pytest.raises(InputError):
        export_bundle(tmp_path / "nowhere", tmp_path / "out", load_device("host"), **FLOAT)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_unknown_schemes_layouts_and_exits(tiny_llava, tmp_path):
    with pytest.raises(ConfigError, match="int3"):
        export_bundle(tiny_llava, tmp_path / "out", load_device("host"), text_scheme="int3")
    with pytest.raises(InputError, match="ring"):
        export_bundle(tiny_llava, tmp_path / "out", load_device("host"), layout="ring", **FLOAT)
    with pytest.raises(ConfigError):
        export_bundle(tiny_llava, tmp_path / "out", load_device("host"), exits="9", **FLOAT)


def test_a_folder_that_is_no_bundle_is_never_replaced(tiny_llava, tmp_path):
    # `--out .` or `--out MODEL` must not delete what is there.
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "notes", tmp_path / "file", tiny_llava):
        with pytest.raises(ConfigError, match="isn't a bundle"):
            export_bundle(tiny_llava, out, load_device("host"), **FLOAT)
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"
    assert (tiny_llava / "config.json").is_file()


STOPS = [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]


@pytest.mark.parametrize("stop", STOPS, ids=["ctrl-c", "disk full"])
@pytest.mark.parametrize("at", ["save", "write_manifest", "copyfile"])
def test_a_stopped_export_leaves_the_older_bundle_untouched(
    tiny_llava, tiny_bundle, tiny_pieces, tmp_path, monkeypatch, capsys, stop, at
):
    out = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    before = Bundle.open(out).digest

    def fail(*_args, **_kwargs):
        raise stop

    owner = {"save": export_module.onnx, "write_manifest": export_module, "copyfile": export_module.shutil}[at]
    monkeypatch.setattr(export_module, "trace_pieces", lambda *_: tiny_pieces)
    monkeypatch.setattr(owner, at, fail)
    schemes = ["--vision-scheme", "fp32", "--text-scheme", "fp32"]
    code = main(["export", str(tiny_llava), "--device", "host", "--out", str(out), *schemes])
    assert code == (130 if isinstance(stop, KeyboardInterrupt) else 1)
    assert ("interrupted" if code == 130 else "disk is full") in capsys.readouterr().err
    assert Bundle.open(out).digest == before
    # What was finished is kept for the next try; nothing reads it as a bundle.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "bundle.partial"]


def test_graphs_do_not_say_where_they_were_made(tiny_bundle):
    graphs = sorted(tiny_bundle.rglob("*.onnx"))
    assert len(graphs) > 3
    for path in graphs:
        assert b".py" not in path.read_bytes() and b"stack_trace" not in path.read_bytes(), path.name
        assert not any(node.metadata_props for node in onnx.load(path, load_external_data=False).graph.node)
