"""What is predicted beside what is taken: `python tests/long/estimates.py WORK --reference BUNDLE --out JSON`.

In one run: this machine's rates are measured as `edgesafe devices measure` does, `edgesafe plan` predicts published shapes from
them, and these are exported with random weights and asked at the reference depth and at half of it. Then the reference bundle
is measured and asked question after question. Not collected by pytest, because it takes too long.

By default everything runs on one thread and is timed by the processor time that it took: other processes then hardly count.
`--wall` takes all cores and the clock on the wall, for a machine that does nothing else. The answers of random weights are
nonsense, so the export leaves out comparing them; every piece is compared as always.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from edgesafe.cli import main as edgesafe
from edgesafe.device import DeviceProfile, load_device, profile_text
from edgesafe.format.bundle import Bundle
from edgesafe.format.exits import Exit
from edgesafe.progress import step, table
from edgesafe.runtime.deadline import Clock
from edgesafe.runtime.forecast import DECODE, PREFILL, PREPROCESS, from_profile
from edgesafe.runtime.rates import measured_profile
from edgesafe.runtime.session import Session

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "tools")]

from random_checkpoint import find_config, make_checkpoint  # noqa: E402

from results import circumstances, write_result  # noqa: E402

MODELS = ("smolvlm-256m", "llava-1.5-7b")
SCHEME = "int4-block32"
QUESTION, PICTURE = "What is this?", (480, 640)  # as `edgesafe plan` has them
TOKENS = 9
# Questions a time is the median of, and how long they may take at most.
TIMES, LONGEST_S = 3, 120
QUESTIONS = 60
ASKED = (QUESTION, "What colour is the object in the picture, and is there another one beside it?", "Name it.")
SIZES = ((216, 288), (480, 640), (864, 1152))
NEAR = 0.3
HEADERS = ("shape", "exit", "tower ms", "prefill ms", "first token ms", "token ms")


def make_bundle(model: str, work: Path) -> Path:
    """The shape's bundle, made where it is not there, in a process of its own."""
    bundle = work / model / "bundle"
    if not bundle.exists():
        with step(f"export {model}"):
            subprocess.run([sys.executable, __file__, str(work), "--export", model], check=True, stdout=subprocess.DEVNULL)
    return bundle


def export(model: str, work: Path) -> None:
    """Checkpoint and bundle of random weights; the finished bundle's answers are not compared."""
    folder = work / model / "model"
    if not (folder / "model.safetensors.index.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        make_checkpoint(find_config(model), folder)
    words = ["export", str(folder), "--device", "host", "--text-scheme", SCHEME, "--out", str(work / model / "bundle")]
    with mock.patch("edgesafe_export.export._judge", lambda *_: ({}, "")):
        raise SystemExit(edgesafe(words))


def plan(model: str, work: Path, device: Path) -> dict[str, Any]:
    """What `edgesafe plan` says with the rates that were measured."""
    words = [sys.executable, "-m", "edgesafe", "plan", str(work / model / "model"), "--device", str(device)]
    done = subprocess.run([*words, "--text-scheme", SCHEME, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


def picture(height: int, width: int) -> np.ndarray:
    """A soft picture."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def by_part(times: dict[str, float], tokens: int = 1) -> dict[str, float]:
    """An answer's stages put together, ms: the tower, the prefill, the first token and each later one."""
    vision = sum(ms for stage, ms in times.items() if stage.startswith("vision/"))
    first = times.get(PREPROCESS, 0.0) + vision + times[PREFILL]
    parts = {"tower": vision, "prefill": times[PREFILL], "first": first, "token": times[DECODE] / tokens}
    return {name: round(ms, 2) for name, ms in parts.items()}


def ask_shape(bundle: Path, planned: dict[str, Any], rates: DeviceProfile, threads: int, clock: Clock) -> list[dict[str, Any]]:
    """Each exit's parts as they are predicted and as they are taken: medians of a few questions."""
    with Session(Bundle.open(bundle), None, threads=threads, allow_uncertified=True, clock=clock) as session:
        forecast = from_profile(session.manifest, rates, planned["prompt_tokens"])
        assert forecast is not None
        forecast = forecast.tiled(planned["tiles"])
        reference = session.manifest.reference
        half = min(session.manifest.ladder, key=lambda exit: abs(exit.depth - reference.depth / 2))
        read_in(session, reference)
        rows = []
        for exit in (reference, half):
            taken, wall_ms, began = [], [], time.perf_counter()
            while len(taken) < TIMES and (not taken or time.perf_counter() < began + LONGEST_S):
                start = time.perf_counter()
                answer = session.ask(picture(*PICTURE), QUESTION, exit=exit, max_new_tokens=TOKENS)
                wall_ms.append(1e3 * (time.perf_counter() - start))
                taken.append(by_part(answer.actual_ms, TOKENS - 1))
            stages = (*session.manifest.exit(exit).graphs, PREFILL, DECODE)
            whole = next(row["ttft_ms"] for row in planned["exits"] if Exit.parse(row["exit"]) == exit)
            rows.append(
                {
                    "exit": str(exit),
                    "predicted": by_part({stage: forecast.typical_ms[stage] for stage in stages}) | {"first": whole},
                    "taken": {name: median(row[name] for row in taken) for name in taken[0]},
                    "wall_of_answer_ms": [round(ms) for ms in wall_ms],
                }
            )
        return rows


def read_in(session: Session, exit: Exit) -> None:
    """Run every graph once, with a prompt of few tokens: what was never read from the disk is no measure."""
    tile = np.zeros((1, 3, *session.look(picture(*SIZES[0]))[0].shape[-2:]), np.float32)
    state = tile
    for path in session.manifest.exit(exit).graphs:
        state = session.run_vision_graph(path, state)
    list(session.tokens(np.asarray(state.numpy())[:0], [1, 2, 3], 2, past_the_end=True))


def ask_reference(bundle: Path, work: Path, threads: int, clock: Clock) -> dict[str, Any]:
    """A bundle that was measured, asked at random exits: the errors of the first token's and each later one's predictions."""
    from edgesafe.runtime import measure as one

    copy = work / "reference"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(bundle, copy)
    with step("measure the reference bundle"), mock.patch(f"{one.__module__}.time", SimpleNamespace(perf_counter=clock)):
        one(copy, threads=threads, seconds=20)
    rng, rows = random.Random(0), []
    with Session(Bundle.open(copy), None, threads=threads, allow_uncertified=True, clock=clock) as session:
        for _ in range(QUESTIONS):
            asked = picture(*rng.choice(SIZES)), rng.choice(ASKED)
            answer = session.ask(*asked, exit=rng.choice(session.manifest.ladder), max_new_tokens=TOKENS)
            assert answer.prediction == "measured"
            predicted, taken = (
                sum(ms for stage, ms in times.items() if stage not in ("wait", DECODE))
                for times in (answer.predicted_ms, answer.actual_ms)
            )
            rows.append([round(predicted, 3), round(taken, 3)])
    errors = [predicted / taken - 1 for predicted, taken in rows[1:]]
    return {
        "questions": len(rows),
        "first_token_ms": rows,
        "median_error": round(median(abs(e) for e in errors), 4),
        "worst_error": round(max(errors, key=abs), 4),
        "within": round(sum(abs(e) <= NEAR for e in errors) / len(errors), 4),
    }


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """The rates, the shapes and the reference."""
    clock: Clock = time.perf_counter if options.wall else time.process_time
    threads = len(os.sched_getaffinity(0)) if options.wall else 1
    shapes = {}
    for model in options.models:
        bundle = make_bundle(model, options.work)
        with step("measure this machine"):
            rates = measured_profile(load_device("host"), threads=threads, clock=clock)
        (device := options.work / "here.toml").write_text(profile_text(rates), encoding="utf-8")
        planned = plan(model, options.work, device)
        with step(f"ask {model}"):
            rows = ask_shape(bundle, planned, rates, threads, clock)
        about = {key: planned[key] for key in ("weights", "tiles", "prompt_tokens", "quantization", "token_ms")}
        shapes[model] = {
            **about,
            "rates": rates.estimates,
            "exits": rows,
            "load_average": os.getloadavg(),
            "date": circumstances()["date"],
        }
    result = {"clock": "wall" if options.wall else "processor time", "threads": threads, "shapes": shapes}
    if options.out and options.out.exists():  # shapes that were not asked now stay as they were
        earlier = json.loads(options.out.read_text(encoding="utf-8"))
        result |= {"reference": earlier.get("reference"), "shapes": earlier["shapes"] | shapes}
    if options.reference:
        result["reference"] = ask_reference(options.reference, options.work, threads, clock)
    return result


def show(result: dict[str, Any]) -> str:
    """The result as a table."""
    rows = []
    for model, shape in result["shapes"].items():
        for row in shape["exits"]:
            cells = [(row["predicted"][part], row["taken"][part]) for part in row["taken"]]
            rows.append([model, row["exit"], *(f"{p:.0f} / {t:.0f} ({100 * (p / t - 1):+.0f} %)" for p, t in cells)])
    if (found := result.get("reference")) is None:
        return table(rows, HEADERS)
    told = f"reference: median error {found['median_error']:.1%}, worst {found['worst_error']:.1%}, {found['within']:.1%} near"
    return table(rows, HEADERS) + "\n\n" + told


def main() -> None:
    """Run it, print the table and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path, help="folder for checkpoints and bundles; what is there is used")
    parser.add_argument("--reference", type=Path, help="a small bundle, which is measured and asked many questions")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--wall", action="store_true", help="all cores, by the clock on the wall")
    parser.add_argument("--out", type=Path, help="write the result there, as JSON")
    parser.add_argument("--export", metavar="MODEL", help="only make one bundle")
    options = parser.parse_args()
    if options.export:
        export(options.export, options.work)
    result = run_all(options)
    print(show(result))
    if options.out:
        write_result(options.out, result)


if __name__ == "__main__":
    main()
