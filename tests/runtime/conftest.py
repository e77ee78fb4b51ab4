"""A measurement whose numbers a test can reckon with, and a bundle that can be certified."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgesafe.format.bundle import Bundle
from edgesafe.format.latency import LatencyTable, stage_times, write_latency
from edgesafe.machine import machine_name
from edgesafe.runtime import OnnxRuntime
from handmade import make_suited


@pytest.fixture
def measured(handmade, copy_of):
    """A copy whose latency.json says 10, 20 and 30 ms of vision; the rest costs nothing."""
    root = copy_of(handmade)
    bundle = Bundle.open(root)
    graphs = {path for e in bundle.manifest.exits for path in e.graphs}
    none = stage_times([0.0] * 5)
    table = LatencyTable(
        bundle_digest=bundle.digest,
        machine=machine_name(),
        engine="onnxruntime",
        engine_version=OnnxRuntime().version,
        threads=1,
        segments={path: stage_times([10.0] * 5) if "blocks" in path else none for path in graphs},
        text={
            "preprocess": [{"pixels": 100, "encoded": False, **none}],
            "prefill": [{"tokens": 10, **none}],
            "decode": [{"context": 10, **none}],
        },
        exits=[],
        peak_rss_mib=None,
        conditions={"governor": None},
    )
    write_latency(bundle, table)
    return root, table


@pytest.fixture(scope="session")
def suited(tmp_path_factory) -> Path:
    """The bundle made by hand with a suite of six rows, depths 1 and 2 certified, which smoke finds true."""
    return make_suited(tmp_path_factory.mktemp("seam"))


@pytest.fixture
def suited_copy(suited, tmp_path) -> Path:
    return Path(shutil.copytree(suited, tmp_path / "bundle"))
