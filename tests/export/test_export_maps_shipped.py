"""A mapped bundle as it ships: every door of the runtime runs an exit's map, and the certificate is of its bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from edgesafe.certify.certify import certify
from edgesafe.certify.smoke import smoke
from edgesafe.device import load_device
from edgesafe.errors import CertificateMismatchError, IntegrityError
from edgesafe.format import graph_io
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import write_certificate
from edgesafe.format.exits import Exit
from edgesafe.runtime import Budget
from edgesafe.runtime.measure import measure
from edgesafe.runtime.session import Session
from edgesafe_export import export as export_module
from edgesafe_export import export_bundle
from handmade import widen_limits
from mutations import reseal
from tiny_maps import FULL, mapped_copy

HOST = load_device("host")
LADDER = (Exit(1), Exit(3))  # 3 is the reference
RANKS = {1: FULL, 2: 4}
MAP_1 = graph_io.map_path(1)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8))


@pytest.fixture(scope="module")
def shipped(tiny_llava, tmp_path_factory) -> Path:
    """A mapped checkpoint exported whole, two exits, with a suite, compared with transformers' whole model."""
    from edgesafe.reference.data import write_split

    base = tmp_path_factory.mktemp("shipped")
    write_split(base / "suite", "cert", scale=0.01)
    widen_limits(base / "suite")
    folder = mapped_copy(tiny_llava, base / "m", RANKS)
    export_bundle(folder, base / "b", HOST, exits="1,3", vision_scheme="fp32", text_scheme="fp32", suite_dir=base / "suite")
    return base / "b"


def test_a_mapped_bundle_is_asked_measured_certified_and_smoked(shipped, copy_of):
    root = copy_of(shipped)
    bundle = Bundle.open(root)
    assert bundle.manifest.parity["check"] == "whole model" and MAP_1 in bundle.manifest.graphs
    certificate = certify(root, progress=False)
    passed = tuple(replace(e, verdict="passed", reasons=[]) for e in certificate.exits)
    write_certificate(bundle, replace(certificate, exits=passed))
    assert [str(e.exit) for e in smoke(root).exits] == ["1", "3"]
    assert measure(root, threads=1, seconds=0.1).segments.keys() == {p for e in bundle.manifest.exits for p in e.graphs}
    with Session.open(root, threads=1) as session:
        features = session.vision_states(PICTURE, LADDER)
        for exit in LADDER:
            want = session.answer_features(features[exit], "What?", 8)
            assert session.ask(PICTURE, "What?", exit=exit, max_new_tokens=8).text == want
            talk = session.conversation(PICTURE, exit=exit)
            assert [talk.ask("What?", max_new_tokens=8).text for _ in range(2)] == [want, want]
        predicted = session.predict(100)
        assert MAP_1 in predicted.rounds
        for ms, taken in ((1e6, 3), (1e-3, 1)):
            assert session.ask(PICTURE, "What?", Budget(ms, on_miss="shallowest"), max_new_tokens=2).exit == Exit(taken)


def test_another_map_is_not_the_certified_one(shipped, copy_of):
    """A map can be trained to open a model (`tests/long/open_map.py`), so no other may run under the certificate."""
    root = copy_of(shipped)
    bundle, certificate = Bundle.open(root), certify(root, progress=False)
    passed = tuple(replace(e, verdict="passed", reasons=[]) for e in certificate.exits)
    write_certificate(bundle, replace(certificate, exits=passed))
    with Session.open(root, threads=1) as session:
        said = session.ask(PICTURE, "What?", exit=Exit(1), max_new_tokens=8).text
    model = onnx.load(root / MAP_1)
    for weight in model.graph.initializer:  # as large, and as well formed
        weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    onnx.save(model, root / MAP_1)
    for door in (lambda: Session.open(root, threads=1), lambda: smoke(root), lambda: certify(root, progress=False)):
        with pytest.raises(IntegrityError, match=MAP_1):
            door()
    reseal(root, forge=False)
    for door in (lambda: Session.open(root, threads=1), lambda: smoke(root)):
        with pytest.raises(CertificateMismatchError):
            door()
    with Session.open(root, threads=1, allow_uncertified=True) as session:
        assert session.ask(PICTURE, "What?", exit=Exit(1), max_new_tokens=8).text != said


def test_a_large_mapped_model_is_exported_in_pieces(shipped, tiny_llava, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "WHOLE_WEIGHTS", 0)
    folder = mapped_copy(tiny_llava, tmp_path / "m", RANKS)
    small = export_bundle(folder, tmp_path / "b", HOST, exits="1,3", vision_scheme="int8-dynamic", text_scheme="int8-block32")
    found = small.manifest.parity
    assert found["check"] == "pieces" and max(found["float_relative"].values()) < 1e-5
    assert small.manifest.graphs[MAP_1].weight_bytes < Bundle.open(shipped).manifest.graphs[MAP_1].weight_bytes / 2
