"""From pictures and wheels to the adapter: fetch, see, answer, train. `tests/long/smol_train.py` runs it.

On a shared machine set OMP_NUM_THREADS=1, OMP_WAIT_POLICY=PASSIVE, MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=17179869184:
a step frees and takes gigabytes, and glibc gives every large piece back to the system and fetches it again otherwise.
"""

from __future__ import annotations

from pathlib import Path

from edgesafe.checkpoint.exit_model import autocast, load
from edgesafe.progress import step
from edgesafe.reference.smol.adapter import read_adapter
from edgesafe.reference.smol.answers import answer_all
from edgesafe.reference.smol.pictures import MAKERS, fetch
from edgesafe.reference.smol.rows import to_answer, use_begins
from edgesafe.reference.smol.states import see_training
from edgesafe.reference.smol.train import Settings, train


def make_adapter(base: Path, work: Path, out: Path, settings: Settings, start: Path | None = None) -> Path:
    """Train the adapter; a stopped run continues in each of its steps.

    Args:
        base: `smol` without an adapter, as `build` writes it.
        work: Holds fetched pictures, states, answers and the run's state and log.
        out: Gets the adapter's file.
        settings: Of the training.
        start: Folder of an adapter to go on from, by the last two stages.
    """
    begun = read_adapter(start) if start else None
    model = load(base)
    with step("fetch pictures"):
        archives = fetch(work / "pictures", [name for name, maker in MAKERS.items() if not maker.held_out])
    with step("pictures through the tower"):
        depths = (*settings.exits, model.reference.depth)
        seen = see_training(model, archives, work / "states", settings.seed, depths)
    with step("answers to harmless requests"), autocast(settings.precision):
        answers = answer_all(model, to_answer(), work / "answers.jsonl", use_begins())
    with step("train"):
        return train(model, seen, answers, out, work, settings, begun)
