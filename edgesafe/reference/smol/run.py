"""From pictures and wheels to the adapter: fetch, see, answer, train.

    python -m edgesafe.reference.smol.run build/smol --work build/smol-work --out build/smol-adapter

On a shared machine set OMP_NUM_THREADS=1, OMP_WAIT_POLICY=PASSIVE, MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=17179869184:
a step frees and takes gigabytes, and glibc gives every large piece back to the system and fetches it again otherwise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edgesafe.checkpoint.exit_model import autocast, load
from edgesafe.progress import step
from edgesafe.reference.smol.answers import answer_all
from edgesafe.reference.smol.pictures import MAKERS, fetch
from edgesafe.reference.smol.rows import to_answer
from edgesafe.reference.smol.states import see_training
from edgesafe.reference.smol.train import Settings, train


def make_adapter(base: Path, work: Path, out: Path, settings: Settings) -> Path:
    """Train the adapter; a stopped run continues in each of its steps.

    Args:
        base: `smol` without an adapter, as `build` writes it.
        work: Holds fetched pictures, states, answers and the run's state and log.
        out: Gets the adapter's file.
        settings: Of the training.
    """
    model = load(base)
    with step("fetch pictures"):
        archives = fetch(work / "pictures", [name for name, maker in MAKERS.items() if not maker.held_out])
    with step("pictures through the tower"):
        seen = see_training(model, archives, work / "states", settings.seed)
    with step("answers to harmless requests"), autocast(settings.precision):
        answers = answer_all(model, to_answer(settings.seed), work / "answers.jsonl")
    with step("train"):
        return train(model, seen, answers, out, work, settings)


def main() -> None:
    """`python -m edgesafe.reference.smol.run`."""
    parser = argparse.ArgumentParser(prog="python -m edgesafe.reference.smol.run", description=__doc__)
    parser.add_argument("base", type=Path, help="`smol` without an adapter, as `edgesafe reference smol` builds it")
    parser.add_argument("--work", type=Path, required=True, help="pictures, states, answers, log; a stopped run continues here")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets adapter.safetensors")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="of everything drawn (default: %(default)s)")
    args = parser.parse_args()
    print(make_adapter(args.base, args.work, args.out, Settings(seed=args.seed)))


if __name__ == "__main__":
    main()
