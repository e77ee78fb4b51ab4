"""The whole line at full size: `make fullsize MODEL=llava-1.5-7b` makes a checkpoint of random weights, plans, exports, asks.

Not collected by pytest, because it takes too long. MODEL is a name of `tests/tools/configs`, or a folder or file with a
published config. Each step runs in a process of its own, whose peak memory is read when it ends. The random weights answer
nonsense; what is shown is that the line works at this size, and its time, memory and bytes. `--layers` and `--blocks` cut the
shape down. `--kill-at SECONDS` kills the export after that long and starts it again; its bundle has to be the same bytes as the
one that was there before, if one was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from edgesafe.errors import InputError
from edgesafe.format.exits import Exit
from edgesafe.progress import step, table

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "tools")]

from random_checkpoint import count_weights, find_config  # noqa: E402

from results import circumstances, write_json, write_result  # noqa: E402

ASKED_TOKENS = 8
# A first token that takes longer is asked for once an exit instead of three times; beyond the second, at three exits alone.
ONCE_MS, FEW_MS = 10_000.0, 60_000.0
PROMPT = "What is this?"


@dataclass(frozen=True)
class Ended:
    """A process that ended well: wall clock time and peak memory, and what it printed."""

    seconds: float
    peak_gib: float
    out: str


def run(words: list[str]) -> Ended:
    """Run Python in a process of its own; its peak memory is its own."""
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    out = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(words[:4])} ended with {child.returncode}")
    return Ended(time.perf_counter() - began, usage.ru_maxrss / 2**20, out)


def kill(words: list[str], seconds: float) -> None:
    """Run Python in a process of its own and kill it after some seconds."""
    child = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    else:
        raise SystemExit(f"{' '.join(words[:4])} ended before it could be killed")


def bundle_files(bundle: Path) -> dict[str, str]:
    """The sha256 of each file of a bundle, by its manifest; none where there is no bundle."""
    manifest = bundle / "manifest.json"
    if not manifest.is_file():
        return {}
    return {path: spec["sha256"] for path, spec in json.loads(manifest.read_text(encoding="utf-8"))["files"].items()}


def export(words: list[str], bundle: Path, kill_at: float | None) -> tuple[Ended, dict[str, Any] | None]:
    """Export, with `kill_at` in two processes, of which the first is killed; what the second found and made of it."""
    before = bundle_files(bundle)
    if kill_at is not None:
        with step(f"export, killed after {kill_at:g} s"):
            kill(words, kill_at)
    done = list(bundle.with_name(bundle.name + ".partial").glob("pieces/**/*.json"))
    with step("export"):
        ended = run(words)
    if kill_at is None:
        return ended, None
    same = bundle_files(bundle) == before if before else None  # None: there was no bundle to compare with
    return ended, {"killed_after_s": kill_at, "pieces_found": len(done), "seconds": ended.seconds, "same_bytes": same}


def ask_every_exit(bundle: Path, picture: Path) -> list[dict[str, Any]]:
    """First token, the prediction for it and each later token, ms, at each exit: medians of three asks.

    An answer that takes longer than 10 s is asked once an exit, one that takes a minute at three exits.
    """
    from edgesafe.runtime import Session

    rows = []
    with Session.open(bundle, allow_uncertified=True) as session:  # reads the weights in
        exits = session.manifest.ladder
        took = session.ask(picture, PROMPT, exit=exits[0], max_new_tokens=1).ttft_ms
        if took > FEW_MS:
            reference = session.manifest.reference
            half = min(exits, key=lambda exit: abs(exit.depth - reference.depth / 2))
            exits = (exits[0], half, reference)
    with Session.open(bundle, allow_uncertified=True) as session:
        for exit in exits:
            asked = [_asked(session, picture, exit) for _ in range(1 if took > ONCE_MS else 3)]
            rows.append({"exit": str(exit), **{key: round(median(row[key] for row in asked), 1) for key in asked[0]}})
    return rows


def _asked(session: Any, picture: Path, exit: Exit) -> dict[str, float]:
    answer = session.ask(picture, PROMPT, exit=exit, max_new_tokens=ASKED_TOKENS)
    later = answer.actual_ms["decode"] / max(1, ASKED_TOKENS - 1)
    row = {"ttft_ms": answer.ttft_ms, "token_ms": later}
    if answer.prediction == "measured":
        row["predicted_ms"] = sum(ms for stage, ms in answer.predicted_ms.items() if stage != "decode")
    return row


def check_disk(work: Path, config: Path) -> None:
    """Refuse to start without room for the checkpoint and its export.

    Raises:
        InputError: too little; it names what is needed and what is free.
    """
    need, free = (2 + 2 * 0.7) * count_weights(config), shutil.disk_usage(work).free
    if need > free:
        raise InputError(
            f"about {need / 1e9:.0f} GB are needed on the disk, {free / 1e9:.0f} GB are free",
            where=str(work),
            expected="room for a bfloat16 checkpoint, the pieces and the bundle",
            todo="make room",
        )


def whole_line(options: argparse.Namespace) -> dict[str, Any]:
    """Checkpoint, plan, export, ask, measure, ask at every exit; what each took."""
    model, bundle, picture = options.work / "model", options.work / "bundle", options.work / "picture.png"
    cut = [w for key in ("layers", "blocks") if getattr(options, key) for w in (f"--{key}", str(getattr(options, key)))]
    if not (model / "model.safetensors.index.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        with step("make the checkpoint"):
            tool = str(Path(__file__).parents[1] / "tools" / "random_checkpoint.py")
            made = asdict(run([tool, options.model, str(model), *cut]))
    else:
        made = {"seconds": 0.0, "peak_gib": 0.0}
    from PIL import Image

    Image.radial_gradient("L").convert("RGB").resize((400, 300)).save(picture)
    asked = ["--device", options.device, *(["--text-scheme", options.text_scheme] if options.text_scheme else [])]
    edgesafe = ["-m", "edgesafe.cli"]
    plan = run([*edgesafe, "plan", str(model), *asked, "--json"])
    words = [*edgesafe, "export", str(model), *asked, "--out", str(bundle), "--json"]
    exported, resumed = export(words, bundle, options.kill_at)
    deepest = json.loads(exported.out)["exits"][-1]
    question = ["--image", str(picture), "--prompt", PROMPT, "--exit", str(deepest), "--allow-uncertified"]
    with step("ask"):
        answered = run([*edgesafe, "ask", str(bundle), *question, "--max-new-tokens", str(ASKED_TOKENS), "--json"])
    if options.measure:
        with step("measure"):
            measured = run([*edgesafe, "measure", str(bundle), "--json"])
    return {
        "model": options.model,
        "cut": cut,
        "device": options.device,
        "plan": json.loads(plan.out),
        "checkpoint": {k: v for k, v in made.items() if k != "out"} | {"bytes": folder_bytes(model)},
        "export": {"seconds": exported.seconds, "peak_gib": exported.peak_gib, "bytes": folder_bytes(bundle)},
        "resumed": resumed,
        "ask": {"seconds": answered.seconds, "peak_gib": answered.peak_gib, "answer": json.loads(answered.out)},
        "measure": {"seconds": measured.seconds, "peak_gib": measured.peak_gib} if options.measure else None,
        "every_exit": ask_again(options),
    }


def ask_again(options: argparse.Namespace) -> dict[str, Any]:
    """The bundle's exits asked in a process of their own."""
    with step("ask at every exit"):
        every = run([__file__, options.model, str(options.work), "--every-exit"])
    return {"seconds": every.seconds, "peak_gib": every.peak_gib, "rows": json.loads(every.out)}


def folder_bytes(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def show(result: dict[str, Any]) -> str:
    """The tables."""
    plan = result["plan"]
    rows = [
        [name, f"{result[name]['seconds']:.0f}", f"{result[name]['peak_gib']:.2f}", f"{result[name].get('bytes', 0) / 1e9:.3f}"]
        for name in ("checkpoint", "export", "ask", "measure")
        if result[name]
    ]
    rows.append(["planned export", None, f"{plan['export_gib']:.2f}", f"{plan['bundle_bytes'] / 1e9:.3f}"])
    rows.append(["planned ask", None, f"{plan['run_gib']:.2f}", None])
    asked = result["every_exit"]["rows"]
    exits = [[r["exit"], r["ttft_ms"] / 1e3, _seconds(r.get("predicted_ms")), r["token_ms"]] for r in asked]
    again = result["resumed"]
    same = {True: "the same bytes as before", False: "OTHER BYTES THAN BEFORE", None: "no earlier bundle to compare with"}
    notes = [*plan["notes"]]
    if again:
        found = f"{again['pieces_found']} pieces found, {again['seconds']:.0f} s for the rest, {same[again['same_bytes']]}"
        notes.append(f"killed after {again['killed_after_s']:g} s and started again: {found}")
    return (
        table(rows, ["step", "seconds", "peak GiB", "GB"])
        + "\n\n"
        + table(exits, ["exit", "first token s (here)", "predicted s", "later tokens ms"])
        + "\n\n"
        + "\n".join(notes)
    )


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1e3


def main() -> int:
    """Run the line and print its tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a name of tests/tools/configs, or a folder or file with a published config")
    parser.add_argument("work", type=Path, help="folder for checkpoint and bundle; a checkpoint that is there is used")
    parser.add_argument("--device", default="rpi5")
    parser.add_argument("--text-scheme", help="default: the device's")
    parser.add_argument("--layers", type=int, help="decoder layers, where not the config's")
    parser.add_argument("--blocks", type=int, help="vision blocks, where not the config's")
    parser.add_argument("--kill-at", type=float, metavar="SECONDS", help="kill the export after that long, and start it again")
    parser.add_argument("--out", type=Path, help="write the result there, as JSON")
    parser.add_argument("--no-measure", dest="measure", action="store_false", help="leave out edgesafe measure (7B: minutes)")
    parser.add_argument("--ask-again", action="store_true", help="ask the bundle that is there, and renew that part of --out")
    parser.add_argument("--every-exit", action="store_true", help="only ask the bundle that is there, once an exit")
    options = parser.parse_args()
    if options.every_exit:
        print(json.dumps(ask_every_exit(options.work / "bundle", options.work / "picture.png")))
        return 0
    if options.ask_again:
        result = json.loads(options.out.read_text(encoding="utf-8"))
        write_json(options.out, result | {"every_exit": ask_again(options) | {"date": circumstances()["date"]}})
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    check_disk(options.work, find_config(options.model))
    result = whole_line(options)
    print(show(result))
    if options.out:
        write_result(options.out, result)
    return 1 if result["resumed"] and result["resumed"]["same_bytes"] is False else 0


if __name__ == "__main__":
    sys.exit(main())
