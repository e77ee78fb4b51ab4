"""`make bench`: speed and memory next to the peers, as ratios of runs in turns. Writes speed.json, speed.txt and speed.png.

Each part stands alone (`--parts`). Engines live in processes of their own and run one after the other, round by round, so that
what else the machine does meets all of them; a ratio is the median of the rounds' ratios, never a ratio of two medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import llama_shape

from edgesafe.machine import host_cores
from edgesafe.progress import bar, table
from results import circumstances, write_json

HERE = Path(__file__).parent
PROMPT, ANSWER = 600, 32
SCHEME = "int4-block32"  # the format of what the device profiles try first; it needs no calibration
# Image tokens of LLaVA-1.5 at 168, 224 and 336 px with 24 tokens of text, then longer texts after 576 image tokens.
LENGTHS = (24 + 144, 24 + 256, 24 + 576, 128 + 576)


class Engine:
    """One engine's process; see engine.py."""

    def __init__(self, name: str, python: Path, model: Path, threads: int) -> None:
        words = [python, HERE / "engine.py", name, model, threads]
        self.process = subprocess.Popen(
            list(map(str, words)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.open_ms = self._line()["open_ms"]

    def run(self, prompt: int, answer: int) -> dict[str, Any]:
        """Times of one run from an empty cache."""
        self.process.stdin.write(f"{prompt} {answer}\n")
        self.process.stdin.flush()
        return self._line()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args[2]} ended: run it by hand: {' '.join(self.process.args)}")
        return json.loads(line)


def in_turns(runs: dict[str, Callable[[], dict[str, float]]], rounds: int, label: str) -> dict[str, dict[str, Any]]:
    """Every run once a round: medians, all samples, and the median over rounds of first / this (above 1: the first is slower).

    Args:
        runs: by name; each gives figures in ms. The first is what the others are compared with.
        rounds: how often each runs.
        label: of the progress bar.
    """
    for run in runs.values():
        run()
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in bar(range(rounds), rounds, label):
        for name, run in runs.items():
            samples[name].append(run())
    first = samples[next(iter(runs))]
    found: dict[str, dict[str, Any]] = {}
    for name, rows in samples.items():
        found[name] = {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}
        found[name]["times_as_fast_as_first"] = {
            key: round(statistics.median(a[key] / b[key] for a, b in zip(first, rows, strict=True)), 3) for key in rows[0]
        }
        found[name]["samples"] = {key: [round(row[key], 3) for row in rows] for key in rows[0]}
    return found


def engines(work: Path, peers: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Prefill of 600 tokens and decoding after it, on the same weights in int4."""
    checkpoint = llama_shape.write_checkpoint(work / "checkpoint")
    models = {"edgesafe": (Path(sys.executable), ours(work, checkpoint))}
    models["llama.cpp"] = (peers, llama_shape.write_gguf(checkpoint, work / "llama.gguf", peers))
    models["onnxruntime-genai"] = (peers, llama_shape.write_genai(checkpoint, work / "genai", peers))
    opened = {name: Engine(name, python, model, threads) for name, (python, model) in models.items()}

    def run(engine: Engine) -> dict[str, float]:
        times = engine.run(PROMPT, ANSWER)
        return {k: statistics.median(v) if isinstance(v, list) else v for k, v in times.items()}

    found = in_turns({name: lambda e=engine: run(e) for name, engine in opened.items()}, rounds, "engines")
    for name, engine in opened.items():
        found[name] |= {
            "open_ms": round(engine.open_ms, 1),
            "prefill_tokens_s": round(PROMPT * 1e3 / found[name]["prefill_ms"], 1),
            "decode_tokens_s": round(1e3 / found[name]["decode_ms"], 1),
        }
    for engine in opened.values():
        engine.close()
    return {"engines": found, "peers": versions(peers)}


def versions(peers: Path) -> list[str]:
    """The engines beside ours."""
    frozen = subprocess.run([peers, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in frozen if line.lower().startswith(("llama", "onnxruntime", "gguf"))]


def lengths(work: Path, peers: Path, threads: int, rounds: int) -> dict[str, Any]:
    """How the prefill, and with it the first token, grows with image tokens and text."""
    engine = Engine("edgesafe", Path(sys.executable), ours(work, llama_shape.write_checkpoint(work / "checkpoint")), threads)

    def run(tokens: int) -> dict[str, float]:
        times = engine.run(tokens, 0)
        return {key: times[key] for key in ("prefill_ms", "prefill_cpu_ms")}

    found = in_turns({str(n): lambda n=n: run(n) for n in LENGTHS}, rounds, "lengths")
    engine.close()
    return {"prefill_by_tokens": found}


def ours(work: Path, checkpoint: Path) -> Path:
    """Our two text graphs as an export for this machine writes them."""
    from edgesafe.device import load_device
    from edgesafe_export.quantize import quantize
    from edgesafe_export.shared_cache import attend_whole

    def finished(model):
        model = quantize(model, SCHEME)
        return attend_whole(model, llama_shape.WIDTH // llama_shape.HEADS) if load_device("host").attends_whole else model

    if not (work / "ours" / "about.json").exists():
        llama_shape.write_ours(work / "ours", llama_shape.float_decoder(checkpoint), finished)
    return work / "ours"


def vision(work: Path, peers: Path, threads: int, rounds: int) -> dict[str, Any]:
    """CLIP-L/14-336 blocks: int8-dynamic against the same graph in float32 and against torch."""
    from clip_shape import blocks, feature_agreement, vision_runs

    runs = vision_runs(work, threads)
    found = in_turns(runs, rounds, "vision")
    return {"vision": found, "vision_blocks": blocks, "vision_agreement": feature_agreement(work, threads)}


def session(bundle: Path, rounds: int) -> dict[str, Any]:
    """What a question costs at each exit, again about the same picture, and in memory and start-up."""
    from session_cost import by_exit, cold_start, conversation, memory

    return {
        "by_exit": by_exit(bundle, rounds, in_turns),
        "conversation": conversation(bundle, rounds),
        "memory": memory(bundle),
        "cold_start": cold_start(rounds),
    }


def rows(found: dict[str, Any]) -> list[str]:
    """The tables of a result."""
    shown = []
    for part, key in (("engines", "engines"), ("vision", "vision"), ("prefill_by_tokens", "lengths"), ("by_exit", "exits")):
        if part in found:
            names = list(next(iter(found[part].values()))["samples"])
            lines = [
                [name, *(row[k] for k in names), *(row["times_as_fast_as_first"][k] for k in names)]
                for name, row in found[part].items()
            ]
            shown.append(table(lines, [key, *names, *(f"x {k.removesuffix('_ms')}" for k in names)]))
    for part in ("conversation", "memory", "cold_start"):
        if part in found:
            shown.append(table([[k, v] for k, v in found[part].items() if not isinstance(v, list)], [part, ""]))
    return shown


def plot(found: dict[str, Any], path: Path) -> None:
    """Time to the first token by exit depth and by prompt length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wanted = [(p, x, y) for p, x, y in (("by_exit", "exit depth", "ttft_ms"), ("prefill_by_tokens", "tokens", "prefill_ms"))]
    wanted = [w for w in wanted if w[0] in found]
    if not wanted:
        return
    figure, axes = plt.subplots(1, len(wanted), figsize=(4.5 * len(wanted), 3.2), squeeze=False)
    for axis, (part, label, key) in zip(axes[0], wanted, strict=True):
        axis.plot([int(k) for k in found[part]], [row[key] for row in found[part].values()], marker="o")
        axis.set(xlabel=label, ylabel="ms", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="models and results")
    parser.add_argument("--peers", type=Path, default=Path("build/bench/peers/bin/python"), help="the peers' Python")
    parser.add_argument("--bundle", type=Path, default=Path("build/rpi5/bundle"), help="the reference bundle")
    parser.add_argument("--parts", default="engines,lengths,vision,session")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=host_cores())
    words = parser.parse_args()
    words.work.mkdir(parents=True, exist_ok=True)
    out = words.work / "speed.json"
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for part in words.parts.split(","):
        began = circumstances()
        if part == "session":
            found |= session(words.bundle, words.rounds)
        else:
            found |= {"engines": engines, "lengths": lengths, "vision": vision}[part](
                words.work, words.peers, words.threads, words.rounds
            )
        found.setdefault("runs", {})[part] = began | {"threads": words.threads, "rounds": words.rounds}
        write_json(out, found)
    text = "\n\n".join(rows(found))
    (words.work / "speed.txt").write_text(text + "\n")
    plot(found, words.work / "speed.png")
    print(text)


if __name__ == "__main__":
    main()
