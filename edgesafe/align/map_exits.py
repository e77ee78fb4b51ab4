"""The first step of a run: exit maps from the rows' own pictures, so that training starts where a closed form ends."""

from __future__ import annotations

from pathlib import Path

from edgesafe.align.settings import NO_MAP
from edgesafe.align.trainer import Trainer
from edgesafe.checkpoint.exit_maps import PART, attach_stored, maps_of
from edgesafe.checkpoint.weight_files import MAPS
from edgesafe.maps.fit import fit, write
from edgesafe.maps.gather import PICTURES, STATE, by_content, choose
from edgesafe.progress import step


def map_exits(t: Trainer, data: Path, work: Path) -> None:
    """Give the run's model exit maps, unless the settings forbid it or the checkpoint has them.

    Args:
        t: The run.
        data: The folder of its rows; which of their pictures are used depends on the names below it alone.
        work: The run's work folder. Maps that an interrupted run fitted there are used again.

    Raises:
        InputError: Fewer than two of the rows' pictures can be read.
    """
    if t.config.exit_map == NO_MAP or maps_of(t.llava.model):
        return
    main, there = t.accelerator.is_main_process, (work / MAPS).is_file()
    t.accelerator.wait_for_everyone()  # all have looked before one writes
    if not there:
        files = {_name(path, data): path for path in {e.image for e in t.examples}}
        # Every process fits, since weights that are dealt out are gathered by all; the first one writes.
        with step("fit exit maps"), t.gathered():
            found = fit(t.llava, by_content(choose(files, PICTURES)), work if main else None)
        if main:
            write(work, found)
            (work / STATE).unlink(missing_ok=True)
    t.accelerator.wait_for_everyone()
    attach_stored(t.llava.model, work, t.llava.geometry)
    t.llava.model.get_submodule(PART).to(t.llava.device)


def _name(path: Path, data: Path) -> str:
    return path.relative_to(data).as_posix() if path.is_relative_to(data) else path.as_posix()
