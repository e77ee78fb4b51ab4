"""The documents' pictures: made by commands, and refused where what they show has changed since.

`exits.svg`, `maps.svg` and `rungs.svg` are text from the raw answers, so they are made again and compared. The others are
pixels: `made.json` keeps the command that made each, a digest of the sources that it shows and one of the picture. `flow.svg`
is drawn by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesafe.errors import AlignError
from edgesafe.format.files import sha256_file, write_atomically
from study.code import source_digest

ROOT = Path(__file__).resolve().parents[2]
FIGURES = Path(__file__).resolve().parent / "figures"
MADE, EXITS, MAPS, RUNGS = "made.json", "exits.svg", "maps.svg", "rungs.svg"
FIGURES_COMMAND = "PYTHONPATH=tests python -m study figures"
ACROSS, DOWN, GAP = 12, 4, 2  # pictures in `world.png`, and the pixels between them


@dataclass(frozen=True)
class Picture:
    """A picture of pixels.

    Attributes:
        command: What makes it.
        sources: Files that it shows, relative to the repository.
    """

    command: str
    sources: tuple[str, ...]


PICTURES: Mapping[str, Picture] = {
    "serve.png": Picture("make shot", ("edgesafe/serve/page.html", "edgesafe/serve/page.py")),
    "world.png": Picture(
        FIGURES_COMMAND,
        ("edgesafe/reference/world.py", "edgesafe/reference/draw.py", "edgesafe/reference/kinds.py"),
    ),
}


def exits_figure(raw: Path) -> str | None:
    """Rates over exit depth before and after alignment, as one SVG; None where there are no answers of `make export`."""
    from edgesafe.evaluate.charts import plot_rates
    from study.shipped import AFTER, BEFORE, closing_reports

    reports = closing_reports(raw / "export")
    return None if reports is None else plot_rates(reports[AFTER], reports[BEFORE]) + "\n"


def maps_figure(raw: Path) -> str | None:
    """The same of the untouched model's raw and mapped exits, from the study's answers; None where there are none."""
    from edgesafe.evaluate.charts import plot_rates
    from study.maps import maps_reports

    reports = maps_reports(raw / "maps")
    return None if reports is None else plot_rates(reports[1], reports[0]) + "\n"


def drawn(raw: Path) -> dict[str, str]:
    """The pictures that are text, by name."""
    from study.rungs import rungs_figure

    found = {EXITS: exits_figure(raw), MAPS: maps_figure(raw), RUNGS: rungs_figure(raw / "rungs")}
    return {name: text for name, text in found.items() if text is not None}


def draw_world(path: Path) -> None:
    """Samples of the reference world side by side, the same on every machine."""
    from PIL import Image

    from edgesafe.reference.draw import SIZE
    from edgesafe.reference.world import FAMILIES, sample

    step = SIZE + GAP
    sheet = Image.new("RGB", (ACROSS * step + GAP, DOWN * step + GAP), "white")
    for i in range(ACROSS * DOWN):
        family = FAMILIES[i % len(FAMILIES)][0]
        picture = sample(family, "val", i // len(FAMILIES), 0).image
        sheet.paste(picture, (GAP + i % ACROSS * step, GAP + i // ACROSS * step))
    sheet.save(path, optimize=True)


def make(raw: Path, folder: Path = FIGURES) -> list[str]:
    """Make every picture that needs neither a bundle nor a browser; returns their names."""
    found = drawn(raw)
    for name, text in found.items():
        write_atomically(folder / name, text.encode())
    draw_world(folder / "world.png")
    stamp("world.png", folder)
    return [*found, "world.png"]


def stamp(name: str, folder: Path = FIGURES, root: Path = ROOT) -> None:
    """Record that a picture was made just now, by its command, of today's sources."""
    made = _read_made(folder)
    made[name] = {
        "command": PICTURES[name].command,
        "sources": {source: source_digest(root / source) for source in PICTURES[name].sources},
        "picture": sha256_file(folder / name),
    }
    write_atomically(folder / MADE, (json.dumps(made, indent=1, sort_keys=True) + "\n").encode())


def check_figures(raw: Path, folder: Path = FIGURES, root: Path = ROOT) -> None:
    """Refuse pictures that are not what their command would make now.

    Raises:
        AlignError: One is missing, was edited by hand, or is older than what it shows; it says which, and the command.
    """
    for name, text in drawn(raw).items():
        if _text(folder / name) == text:
            continue
        raise _old(folder / name, "the picture is not what the raw answers give", "the answers' own rates", FIGURES_COMMAND)
    made = _read_made(folder)
    for name, picture in PICTURES.items():
        record, path = made.get(name, {}), folder / name
        if not path.is_file() or record.get("picture") != sha256_file(path):
            raise _old(path, "the picture is not the one that its command made", "the recorded bytes", picture.command)
        changed = [s for s in picture.sources if record.get("sources", {}).get(s) != source_digest(root / s)]
        if changed:
            raise _old(path, f"the picture is older than {', '.join(changed)}", "a picture of today's sources", picture.command)


def _read_made(folder: Path) -> dict[str, Any]:
    text = _text(folder / MADE)
    return dict(json.loads(text)) if text else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _old(path: Path, what: str, expected: str, command: str) -> AlignError:
    return AlignError(what, where=str(path), expected=expected, todo=f"make it again: {command}")
