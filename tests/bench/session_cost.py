"""What a session costs: the first token by exit, the next question about a picture, memory and start-up."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edgesafe
from edgesafe import Exit, Session

SAMPLES = Path(edgesafe.__file__).parent / "reference" / "samples"
PICTURE = SAMPLES / "006-name.png"
FIRST, SECOND = "What do you call the object? It is for a friend.", "What colour is the object on the left?"
_MEMORY = """
import json, sys
def mib(key):
    lines = open("/proc/self/status").read().splitlines()
    return round(int(next(l for l in lines if l.startswith(key)).split()[1]) / 1024, 1)
import numpy, onnxruntime, PIL.Image, tokenizers
found = {"imports_mib": mib("VmRSS")}
from edgesafe import Session
session = Session.open(sys.argv[1], allow_uncertified=True)
found["opened_mib"] = mib("VmRSS")
for exit in session.manifest.ladder:
    session.ask(sys.argv[2], sys.argv[3], exit=exit)
found["answered_mib"], found["peak_mib"] = mib("VmRSS"), mib("VmHWM")
found["bundle_mib"] = round(sum(f.bytes for f in session.manifest.files.values()) / 2**20, 2)
found["graphs_mib"] = round(sum(f.bytes for p, f in session.manifest.files.items() if p.endswith(".onnx")) / 2**20, 2)
print(json.dumps(found))
"""
_START = """
import json, time
begin, cpu = time.perf_counter(), time.process_time()
import numpy, onnxruntime
between, cpu_between = time.perf_counter(), time.process_time()
import edgesafe
plain = time.perf_counter()
from edgesafe import Session
end, cpu_end = time.perf_counter(), time.process_time()
ms = {"numpy_onnxruntime_ms": between - begin, "import_edgesafe_ms": plain - between, "with_session_ms": end - between}
ms["with_session_cpu_ms"] = cpu_end - cpu_between
print(json.dumps({k: round(v * 1e3, 2) for k, v in ms.items()}))
"""


def by_exit(bundle: Path, rounds: int, in_turns: Callable[..., Any]) -> dict[str, Any]:
    """Time to the first token at each exit."""
    session = Session.open(bundle, allow_uncertified=True)

    def run(exit: Exit) -> dict[str, float]:
        return {"ttft_ms": session.ask(PICTURE, FIRST, exit=exit).ttft_ms}

    return in_turns({str(exit): lambda exit=exit: run(exit) for exit in session.manifest.ladder}, rounds, "exits")


def conversation(bundle: Path, rounds: int) -> dict[str, Any]:
    """The first and the second question about one picture, at the deepest certified exit; TTFT ratios in pairs."""
    session = Session.open(bundle, allow_uncertified=True)
    session.ask(PICTURE, FIRST)
    pairs = []
    for _ in range(3 * rounds):
        talk = session.conversation(PICTURE)
        pairs.append((talk.ask(FIRST), talk.ask(SECOND)))
    alone = session.ask(PICTURE, SECOND)
    shares = [second.ttft_ms / first.ttft_ms for first, second in pairs]
    return {
        "exit": str(alone.exit),
        "first_ttft_ms": round(statistics.median(a.ttft_ms for a, _ in pairs), 3),
        "second_ttft_ms": round(statistics.median(b.ttft_ms for _, b in pairs), 3),
        "second_over_first": round(statistics.median(shares), 3),
        "same_answer_as_ask": all(b.text == alone.text for _, b in pairs),
        "samples": [round(share, 3) for share in shares],
    }


def memory(bundle: Path) -> dict[str, Any]:
    """Resident memory of a fresh process, MiB, and the limit of 1.3 x the bundle + 80."""
    found = _fresh(_MEMORY, str(bundle), str(PICTURE), FIRST)
    found["limit_mib"] = round(1.3 * found["bundle_mib"] + 80, 1)
    return found


def cold_start(rounds: int) -> dict[str, float]:
    """Medians of fresh processes, ms."""
    runs = [_fresh(_START) for _ in range(rounds)]
    return {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}


def _fresh(code: str, *words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)
