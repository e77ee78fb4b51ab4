"""Time to the first token where exits see less of a picture: a model is exported with such exits, and each is asked in turn.

`python tests/long/rungs.py MODEL WORK --exits 12,12@9,12@4` exports MODEL for this machine into WORK, unless a bundle is there,
and writes tests/bench/results/rungs-MODEL.json. What MODEL answers plays no part: `--accept-damage` takes random weights. Times
are one core's, and exits take turns. Bytes and the most memory stand beside those of the same bundle without such exits.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgesafe.device import load_device
from edgesafe.format.bundle import Bundle, file_specs, write_manifest
from edgesafe.runtime import Session

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from results import write_result  # noqa: E402

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
QUESTION = "What is in the picture?"


def picture(size: str) -> np.ndarray:
    """A picture of noise, WIDTHxHEIGHT."""
    width, height = map(int, size.split("x"))
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def times(session: Session, image: np.ndarray, rounds: int) -> dict[str, dict[str, float]]:
    """By exit the medians in ms to the first token, and of the prefill and of the vision graphs alone, and the tiles."""
    found: dict[str, list[tuple[float, float, float]]] = {str(exit): [] for exit in session.manifest.ladder}
    for _ in range(rounds + 1):
        for exit, rows in found.items():
            answer = session.ask(image, QUESTION, exit=exit, max_new_tokens=1)
            vision = sum(ms for stage, ms in answer.actual_ms.items() if stage.startswith("vision/"))
            rows.append((answer.ttft_ms, answer.actual_ms["prefill"], vision))
    names = ("ttft_ms", "prefill_ms", "vision_ms")
    medians = {exit: [statistics.median(column) for column in zip(*rows[1:], strict=True)] for exit, rows in found.items()}
    tiles = {str(exit): session.cut(image, exit).tiles for exit in session.manifest.ladder}
    return {
        exit: dict(zip(names, (round(ms, 3) for ms in row), strict=True), tiles=tiles[exit]) for exit, row in medians.items()
    }


def without_rungs(bundle: Bundle, to: Path) -> Path:
    """A copy of a bundle that has its depths alone."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(bundle.root, to)
    made = bundle.manifest
    exits = tuple(spec for spec in made.exits if spec.exit.whole)
    needed = {made.text.embed_tokens, made.text.decoder, *(path for spec in exits for path in spec.graphs)}
    for path in made.graphs.keys() - needed:
        (to / path).unlink()
    graphs = {path: spec for path, spec in made.graphs.items() if path in needed}
    write_manifest(to, replace(made, exits=exits, graphs=graphs, files=file_specs(to)))
    return to


def peak_mib(root: Path, size: str) -> float:
    """The most memory of a process that opens a bundle and asks every exit once; Linux tells it."""
    words = [sys.executable, __file__, str(root), str(root), "--size", size, "--peak"]
    return round(float(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout), 1)


def bundle_bytes(root: Path) -> int:
    """Bytes of all of a bundle's files."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def main() -> None:
    """Export, ask, weigh and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("work", type=Path, help="folder for the bundle")
    parser.add_argument("--name", help="what the result calls it (default: the folder's name)")
    parser.add_argument("--exits", default="12,12@9,12@4", help="ladder (default: %(default)s)")
    parser.add_argument("--size", default="256x256", help="width and height of the picture (default: %(default)s)")
    parser.add_argument("--device", default="host", help="device profile (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=50, help="answers per exit (default: %(default)s)")
    parser.add_argument("--text-scheme", default="int8-block32", help="of the decoder (default: %(default)s)")
    parser.add_argument("--accept-damage", action="store_true", help="as edgesafe export has it, for random weights")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        with Session.open(args.work, threads=1, allow_uncertified=True) as session:
            for exit in session.manifest.ladder:
                session.ask(picture(args.size), QUESTION, exit=exit, max_new_tokens=1)
        # Not what getrusage says: that begins with the parent's.
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
        print(int(found[1]) / 1024 if found else float("nan"))
        return
    root, name = args.work / "bundle", args.name or args.model.name
    if not root.exists():
        from edgesafe_export.export import export_bundle

        args.work.mkdir(parents=True, exist_ok=True)
        options = {"exits": args.exits, "text_scheme": args.text_scheme, "accept_damage": args.accept_damage}
        export_bundle(args.model, root, load_device(args.device), **options)
    bundle = Bundle.open(root)
    plain = without_rungs(bundle, args.work / "plain")
    # With one thread the process's own time is that of the graphs, whatever else the machine does.
    with Session(bundle, None, threads=1, allow_uncertified=True, clock=time.process_time) as session:
        found = times(session, picture(args.size), args.rounds)
    whole = found[str(bundle.manifest.reference)]["ttft_ms"]
    result = {
        "model": name,
        "picture": args.size,
        "clock": "process time, one thread",
        "rounds": args.rounds,
        "reference": str(bundle.manifest.reference),
        "bytes": {"with": bundle_bytes(root), "without": bundle_bytes(plain)},
        "peak_mib": {"with": peak_mib(root, args.size), "without": peak_mib(plain, args.size)},
        "parity": {key: bundle.manifest.parity.get(key) for key in ("check", "float_relative", "quantized_relative")},
        "exits": {exit: {**one, "times_as_fast": round(whole / one["ttft_ms"], 2)} for exit, one in found.items()},
    }
    write_result(RESULTS / f"rungs-{name}.json", result)
    print((RESULTS / f"rungs-{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
