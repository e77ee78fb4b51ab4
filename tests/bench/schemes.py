"""Weight schemes by speed and by answer agreement: writes schemes.json.

Speed is of the LLaMA shape with random weights, in turns; agreement is the share of the reference model's greedy answers that
stay equal to the float graphs', vision and text apart, at half its reference depth and at its reference depth.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_shape
import numpy as np
import onnx
import onnx_ir
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from speed import Engine, in_turns  # which also makes results importable

from edgesafe.machine import host_cores
from edgesafe.progress import step
from edgesafe_export.graphs import quiet
from edgesafe_export.quantize import EMBED_SCHEME, quantize
from results import circumstances, write_json

Quantize = Callable[[onnx.ModelProto], onnx.ModelProto]


def text_schemes() -> dict[str, Quantize]:
    """By name; the format of the shipped default first."""
    names = ("int4-block32", "int4-block64", "int4-block128", "int8-block32", "int8-dynamic", "fp32")
    schemes: dict[str, Quantize] = {name: lambda m, n=name: quantize(m, n) for name in names}
    schemes["int8-block128"] = lambda m: blocks(m, 8, 128)
    schemes["int4-block32 symmetric"] = lambda m: blocks(m, 4, 32, is_symmetric=True)
    schemes["int4-block32 k-quant"] = k_quant
    schemes["int4-block32 hqq"] = lambda m: blocks(m, 4, 32, algo_config=nbits.HQQWeightOnlyQuantConfig(block_size=32))
    return schemes


def blocks(model: onnx.ModelProto, bits: int, block_size: int, **options: Any) -> onnx.ModelProto:
    """Every matrix in blocks by onnxruntime's quantizer; `options` of it replace ours."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)  # the quantizer edits the graph that it is given
    options = {"is_symmetric": False, "accuracy_level": 4, **options}
    quantizer = nbits.MatMulNBitsQuantizer(copied, bits=bits, block_size=block_size, **options)
    with quiet():
        quantizer.process()
    return quantizer.model.model


def k_quant(model: onnx.ModelProto) -> onnx.ModelProto:
    """The k-quant of onnxruntime; it loses the nodes that compute the lengths, which are put back."""
    quantized = blocks(model, 4, 32, algo_config=nbits.KQuantWeightOnlyQuantConfig())
    made = {name for node in quantized.graph.node for name in node.output}
    quantized.graph.node.extend(node for node in model.graph.node if not made & set(node.output))
    kept = {tensor.name for tensor in quantized.graph.initializer}
    used = {name for node in quantized.graph.node for name in node.input}
    quantized.graph.initializer.extend(t for t in model.graph.initializer if t.name in used - kept)
    ordered = onnx_ir.from_proto(quantized)
    ordered.graph.sort()
    return onnx_ir.to_proto(ordered)


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


def text_speed(work: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Prefill of 600 tokens and decoding after it, by scheme."""
    parts = llama_shape.float_decoder(llama_shape.write_checkpoint(work / "checkpoint"))
    opened: dict[str, Engine] = {}
    sizes: dict[str, float] = {}
    for name, scheme in text_schemes().items():
        with step(f"quantize the LLaMA shape: {name}"):
            folder = llama_shape.write_ours(work / "schemes" / name.replace(" ", "-"), parts, scheme)
        sizes[name] = round((folder / "decoder.onnx").stat().st_size / 2**20, 1)
        opened[name] = Engine("edgesafe", Path(sys.executable), folder, threads)
    del parts

    def run(engine: Engine) -> dict[str, float]:
        times = engine.run(600, 24)
        return {k: statistics.median(v) if isinstance(v, list) else v for k, v in times.items()}

    found = in_turns({name: lambda e=engine: run(e) for name, engine in opened.items()}, rounds, "text schemes")
    for name, engine in opened.items():
        engine.close()
        found[name]["mib"] = sizes[name]
    return found


def agreement(work: Path, rows: int) -> dict[str, Any]:
    """Share of equal answers by scheme, text and vision apart, and with both at their defaults."""
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

    def answers(name: str, vision: Callable[[str, onnx.ModelProto], onnx.ModelProto], text: Quantize) -> list[str]:
        def by(path: str, model: onnx.ModelProto) -> onnx.ModelProto:
            if path == "text/embed_tokens.onnx":
                return model if name == "float" else quantize(model, EMBED_SCHEME)
            return vision(path, model) if path.startswith("vision/") else text(model)

        folder = work / "agreement" / "bundle"
        shutil.rmtree(folder, ignore_errors=True)
        export.write(job, folder, {p: (by(p, m), s) for p, (m, s) in parts.items()}, {"vision": "fp32", "text": "fp32"}, {})
        with parity.open_session(folder) as session:
            return [one.text for one in ask(session, [(probe, ladder) for probe in pictures], 20)]

    want = answers("float", lambda _, m: m, lambda m: m)
    states = _states(job, work / "agreement" / "bundle", pictures)
    found: dict[str, Any] = {"rows": len(pictures), "text": {}, "vision": {}}

    def share(name: str, *how: Any) -> float:
        return round(float(np.mean([w == g for w, g in zip(want, answers(name, *how), strict=True)])), 4)

    for name, scheme in text_schemes().items():
        found["text"][name] = share(name, lambda _, m: m, scheme)
    for name, scheme in vision_schemes().items():
        found["vision"][name] = share(name, lambda _, m, s=scheme: s(m), lambda m: m)
    found["vision"]["int8-static"] = share("int8-static", lambda path, m: static(m, states[path]), lambda m: m)
    return found


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
    parser.add_argument("--parts", default="agreement,text_speed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=host_cores())
    words = parser.parse_args()
    words.work.mkdir(parents=True, exist_ok=True)
    out = words.work / "schemes.json"
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for part in words.parts.split(","):
        began = circumstances()
        if part == "agreement":
            found[part] = agreement(words.work, words.rows)
        else:
            found[part] = text_speed(words.work, words.threads, words.rounds)
        found.setdefault("runs", {})[part] = began | {"threads": words.threads, "rounds": words.rounds}
        write_json(out, found)


if __name__ == "__main__":
    main()
