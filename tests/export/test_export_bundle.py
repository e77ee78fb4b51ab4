"""The exporter on a tiny random checkpoint: parity that can fail, weights once, both layouts, nothing half done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from edgesafe.bundle import Bundle
from edgesafe.device import load_device
from edgesafe.errors import ConfigError, InputError, ParityError, UnsupportedModelError
from edgesafe_export import export as export_module
from edgesafe_export import export_bundle, parity
from edgesafe_export.family import load_family

FLOAT = {"vision_scheme": "fp32", "text_scheme": "fp32"}


@pytest.fixture(scope="module")
def family(tiny_llava: Path):
    return load_family(tiny_llava)


def _probes():
    return parity.probes((), 4, 64)


def _graph_bytes(bundle: Bundle) -> int:
    return sum(f.bytes for p, f in bundle.manifest.files.items() if p.startswith(("vision/", "text/")))


def test_float_graphs_equal_transformers_at_every_depth(family, tiny_bundle):
    errors = parity.check_features(family, parity.open_session(tiny_bundle), _probes())
    assert list(errors) == [1, 2, 3] and max(errors.values()) < 1e-5


@pytest.mark.parametrize("shift", [1, -1])
def test_parity_fails_when_the_depth_is_off_by_one(family, tiny_bundle, shift):
    with pytest.raises(ParityError, match="differs from transformers"):
        parity.check_features(family, parity.open_session(tiny_bundle), _probes(), shift=shift)


def test_whole_answers_equal_transformers_generate(family, tiny_bundle):
    assert parity.check_text(family, parity.open_session(tiny_bundle), _probes()) == 4


def test_every_weight_once(tiny_llava, tiny_bundle, tmp_path):
    deepest = export_bundle(tiny_llava, tmp_path / "deepest", load_device("host"), exits="3", **FLOAT)
    assert deepest.manifest.depths == (3,)
    assert _graph_bytes(Bundle.open(tiny_bundle)) <= 1.05 * _graph_bytes(deepest)


def test_standalone_exits_give_the_chain_s_features(tiny_llava, tiny_bundle, tmp_path):
    bundle = export_bundle(tiny_llava, tmp_path / "standalone", load_device("host"), layout="standalone", **FLOAT)
    assert all(len(e.graphs) == 1 for e in bundle.manifest.exits)
    chain, whole = parity.open_session(tiny_bundle), parity.open_session(bundle.root)
    picture = Image.radial_gradient("L").convert("RGB")
    for depth, features in chain.vision_states(picture, (1, 2, 3)).items():
        np.testing.assert_allclose(whole.vision_states(picture, (depth,))[depth], features, rtol=1e-4, atol=1e-5)
    assert _graph_bytes(bundle) < 1.1 * _graph_bytes(Bundle.open(tiny_bundle))


def test_a_quantization_that_changes_answers_is_refused(tiny_llava, tmp_path):
    # Random weights sit near ties: four bits change their answers, so there must be no bundle.
    with pytest.raises(ParityError, match="quantization changes the answers"):
        export_bundle(tiny_llava, tmp_path / "out", load_device("host"), vision_scheme="fp32", text_scheme="int4-block32")
    assert list(tmp_path.iterdir()) == []


def _copy(tiny_llava: Path, to: Path) -> Path:
    return Path(shutil.copytree(tiny_llava, to))


def test_other_families_are_named_and_refused(tiny_llava, tmp_path):
    folder = _copy(tiny_llava, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mllama"}))
    with pytest.raises(UnsupportedModelError, match="llava"):
        export_bundle(folder, tmp_path / "out", load_device("host"), **FLOAT)


def test_weights_that_are_not_numbers_are_refused(tiny_llava, tmp_path):
    folder = _copy(tiny_llava, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("q_proj.weight"))
    weights[name][0, 0] = float("nan")
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
    assert not (tmp_path / "out").exists()


def test_unknown_schemes_and_exits_are_config_errors(tiny_llava, tmp_path):
    with pytest.raises(ConfigError, match="int3"):
        export_bundle(tiny_llava, tmp_path / "out", load_device("host"), text_scheme="int3")
    with pytest.raises(ConfigError):
        export_bundle(tiny_llava, tmp_path / "out", load_device("host"), exits="9", **FLOAT)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupt_leaves_the_older_bundle_untouched(tiny_llava, tiny_bundle, tmp_path, monkeypatch, stop):
    out = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    before = Bundle.open(out).digest

    def fail(*_args, **_kwargs):
        raise stop

    monkeypatch.setattr(export_module, "write_manifest", fail)
    with pytest.raises((KeyboardInterrupt, OSError)):
        export_bundle(tiny_llava, out, load_device("host"), **FLOAT)
    assert Bundle.open(out).digest == before
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
