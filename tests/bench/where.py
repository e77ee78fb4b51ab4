"""Where a token's time goes in our decoder, by operator, from onnxruntime's profile: written to WORK/where.json.

A node's time for a token is that of the fastest tenth of the tokens, so that other work on the machine, which stops a node now
and then, drops out. The prefill is one run and does see it.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnxruntime as ort

from edgesafe.format.specs import TextSpec
from edgesafe.progress import table
from edgesafe.runtime import decode
from edgesafe.runtime.ort import SharedReader, session_options
from results import circumstances, write_json

PROMPT, TOKENS = 600, 32


def profile(model: Path, threads: int) -> list[dict[str, Any]]:
    """The profile's kernel events of one prefill and TOKENS steps, in order."""
    text = TextSpec(**json.loads((model / "about.json").read_text())["text"])
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads, alone=True)  # as the shipped decoder
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/p"
        decoder = ort.InferenceSession(str(model / "decoder.onnx"), options, providers=["CPUExecutionProvider"])
        embed = ort.InferenceSession(str(model / "embed.onnx"), session_options(threads), providers=["CPUExecutionProvider"])
        reader = SharedReader(embed, decoder, text, PROMPT + TOKENS)
        embeds = np.random.default_rng(0).standard_normal((1, PROMPT, text.hidden_size)).astype(np.float32) / 50
        decode.argmax_token(reader.read(embeds))
        for token in range(TOKENS):
            decode.argmax_token(reader.read_token(token))
        events = json.loads(Path(decoder.end_profiling()).read_text())
    return [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]


def by_operator(events: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Milliseconds of the prefill and of one token, by operator."""
    runs: dict[str, list[float]] = collections.defaultdict(list)
    kinds: dict[str, str] = {}
    for event in events:
        runs[event["name"]].append(event["dur"] / 1e3)
        kinds[event["name"]] = event["args"]["op_name"]
    found: dict[str, dict[str, float]] = collections.defaultdict(lambda: {"prefill_ms": 0.0, "token_ms": 0.0, "nodes": 0})
    for name, times in runs.items():
        tokens = sorted(times[-TOKENS:])  # what came before are the parts that the prompt was read in
        found[kinds[name]]["prefill_ms"] += sum(times[:-TOKENS])
        found[kinds[name]]["token_ms"] += tokens[TOKENS // 10]
        found[kinds[name]]["nodes"] += 1
    return {
        k: {key: round(v, 3) for key, v in row.items()} for k, row in sorted(found.items(), key=lambda i: -i[1]["token_ms"])
    }


def main() -> None:
    """Profile the decoder that `make bench` made, print the table and write it down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path, help="the folder of `make bench`, build/bench")
    parser.add_argument("threads", type=int, nargs="?", default=1)
    options = parser.parse_args()
    began = circumstances()
    found = by_operator(profile(options.work / "ours", options.threads))
    write_json(options.work / "where.json", {"run": began | {"threads": options.threads}, "operators": found})
    print(table([[k, *row.values()] for k, row in found.items()], ["operator", "prefill_ms", "token_ms", "nodes"]))


if __name__ == "__main__":
    main()
