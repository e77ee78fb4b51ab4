"""The vision tower's weight schemes by answer agreement: writes schemes.json. `make bench-quality` judges the text schemes.

Agreement is the share of the reference model's greedy answers that stay equal to the float graphs', at half its reference depth
and at its reference depth.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edgesafe.machine import host_cores
from edgesafe_export.graphs import quiet
from edgesafe_export.quantize import quantize
from results import circumstances, write_json

Quantize = Callable[[onnx.ModelProto], onnx.ModelProto]


def vision_schemes() -> dict[str, Quantize]:
    """By name, without the static one, which needs pictures."""
    names = ("int8-dynamic", "fp32", "int8-block32", "int4-block32")
    return {name: lambda m, n=name: quantize(m, n) for name in names}


def static(model: onnx.ModelProto, inputs: list[np.ndarray]) -> onnx.ModelProto:
    """int8 with the activations' scales fixed from calibration inputs; Attention's own weights stay float (no static form)."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    name = model.graph.input[0].name

    class Inputs(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(inputs)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(({name: x} for x in self.rest), None)

    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
        onnx.save(model, source)
        quantize_static(
            source,
            target,
            Inputs(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(target)


def agreement(work: Path, rows: int) -> dict[str, Any]:
    """Share of equal answers by scheme."""
    import edgesafe
    from edgesafe.device import load_device
    from edgesafe.format.exits import Exit
    from edgesafe.format.suite import read_suite
    from edgesafe.reference.data import write_split
    from edgesafe_export import export
    from edgesafe_export import parity_model as parity
    from edgesafe_export.family import load_family
    from edgesafe_export.parity_answers import ask

    weights = Path(edgesafe.__file__).parent / "reference" / "weights"
    shutil.rmtree(work / "agreement", ignore_errors=True)
    write_split(suite := work / "agreement" / "suite", "val", scale=0.05)
    family = load_family(weights)
    ladder = (Exit(family.geometry.reference_depth // 2), Exit(family.geometry.reference_depth))
    host = load_device("host")
    job = export.Job(family, weights, "reference", "0" * 64, host, "chain", ladder, read_suite(suite), {}, 0)
    parts = export.trace(job)
    pictures = export.probes(job)[:rows]

    def answers(vision: Callable[[str, onnx.ModelProto], onnx.ModelProto]) -> list[str]:
        folder = work / "agreement" / "bundle"
        shutil.rmtree(folder, ignore_errors=True)
        made = {path: (vision(path, m) if path.startswith("vision/") else m, spec) for path, (m, spec) in parts.items()}
        export.write(job, folder, made, {"vision": "fp32", "text": "fp32"}, {})
        with parity.open_session(folder) as session:
            return [one.text for one in ask(session, [(probe, ladder) for probe in pictures], 20)]

    want = answers(lambda _, m: m)
    states = _states(job, work / "agreement" / "bundle", pictures)

    def share(vision: Callable[[str, onnx.ModelProto], onnx.ModelProto]) -> float:
        return round(float(np.mean([w == g for w, g in zip(want, answers(vision), strict=True)])), 4)

    found = {name: share(lambda _, m, s=scheme: s(m)) for name, scheme in vision_schemes().items()}
    return {"rows": len(pictures), "vision": found | {"int8-static": share(lambda path, m: static(m, states[path]))}}


def _states(job: Any, bundle: Path, pictures: list[Any]) -> dict[str, list[np.ndarray]]:
    """What each vision graph is fed for the first pictures: calibration inputs."""
    from edgesafe.runtime.image import preprocess
    from edgesafe_export import parity_model as parity

    session = parity.open_session(bundle)
    states: dict[str, list[np.ndarray]] = {}
    for image, _ in pictures[:8]:
        for spec in session.manifest.exits:
            state: Any = preprocess(image, session.manifest.image)
            for path in spec.graphs:
                states.setdefault(path, []).append(np.asarray(state if isinstance(state, np.ndarray) else state.numpy()).copy())
                state = session.run_vision_graph(path, state)
    return states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--rows", type=int, default=32)
    words = parser.parse_args()
    began = circumstances()
    found = {"agreement": agreement(words.work, words.rows), "run": began | {"threads": host_cores()}}
    write_json(words.work / "schemes.json", found)


if __name__ == "__main__":
    main()
