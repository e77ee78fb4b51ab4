"""Time to the first token by visual tokens: a model is exported with such exits, and each is asked in turn.

`python tests/long/rungs.py MODEL WORK --exits 12,12@9,12@4` exports MODEL for this machine into WORK, unless a bundle is there,
and writes tests/bench/results/rungs.json. What MODEL answers plays no part. Times are one core's, and exits take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from edgesafe.device import load_device
from edgesafe.format.bundle import Bundle
from edgesafe.machine import machine_name
from edgesafe.runtime import Session

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results" / "rungs.json"
QUESTION = "What is in the picture?"
SIDE = 256


def times(session: Session, rounds: int) -> dict[str, dict[str, float]]:
    """By exit the medians in ms to the first token, and of the prefill and of the vision graphs alone."""
    picture = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    found: dict[str, list[tuple[float, float, float]]] = {str(exit): [] for exit in session.manifest.ladder}
    for _ in range(rounds + 1):
        for exit, rows in found.items():
            answer = session.ask(picture, QUESTION, exit=exit, max_new_tokens=1)
            vision = sum(ms for stage, ms in answer.actual_ms.items() if stage.startswith("vision/"))
            rows.append((answer.ttft_ms, answer.actual_ms["prefill"], vision))
    names = ("ttft_ms", "prefill_ms", "vision_ms")
    medians = {exit: [statistics.median(column) for column in zip(*rows[1:], strict=True)] for exit, rows in found.items()}
    return {exit: {name: round(ms, 3) for name, ms in zip(names, row, strict=True)} for exit, row in medians.items()}


def main() -> None:
    """Export, measure, ask and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("work", type=Path, help="folder for the bundle")
    parser.add_argument("--exits", default="12,12@9,12@4", help="ladder (default: %(default)s)")
    parser.add_argument("--device", default="host", help="device profile (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=50, help="answers per exit (default: %(default)s)")
    parser.add_argument("--text-scheme", default="int8-block32", help="of the decoder (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file (default: %(default)s)")
    args = parser.parse_args()
    root = args.work / "bundle"
    if not root.exists():
        from edgesafe_export.export import export_bundle

        args.work.mkdir(parents=True, exist_ok=True)
        export_bundle(args.model, root, load_device(args.device), exits=args.exits, text_scheme=args.text_scheme)
    bundle = Bundle.open(root)
    # With one thread the process's own time is that of the graphs, whatever else the machine does.
    with Session(bundle, None, threads=1, allow_uncertified=True, clock=time.process_time) as session:
        found = times(session, args.rounds)
    manifest = bundle.manifest
    whole = found[str(manifest.reference)]["ttft_ms"]
    result = {
        "model": manifest.name,
        "machine": machine_name(),
        "onnxruntime": version("onnxruntime"),
        "clock": "process time, one thread",
        "rounds": args.rounds,
        "bundle_bytes": sum(file.bytes for file in manifest.files.values()),
        "token_graph_bytes": sum(file.bytes for path, file in manifest.files.items() if path.startswith("vision/tokens_")),
        "float_relative": manifest.parity["float_relative"],
        "answers_kept": {exit: figures["kept"] for exit, figures in manifest.parity["answer_figures"].items()},
        "exits": {exit: {**one, "times_as_fast": round(whole / one["ttft_ms"], 2)} for exit, one in found.items()},
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
