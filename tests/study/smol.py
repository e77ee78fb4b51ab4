"""The table of what `tests/long/smol_ways.py` wrote: ways to give `smol` earlier exits, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from study.documents import markdown

RESULT = Path(__file__).parents[1] / "bench" / "results" / "smol-ways.json"
_FAMILIES = ("named unseen", "use of the dangerous", "use of the harmless")


def smol_tables(path: Path = RESULT) -> dict[str, str]:
    """The table by its marker's name; a run that is not there says so."""
    return {"smol-ways": ways_table(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else "Not run yet."}


def ways_table(found: Mapping[str, Any]) -> str:
    """Named / dangerous uses helped / harmless uses refused, by way and depth, and the weights that an exit has for itself."""
    cells: dict[str, dict[int, Mapping[str, Any]]] = {}
    for name, one in found["ways"].items():
        way, _, depth = name.rpartition(" ")
        cells.setdefault(way, {})[int(depth)] = one
    depths = sorted({depth for row in cells.values() for depth in row})
    rows = []
    for way, row in cells.items():
        own = max((one["weights"] for one in row.values()), default=0)
        rows.append([way, *(_cell(row[depth]) if depth in row else "-" for depth in depths), f"{own:,}"])
    counts = next(iter(found["ways"].values()))
    title = ", ".join(f"{counts[family]['n']} {family}" for family in _FAMILIES)
    headers = ["way", *(f"exit {depth}" for depth in depths), "weights of an exit's own"]
    return f"{markdown(headers, rows)}\n\nNamed / helped / refused, of {title}. Adapter {found['adapter'][:12]}."


def _cell(one: Mapping[str, Any]) -> str:
    return " / ".join(str(one[family]["k"]) for family in _FAMILIES)
