"""A large shape's first logits on an emulated Raspberry Pi 5, beside this machine's.

The bundle has random weights, whose damage means nothing, and one tile a picture, since an emulated core is fifty times slower.
Needs root, debootstrap and qemu-user-static, and takes about five minutes on two free cores:

  cp -r tests/tools/configs/smolvlm-256m CONFIG     # and "do_image_splitting": false in its preprocessor_config.json
  python tests/tools/random_checkpoint.py CONFIG MODEL
  edgesafe export MODEL --device rpi5 --text-scheme int8-block32 --accept-damage --out BUNDLE
  python tests/long/board_logits.py BUNDLE --out tests/bench/results/board-smolvlm-256m.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PROMPT = "What is this?"
# Root mean square of the logits' difference over that of this machine's, chosen before the run. Arm's kernels round in another
# order. Exits that are half the depth apart differ by far more, which the result says too.
BOARD_LOGITS = 0.05
FOLDER = "logits"  # in the home folder of the board's user


def logits(bundle: str) -> dict[str, Any]:
    """The first token's logits at the reference exit and at half its depth, by exit; runs on the board too."""
    from edgesafe import Session
    from edgesafe.runtime.tokenizer import encode_prompt

    with Session.open(bundle, allow_uncertified=True) as session:
        reference = session.manifest.reference
        half = min(session.manifest.ladder, key=lambda exit: abs(exit.depth - reference.depth / 2))
        picture = Image.radial_gradient("L").convert("RGB").resize((400, 300))
        ids = encode_prompt(session.tokenizer, session.manifest, PROMPT)
        features = session.run_exits(session.look(picture), (half, reference))
        found = {str(exit): session.prefill(features[exit], ids)[0][0, -1].tolist() for exit in (reference, half)}
    return {"tokens": len(ids), "logits": found}


def on_board(bundle: Path, work: Path) -> tuple[str, dict[str, Any]]:
    """The emulated board's name and what it answers; the wheels are unpacked for it, as pip would, in no time."""
    from edgesafe_boards import wheels
    from edgesafe_boards.arm64_root import USER, arm64_root
    from edgesafe_boards.emulated import BOARDS, emulated

    root = arm64_root(work / "root")
    here = root / "home" / USER / FOLDER
    shutil.rmtree(here, ignore_errors=True)
    built = wheels.build(work / "wheel")
    for wheel in (built.wheel, *wheels.depended(work, "aarch64", "3.11").glob("*.whl")):
        zipfile.ZipFile(wheel).extractall(here / "site")
    shutil.copytree(bundle, here / "bundle")
    shutil.copy(__file__, here)
    with emulated(BOARDS["rpi5"], root, work / "machine") as shell:
        words = f"cd {FOLDER} && PYTHONPATH=site python3 {Path(__file__).name} bundle --here"
        answer = json.loads(shell.run(words, "answering").text)
    shutil.rmtree(here)
    return shell.name, answer


def apart(one: list[float], other: list[float]) -> float:
    """Root mean square of the difference over that of the first."""
    first, second = np.array(one), np.array(other)
    return float(np.sqrt(np.mean((first - second) ** 2) / np.mean(first**2)))


def main() -> int:
    """Answer here, or on both machines and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--here", action="store_true", help="print this machine's logits alone")
    parser.add_argument("--work", type=Path, default=Path("build/board"), help="as of `make smoke` (build/board)")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(logits(str(args.bundle))))
        return 0
    sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "devices"), str(Path(__file__).resolve().parents[1])]
    from results import write_result

    # In a process of its own, as there: numbers that are printed and read again.
    done = subprocess.run([sys.executable, __file__, args.bundle, "--here"], capture_output=True, text=True, check=True)
    host, start = json.loads(done.stdout), time.perf_counter()
    name, board = on_board(args.bundle, args.work)
    exits = {}
    for exit, row in host["logits"].items():
        other = board["logits"][exit]
        exits[exit] = {"apart": apart(row, other), "same_token": bool(np.argmax(row) == np.argmax(other))}
    result = {
        "board": name,
        "bundle": json.loads((args.bundle / "manifest.json").read_bytes())["name"],
        "tokens": host["tokens"],
        "exits": exits,
        "the_two_exits_apart": apart(*host["logits"].values()),
        "tolerance": BOARD_LOGITS,
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        write_result(args.out, result)
    return 0 if all(row["apart"] <= BOARD_LOGITS for row in exits.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
