"""Exit maps of a checkpoint: fitted, described, and written beside its weights."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from edgesafe.checkpoint.exit_maps import tensors
from edgesafe.checkpoint.exit_model import ExitModel, load_tower
from edgesafe.checkpoint.load import open_geometry
from edgesafe.checkpoint.weight_files import BESIDE, MAPS, weight_files
from edgesafe.format.exits import Exit
from edgesafe.format.files import digest_folder, replacing, write_atomically
from edgesafe.format.targets import NEW, check_target
from edgesafe.maps.gather import PICTURES, Gathered, by_content, find_pictures, gather, memory_gib
from edgesafe.maps.solve import Solved, solve
from edgesafe.progress import bar, speaks, step, table

RECORD = "exit_maps.json"


@dataclass(frozen=True)
class Fit:
    """Maps by depth, and what is recorded of them in `exit_maps.json`."""

    maps: dict[int, nn.Module]
    record: dict[str, Any]


def write_mapped(model_dir: Path, pictures: Path, out: Path, *, limit: int = PICTURES) -> dict[str, Any]:
    """Fit exit maps and write the checkpoint with them: its weights as they are, the maps in a file beside them.

    A stopped run continues where it was when it is started again with the same model and pictures.

    Args:
        model_dir: Checkpoint folder; maps that it has already are replaced in the copy.
        pictures: Folder of unlabelled pictures.
        out: New folder.
        limit: How many pictures to use at most.

    Returns:
        What was recorded: `pictures` and `tokens` used, and of each exit the rank, the ridge, and the explained share of the
        reference state's variance on held-out pictures, raw and mapped.

    Raises:
        InputError: `out` exists, the checkpoint can't be read, or fewer than two pictures can.
        UnsupportedModelError: A family without a recipe, or a member that can't be cut.
    """
    check_target(out, model=model_dir)
    files = by_content(find_pictures(pictures, limit))
    _, geometry = open_geometry(model_dir)
    if speaks():
        print(f"  needs about {memory_gib(geometry):.1f} GiB of memory beside the tower", file=sys.stderr, flush=True)
    parent = digest_folder(model_dir)
    key = hashlib.sha256("\0".join([parent, *files]).encode()).hexdigest()
    with replacing(out, key=key, model=model_dir) as work:
        with step(f"fit exit maps on {len(files)} pictures"):
            found = fit(load_tower(model_dir), files, work)
        record = {"parent": {"name": model_dir.name, "digest": parent}, **found.record}
        shutil.rmtree(work / NEW, ignore_errors=True)
        (work / NEW).mkdir()
        with step("copy the checkpoint"):
            _copy(model_dir, work / NEW)
        write(work / NEW, Fit(found.maps, record))
    return record


def write(folder: Path, fitted: Fit) -> None:
    """Write maps and their record into a checkpoint's folder."""
    from safetensors.torch import save

    write_atomically(folder / MAPS, save(tensors(fitted.maps)))
    write_atomically(folder / RECORD, (json.dumps(fitted.record, indent=1) + "\n").encode())


def fit(model: ExitModel, files: dict[str, Path], work: Path | None = None) -> Fit:
    """Fit a map for every depth but the reference's.

    Args:
        model: The checkpoint; of its weights only the tower's are used.
        files: Unlabelled pictures, as `by_content` gives them.
        work: Folder in which a stopped run continues; None keeps nothing.

    Raises:
        InputError: Fewer than two pictures can be read.
    """
    found = gather(model, files, work)
    solved = {d: solve(found.fit.centred(d), found.held.centred(d)) for d in bar(found.fit.depths, label="maps")}
    record = {
        "step": "maps",
        "pictures": {"used": found.used, "held_out": found.held_out, "skipped": len(found.skipped)},
        "pictures_digest": hashlib.sha256("".join(files).encode()).hexdigest(),
        "tokens": found.fit.tokens + found.held.tokens,
        "reference": str(model.reference),
        "exits": [_figures(depth, one) for depth, one in solved.items()],
        "note": _note(model, found),
    }
    return Fit({depth: one.module for depth, one in solved.items()}, record)


def describe(record: Mapping[str, Any]) -> str:
    """The record as a table for people."""
    rows = [[e["exit"], e["rank"], f"{e['ridge']:.0e}", 100 * e["raw"], 100 * e["mapped"]] for e in record["exits"]]
    used = record["pictures"]
    said = f"{used['used']} pictures, {used['held_out']} of them held out, {used['skipped']} skipped"
    shown = table(rows, ["exit", "rank", "ridge", "raw %", "mapped %"])
    about = f"explained variance of exit {record['reference']}'s state; {said}"
    return "\n".join([shown, "", about, *filter(None, [record["note"]])])


def _figures(depth: int, solved: Solved) -> dict[str, Any]:
    shares = {key: round(getattr(solved, key), 4) for key in ("raw", "mapped", "full")}
    return {"exit": str(Exit(depth)), "rank": solved.rank, "ridge": solved.ridge, **shares}


def _note(model: ExitModel, found: Gathered) -> str:
    """What a reader of the maps should know of the pictures; "" where there were enough."""
    width, tokens = model.geometry.vision_width, found.fit.tokens
    if tokens > 4 * width:
        return ""
    limit = f", so no more than {tokens - 1} directions of a state are mapped" if tokens <= width else ""
    return f"few pictures: {tokens} tokens for a width of {width}{limit}; more pictures help"


def _copy(folder: Path, to: Path) -> None:
    """A checkpoint's files, without maps that it has."""
    weights = {path.name for path in weight_files(folder)}
    for path in sorted(folder.iterdir()):
        if path.name not in (MAPS, RECORD) and path.is_file() and (path.name in weights or path.suffix in BESIDE):
            shutil.copyfile(path, to / path.name)
