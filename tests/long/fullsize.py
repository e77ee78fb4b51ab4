"""What `edgesafe align` promises at full size: `make fullsize` (about half an hour on one thread of a 2-core machine).

Not collected by pytest, because it takes too long. A LLaVA of half a billion random weights, of the shape of SmolVLM-500M
(CLIP ViT-B/16 on 224 px, Llama of 32 layers and width 960, 49,152 tokens), runs three updates of `l-ppo` whole, and again
killed with SIGKILL after the second checkpoint and resumed. Both stay below 12 GiB, and their weights are bit-equal.
`--model smolvlm-256m --method l-sft` does the same with a shape of `tests/tools/configs` and another objective.
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

from edgesafe.progress import step, table

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "tools")]

from random_checkpoint import find_config, make_checkpoint  # noqa: E402

from results import write_result  # noqa: E402

LIMIT_GIB = 12.0
UPDATES, KILLED_AFTER = 3, 2
SIDE, PATCH, VOCABULARY = 224, 16, 49152
CONFIG = f"""method = "METHOD"
steps = {UPDATES}
batch_size = 4
reference_rows = 2
optimizer = "adamw"
lr = 1e-4
checkpoint_every = 1
tune = "lora"
[lora]
r = 8
alpha = 16
[ppo]
epochs = 2
minibatches = 2
max_new_tokens = 8
"""


@dataclass(frozen=True)
class Ended:
    """A process that ended: its exit code (negative: the signal that ended it), wall clock time and peak memory."""

    code: int
    seconds: float
    peak_gib: float


def make_full_llava(folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint in float16, with the reference tokenizer; the rest of the vocabulary has weights and no text."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from edgesafe.reference.tokenizer import write_processor

    processor = write_processor(folder)
    processor.patch_size = PATCH
    processor.image_processor.size = {"shortest_edge": SIDE}
    processor.image_processor.crop_size = {"height": SIDE, "width": SIDE}
    processor.save_pretrained(folder)
    bos, eos, pad, image = processor.tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<pad>", "<image>"])
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=PATCH)  # its defaults are else those of ViT-B
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        max_position_embeddings=2048,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image,
        image_token_id=image,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        pad_token_id=pad,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    print(f"  {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters", file=sys.stderr)
    model.to(torch.float16).save_pretrained(folder)
    return folder


def build(work: Path, model: str | None, method: str) -> None:
    """Model, rows and config; in a process of its own, because a child's peak memory starts at its parent's."""
    from edgesafe.reference.data import write_training

    if model:
        make_checkpoint(find_config(model), work / "model")
    else:
        make_full_llava(work / "model")
    write_training(work / "rows", 24, seed=3)
    (work / "config.toml").write_text(CONFIG.replace("METHOD", method), encoding="utf-8")


def align(work: Path, out: str, *options: str, kill_after: int = 0) -> Ended:
    """Run `edgesafe align` in a process of its own; with `kill_after`, SIGKILL once that many updates are in its checkpoint."""
    words = ["align", str(work / "model"), "--config", str(work / "config.toml"), "--data", str(work / "rows")]
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "edgesafe.cli", *words, "--out", str(work / out), *options])
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            child.returncode = os.waitstatus_to_exitcode(status)
            return Ended(child.returncode, time.perf_counter() - began, usage.ru_maxrss / 2**20)
        if kill_after and _done(work / f"{out}.partial") >= kill_after:
            child.kill()
            kill_after = 0
        time.sleep(0.5)


def _done(partial: Path) -> int:
    """Updates in a run's checkpoint; one is written after every update, once the line of metrics is there."""
    lines = (partial / "metrics.jsonl").read_text(encoding="utf-8").count("\n") if (partial / "metrics.jsonl").exists() else 0
    if lines < KILLED_AFTER:
        return 0  # don't read a large file twice a second
    from edgesafe.align.files import done_updates

    return done_updates(partial)


def same_weights(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same names and bits."""
    import torch
    from safetensors import safe_open

    files = [path.name for path in sorted(a.glob("*.safetensors"))]
    if files != [path.name for path in sorted(b.glob("*.safetensors"))]:
        return False
    for file in files:
        with safe_open(a / file, "pt") as one, safe_open(b / file, "pt") as two:
            names = sorted(one.keys())
            if names != sorted(two.keys()) or not all(torch.equal(one.get_tensor(n), two.get_tensor(n)) for n in names):
                return False
    return True


def check(work: Path, estimated_gib: float, runs: dict[str, Ended]) -> dict[str, bool]:
    """Print the closing table; returns the promises and whether they were kept."""
    rows = [[name, e.code, f"{e.seconds:.0f}", f"{e.peak_gib:.2f}"] for name, e in runs.items()]
    print(table(rows, ["run", "exit code", "seconds", "peak GiB"]))
    seconds = update_seconds(work)
    print(f"\nupdates took {', '.join(f'{s:.0f}' for s in seconds)} s; estimated need {estimated_gib:.2f} GiB")
    peak = max(e.peak_gib for e in runs.values())
    promises = {
        f"peak of {peak:.2f} GiB is at most {LIMIT_GIB:g}": peak <= LIMIT_GIB,
        f"{UPDATES} updates ran": len(seconds) == UPDATES,
        "the estimate is within a quarter of the peak": abs(estimated_gib / peak - 1) < 1 / 4,
        "resumed weights equal the whole run's": same_weights(work / "whole", work / "cut"),
        "the weights moved": not same_weights(work / "whole", work / "model"),
    }
    for promise, kept in promises.items():
        print(f"{'kept  ' if kept else 'BROKEN'}  {promise}")
    return promises


def update_seconds(work: Path) -> list[float]:
    """What each update of the whole run took."""
    return [json.loads(line)["seconds"] for line in (work / "whole" / "metrics.jsonl").read_text().splitlines()]


def main() -> int:
    """Build, run, kill, resume, compare; the exit code is 0 where every promise holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path, help="folder for the model and the runs (4 GB), emptied first")
    parser.add_argument("--model", help="a name of tests/tools/configs; by default a LLaVA of half a billion weights")
    parser.add_argument("--method", default="l-ppo", help="the objective (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the result there, as JSON")
    parser.add_argument("--build", action="store_true", help="only build the model and the rows there")
    options = parser.parse_args()
    if options.build:
        build(options.work, options.model, options.method)
        return 0
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    with step("build the model"):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--build"], check=True)
    runs = {
        "whole": align(options.work, "whole"),
        f"killed after update {KILLED_AFTER}": align(options.work, "cut", kill_after=KILLED_AFTER),
        "resumed": align(options.work, "cut", "--resume"),
    }
    if [e.code for e in runs.values()] != [0, -9, 0]:
        print(f"exit codes {[e.code for e in runs.values()]}, expected 0, -9 (killed), 0", file=sys.stderr)
        return 1
    from edgesafe.align.config import read_config
    from edgesafe.align.memory import estimate

    need = estimate(options.work / "model", read_config(options.work / "config.toml", data=str(options.work / "rows")))
    promises = check(options.work, need.total / 1024, runs)
    if options.out:
        told = {"model": options.model, "method": options.method, "estimated_gib": need.total / 1024, "promises": promises}
        told |= {"update_seconds": update_seconds(options.work), "runs": {name: asdict(e) for name, e in runs.items()}}
        write_result(options.out, told)
    return 0 if all(promises.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
