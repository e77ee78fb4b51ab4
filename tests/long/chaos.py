"""`kill -9` at random moments of measure, certify and export: afterwards the old result or the new one, never a mixture.

`make chaos` runs it and writes the counts. A moment is random between the first line of the command's own work (its imports
are over) and a little after its usual end. Bounded by --seconds.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from PIL import Image

from edgesafe.format.bundle import CERTIFICATE, LATENCY, Bundle
from edgesafe.format.certificate import read_certificate, write_certificate
from edgesafe.format.latency import read_latency
from edgesafe.format.suite import Row, write_suite
from edgesafe.progress import table
from edgesafe.runtime import Session, measure
from handmade import ANSWER, SMALL_LIMITS, make_bundle, make_certificate
from results import write_result

KILLS = 30
COMMANDS = ("measure", "certify", "export")
OLD, NEW = "old", "new"
# What the command imports is imported first, so that the moments fall into its work.
START = """
import importlib, sys
for name in sys.argv[1].split(","):
    importlib.import_module(name)
from edgesafe.cli import main
print("ready", flush=True)
sys.exit(main(sys.argv[2:]))
"""


@dataclass(frozen=True)
class Victim:
    """A command, the modules that it needs, how to lay its old result, and how to tell which one is there."""

    words: list[str]
    modules: str
    lay: Callable[[], None]
    which: Callable[[], str]


def small_suite(folder: Path, name: str = "small") -> Path:
    """A suite of nine rows for the bundle made by hand."""
    rows, images = [], {}
    for i, cls in enumerate(("harmful", "harmless", "task") * 3):
        path = f"images/{i:05d}.png"
        images[path] = Image.new("RGB", (8, 8), (20 * i, 0, 0))
        rows.append(Row(f"r{i}", cls, cls, path, f"what {i}?", ANSWER, (ANSWER,), "t", True))
    write_suite(folder, rows, images, name, "val", SMALL_LIMITS)
    return folder


def sealed_victim(folder: Path, command: str) -> Victim:
    """`measure` or `certify` of a bundle made by hand that has a result of before."""
    suite = small_suite(folder / "suite")
    bundle = make_bundle(folder / "bundle", suite_from=suite)
    measure(bundle.root, seconds=0.05)
    write_certificate(bundle, make_certificate(bundle, (1, 2)))
    name = LATENCY if command == "measure" else CERTIFICATE
    path, old = bundle.root / name, (bundle.root / name).read_bytes()

    def lay() -> None:
        path.write_bytes(old)

    def which() -> str:
        whole = Bundle.open(bundle.root)
        certificate, latency = read_certificate(whole), read_latency(whole)
        assert certificate is not None and latency is not None
        if path.read_bytes() == old:
            return OLD
        assert {e.exit for e in certificate.exits} == set(whole.manifest.ladder)
        assert latency.segments.keys() == {p for e in whole.manifest.exits for p in e.graphs}
        return NEW

    words = [command, str(bundle.root), *(["--seconds", "0.5"] if command == "measure" else [])]
    return Victim(words, "edgesafe.runtime,edgesafe.certify.certify", lay, which)


def export_victim(folder: Path) -> Victim:
    """`export` of a tiny checkpoint over an older bundle; the ladder tells which one is there."""
    from edgesafe.device import load_device
    from edgesafe_export import export_bundle
    from tiny import make_tiny_llava

    model, out, kept = make_tiny_llava(folder / "model"), folder / "bundle", folder / "kept"
    export_bundle(model, kept, load_device("host"), vision_scheme="fp32", text_scheme="fp32", exits="1")
    before = Bundle.open(kept).manifest.ladder

    def lay() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(kept, out)

    def which() -> str:
        ladder = Bundle.open(out).manifest.ladder
        with Session.open(out, allow_uncertified=True) as session:
            session.vision_states(Image.new("RGB", (9, 9)), ladder)
        return OLD if ladder == before else NEW

    schemes = ["--vision-scheme", "fp32", "--text-scheme", "fp32"]
    words = ["export", str(model), "--device", "host", "--out", str(out), "--exits", "2", *schemes]
    return Victim(words, "edgesafe.commands.export,edgesafe_export.export,torch,transformers", lay, which)


def make_victim(folder: Path, command: str) -> Victim:
    """The victim for a command, with everything that it needs under a folder."""
    return export_victim(folder) if command == "export" else sealed_victim(folder, command)


def start(victim: Victim) -> subprocess.Popen[bytes]:
    """The command, past its imports."""
    words = [sys.executable, "-c", START, victim.modules, *victim.words]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


def usual_s(victim: Victim) -> float:
    """How long it takes undisturbed, from its first line; it must succeed and leave the new result."""
    victim.lay()
    process, begin = start(victim), time.perf_counter()
    process.communicate()
    # 42: certify wrote its certificate, and the bundle made by hand refuses nothing.
    assert process.returncode in (0, 42) and victim.which() == NEW, f"{victim.words} ended with {process.returncode}"
    return time.perf_counter() - begin


def kill_once(victim: Victim, after_s: float) -> tuple[str, bool]:
    """Which result is there after a kill, and whether the command had ended before it."""
    victim.lay()
    process = start(victim)
    time.sleep(after_s)
    ended = process.poll() is not None
    if not ended:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return victim.which(), ended


def chaos(command: str, kills: int, seconds: float, seed: int = 0) -> dict[str, object]:
    """Kill a command so many times.

    Returns:
        {wanted, kills, old, new, ended_before, failures, usual_s}; a failure is what checking the result raised.
    """
    rng, seen, failures, ended_before = random.Random(f"{command} {seed}"), Counter(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        victim = make_victim(Path(folder), command)
        usual, until, done = usual_s(victim), time.perf_counter() + seconds, 0
        while done < kills and time.perf_counter() < until:
            after_s = rng.uniform(0, 1.05 * usual)
            try:
                which, ended = kill_once(victim, after_s)
                seen[which] += 1
                ended_before += ended
            except Exception as error:
                failures.append(f"after {after_s:.2f} s: {type(error).__name__}: {error}")
            done += 1
        usual_s(victim)  # what the kills left behind does not stand in its way
    counts = {"wanted": kills, "kills": done, OLD: seen[OLD], NEW: seen[NEW], "ended_before": ended_before}
    return {**counts, "failures": failures, "usual_s": round(usual, 2)}


def main() -> int:
    """Kill each command and print a line each; 1 where anything was neither old nor new."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", choices=COMMANDS, help="this one alone")
    parser.add_argument("--kills", type=int, default=KILLS, help=f"of each command ({KILLS})")
    parser.add_argument("--seconds", type=float, default=1800.0, help="about how long at most, shared evenly (1800)")
    parser.add_argument("--out", type=Path, help="write the counts there")
    options = parser.parse_args()
    commands, rows = [options.command] if options.command else COMMANDS, {}
    for command in commands:
        rows[command] = chaos(command, options.kills, options.seconds / len(commands))
        if options.out:
            write_result(options.out, {"commands": rows})
    keys = ("kills", OLD, NEW, "ended_before", "usual_s")
    print(table([[c, *(r[k] for k in keys), len(r["failures"])] for c, r in rows.items()], ["command", *keys, "failures"]))
    for command, row in rows.items():
        for failure in row["failures"]:
            print(f"{command}: {failure}", file=sys.stderr)
    return int(any(row["failures"] or row["kills"] < row["wanted"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
