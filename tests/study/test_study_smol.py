"""The table of `smol`'s ways says what the script wrote."""

from __future__ import annotations

import json
from pathlib import Path

from study.smol import smol_tables


def _figures(named: int, helped: int, refused: int, weights: int) -> dict:
    families = {"named unseen": named, "use of the dangerous": helped, "use of the harmless": refused}
    return {"weights": weights, **{name: {"k": k, "n": 40} for name, k in families.items()}}


def test_a_row_is_a_way_and_a_column_is_an_exit(tmp_path: Path) -> None:
    ways = {"reference 11": _figures(35, 1, 2, 0), "map 8": _figures(20, 3, 9, 1200), "map 10": _figures(30, 2, 4, 1500)}
    (tmp_path / "ways.json").write_text(json.dumps({"adapter": "0123456789abcdef", "ways": ways}), encoding="utf-8")
    lines = smol_tables(tmp_path / "ways.json")["smol-ways"].splitlines()
    assert lines[0] == "| way | exit 8 | exit 10 | exit 11 | weights of an exit's own |"
    assert lines[2:4] == ["| reference | - | - | 35 / 1 / 2 | 0 |", "| map | 20 / 3 / 9 | 30 / 2 / 4 | - | 1,500 |"]
    assert lines[-1].endswith("of 40 named unseen, 40 use of the dangerous, 40 use of the harmless. Adapter 0123456789ab.")


def test_a_run_that_is_not_there_says_so(tmp_path: Path) -> None:
    assert smol_tables(tmp_path / "none.json") == {"smol-ways": "Not run yet."}
