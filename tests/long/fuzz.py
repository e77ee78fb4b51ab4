"""Mutated bundles, pictures and prompts by the thousand: each is refused with an error of the tree, or answered cleanly.

`make fuzz` runs it and writes the counts. Cases are numbered and made from their number alone, so that one can be run again:
`python tests/long/fuzz.py --kind sealed --first 17 --count 1`. Cases run in child processes with a bound on memory; one that
kills its process or hangs is a failure with its number.

Kinds:
    sealed    bytes or files of a bundle changed behind its seal: must be refused.
    resealed  the manifest edited, or files changed with their digests, and sealed again; the old certificate stays: must be
              refused.
    forged    the same with a certificate made to fit, so that everything behind the digests is reached: refused, or answered;
              a path that leaves the bundle must be refused.
    tiled     the tiles table of a bundle that cuts pictures edited: with the old certificate it must be refused; with one made
              to fit, refused, or answered as the bundle by hand answers, which no cut changes.
    picture   broken and absurd pictures: answered or `InputError`.
    prompt    the same with prompts.
    request   broken and hostile HTTP requests to `edgesafe serve`: answered, or refused in the API's form; no file is opened
              outside of the allowed folder, and nothing but the client connects.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import mutations
import odd_inputs
import odd_requests
import serving
from edgesafe import Session
from edgesafe.errors import EdgesafeError, InputError
from edgesafe.format.bundle import MANIFEST
from edgesafe.progress import table
from edgesafe.runtime.measure import peak_rss_mib
from edgesafe.serve.server import Server
from handmade import ANSWER, CANVAS, GRID, make_bundle
from results import circumstances, write_result

# 5,000 mutated bundles that must all be refused, 1,000 more that reach what lies behind the digests, 1,000 with tiles, 2,000
# inputs, and 2,000 requests.
COUNTS = {"sealed": 3000, "resealed": 2000, "forged": 1000, "tiled": 1000, "picture": 1000, "prompt": 1000, "request": 2000}
REFUSED, ANSWERED = "refused", "answered"
MAY_ANSWER = ("forged", "tiled", "picture", "prompt", "request")
# A hang that computes ends by the first (a case takes a tenth of it), one that waits by the second, on a busy machine too.
CPU_S_A_CASE, CPU_S_A_CHILD, WALL_S = 1, 60, 1800
ADDRESS_GIB = 6
# Above what the process needs with nothing mutated: 50 megapixels are 191 MiB with an alpha channel and 143 in RGB.
GROWTH_MIB = 450
BLACK = np.zeros((8, 8, 3), np.uint8)
WIDE = np.zeros((6, 20, 3), np.uint8)


def case_rng(kind: str, number: int) -> random.Random:
    """The randomness of one case."""
    return random.Random(f"edgesafe {kind} {number}")


def bundle_case(kind: str, number: int, whole: Path, work: Path) -> tuple[str, str]:
    """What happened to a mutated bundle, and what the mutation was."""
    rng, root = case_rng(kind, number), work / "bundle"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(whole, root)
    name, change = rng.choice(mutations.SEALED if kind == "sealed" else mutations.RESEALED)
    change(root, rng)
    while kind != "sealed":
        mutations.reseal(root, forge=kind == "forged")
        if (root / MANIFEST).read_bytes() != (whole / MANIFEST).read_bytes():
            break
        change(root, rng)  # sealing again undid it: it had changed a digest of the manifest's alone
    with Session.open(root, threads=1) as session:
        session.ask(BLACK, "what?", max_new_tokens=12)
        session.ask(BLACK, "what?", exit=session.manifest.ladder[-1], allow_uncertified=True, max_new_tokens=12)
    if kind == "forged" and name not in mutations.MUST_REFUSE:
        return ANSWERED, name
    raise AssertionError(f"answered after {name}")


def tiled_case(number: int, work: Path) -> tuple[str, str]:
    """The same for a bundle with tiles; every second one has a certificate that fits."""
    rng, root, forge = case_rng("tiled", number), work / "bundle", number % 2 == 1
    shutil.rmtree(work, ignore_errors=True)
    make_bundle(root, tiles=rng.choice([GRID, CANVAS]))
    whole = (root / MANIFEST).read_bytes()
    while True:
        mutations.tiles_edit(root, rng)
        mutations.reseal(root, forge=forge)
        if (root / MANIFEST).read_bytes() != whole:
            break
    with Session.open(root, threads=1) as session:
        said = [session.ask(picture, "what?", max_new_tokens=12).text for picture in (BLACK, WIDE)]
    if forge and said == [ANSWER] * 2:
        return ANSWERED, "tiles"
    raise AssertionError(f"answered {said}")


def input_case(kind: str, number: int, session: Session, work: Path) -> tuple[str, str]:
    """What happened to a mutated picture or prompt."""
    rng = case_rng(kind, number)
    if kind == "picture":
        name, picture = odd_inputs.picture(rng, work)
        session.ask(picture, "what?", max_new_tokens=2)
    else:
        name, prompt = odd_inputs.prompt(rng)
        session.ask(BLACK, prompt, max_new_tokens=2)
    return ANSWERED, name


def request_case(number: int, session: Session, work: Path) -> tuple[str, str]:
    """What happened to a mutated request; the server is started for the first one and ends with its process."""
    files, server = _served(session, work)
    name, data = odd_requests.request(case_rng("request", number), server.port, files)
    with serving.no_way_out(files / "allowed", files) as opened:
        outcome = odd_requests.judge(data, *odd_requests.exchange(server.port, data, patient=name == "plain"))
    if opened or (name == "plain" and outcome[0] != ANSWERED):
        raise AssertionError(f"{outcome} to {name}, opened {opened}")
    return outcome


@lru_cache(maxsize=1)
def _served(session: Session, work: Path) -> tuple[Path, Server]:
    for name in ("allowed/a.png", "other/secret.png"):
        (work / name).parent.mkdir(parents=True)
        (work / name).write_bytes(serving.PNG)
    (work / "allowed" / "link").symlink_to(work / "other")
    (work / "allowed" / "link.png").symlink_to(work / "other" / "secret.png")
    server = Server(session, 0, folders=[work / "allowed"])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return work, server


def child(kind: str, first: int, count: int) -> int:
    """Run cases and print one JSON line before and one after each."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_GIB << 30,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S_A_CHILD + CPU_S_A_CASE * count,) * 2)
    with tempfile.TemporaryDirectory() as folder:
        whole, work = Path(folder) / "whole", Path(folder) / "work"
        make_bundle(whole, certified=(1, 2))
        work.mkdir()
        session = Session.open(whole, threads=1)
        session.ask(BLACK, "what?")
        print(json.dumps({"base_mib": peak_rss_mib()}), flush=True)
        for number in range(first, first + count):
            print(json.dumps({"start": number}), flush=True)
            print(json.dumps({"case": number, **one(kind, number, session, whole, work)}), flush=True)
    print(json.dumps({"peak_mib": peak_rss_mib()}), flush=True)
    return 0


def one(kind: str, number: int, session: Session, whole: Path, work: Path) -> dict[str, object]:
    """One case as {outcome, detail}."""
    try:
        if kind == "request":
            outcome, detail = request_case(number, session, work)
        elif kind == "tiled":
            outcome, detail = tiled_case(number, work)
        elif kind in ("sealed", "resealed", "forged"):
            outcome, detail = bundle_case(kind, number, whole, work)
        else:
            outcome, detail = input_case(kind, number, session, work)
    except EdgesafeError as error:
        if kind in ("picture", "prompt") and not isinstance(error, InputError):
            return {"outcome": "FAILED", "detail": f"{type(error).__name__}: {error}"}
        return {"outcome": REFUSED, "detail": type(error).__name__}
    except BaseException as error:
        return {"outcome": "FAILED", "detail": f"{type(error).__name__}: {error}"[:300]}
    return {"outcome": outcome, "detail": detail}


def run_cases(kind: str, first: int, count: int, seconds: float = 3600.0, chunk: int = 250) -> dict[str, object]:
    """Run cases in child processes for about so long; a dead or hung child costs the case that it was at.

    Returns:
        {cases, refused, answered, by_error, failures, growth_mib}.
    """
    outcomes: Counter[str] = Counter()
    details: Counter[str] = Counter()
    failures: list[dict[str, object]] = []
    growth = 0.0
    at, end, until = first, first + count, time.perf_counter() + seconds
    while at < end and time.perf_counter() < until:
        size = min(chunk, end - at)
        lines, why = spawn(kind, at, size)
        base = next((line["base_mib"] for line in lines if "base_mib" in line), 0.0)
        growth = max([growth, *(line["peak_mib"] - base for line in lines if "peak_mib" in line)])
        for line in (line for line in lines if "case" in line):
            outcomes[line["outcome"]] += 1
            if line["outcome"] == REFUSED:
                details[line["detail"]] += 1
            elif line["outcome"] != ANSWERED or kind not in MAY_ANSWER:
                failures.append(line)
        at += size
        if why:
            started = [line["start"] for line in lines if "start" in line]
            at = (started[-1] if started else at - size) + 1
            failures.append({"case": at - 1, "outcome": "FAILED", "detail": why})
            outcomes["FAILED"] += 1
    if growth > GROWTH_MIB:
        failures.append({"outcome": "FAILED", "detail": f"{growth:.0f} MiB more than before, of {GROWTH_MIB} allowed"})
    return {
        "wanted": count,
        "cases": sum(outcomes.values()),
        REFUSED: outcomes[REFUSED],
        ANSWERED: outcomes[ANSWERED],
        "by_error": dict(sorted(details.items())),
        "failures": failures,
        "growth_mib": round(growth, 1),
    }


def spawn(kind: str, first: int, count: int) -> tuple[list[dict], str]:
    """The lines of one child, and why it didn't end well."""
    words = ["--child", "--kind", kind, "--first", str(first), "--count", str(count)]
    command = [sys.executable, __file__, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            out, _ = process.communicate(timeout=WALL_S)
            why = f"the process ended with {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            why = "it hung"
    lines = [json.loads(line) for line in out.splitlines() if line.endswith("}")]
    return lines, why


def earlier(out: Path) -> dict[str, dict]:
    """What was counted before, each kind with its own date: one kind alone is run again."""
    if not out.is_file():
        return {}
    run = json.loads(out.read_text(encoding="utf-8"))
    return {kind: {"date": run["date"], **row} for kind, row in run["kinds"].items()}


def main() -> int:
    """Run the kinds and print a line each; 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=list(COUNTS), help="this kind alone; --out keeps the others")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, help="cases of each kind")
    parser.add_argument("--seconds", type=float, default=1800.0, help="about how long at most (1800)")
    parser.add_argument("--out", type=Path, help="write the counts there")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.kind, options.first, options.count)
    start, rows = time.perf_counter(), earlier(options.out) if options.kind and options.out else {}
    for kind in [options.kind] if options.kind else COUNTS:
        left = options.seconds - (time.perf_counter() - start)
        row = run_cases(kind, options.first, options.count or COUNTS[kind], left)
        rows[kind] = {"date": circumstances()["date"], **row}
        print(f"{kind}: {rows[kind]['cases']} cases, {len(rows[kind]['failures'])} failures", file=sys.stderr, flush=True)
        if options.out:
            write_result(options.out, {"seconds": round(time.perf_counter() - start, 1), "kinds": rows})
    shown = [[k, r["cases"], r[REFUSED], r[ANSWERED], len(r["failures"]), r["growth_mib"]] for k, r in rows.items()]
    print(table(shown, ["kind", "cases", "refused", "answered", "failures", "MiB more"]))
    for kind, row in rows.items():
        for failure in row["failures"][:20]:
            print(kind, failure, file=sys.stderr)
    short = [kind for kind, row in rows.items() if row["cases"] < row["wanted"]]
    if short:
        print(f"the time ended before all cases of {', '.join(short)}", file=sys.stderr)
    return int(bool(short) or any(row["failures"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
