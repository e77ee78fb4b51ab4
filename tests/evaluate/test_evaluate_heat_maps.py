"""Maps over depth and what is seen of a picture: figures by hand, each in the place of its exit, readable without colour."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from edgesafe.certify.stats import rate
from edgesafe.evaluate import heat_maps as module
from edgesafe.evaluate.charts import over_depth, shade
from edgesafe.evaluate.heat_maps import heat_maps, see_less
from edgesafe.evaluate.html_report import write_html
from edgesafe.format.suite import Row
from mutants import wrong

ROWS = tuple(Row(f"t{name}", "task", name, "images/a.png", "What?", "", ("cup",), "t", False) for name in ("name", "read"))


def _rate(k: int, n: int = 200) -> dict:
    r = rate(k, n)
    return {"k": r.k, "n": r.n, "rate": r.rate, "lower_95": r.lower_95, "upper_95": r.upper_95}


def _exit(text: str, kinds: tuple[int, int, int], refused: int = 2, right: int = 180) -> dict:
    found = {"harmful": _rate(sum(kinds)), "overrefusal": _rate(refused), "accuracy": _rate(right), "incoherent": _rate(0)}
    families = {"name": _rate(right), "read": _rate(right // 2)}
    named = dict(zip(("named", "mistaken", "other"), kinds, strict=True))
    place = {"exit": text, "reference": text == "3", "group": "late", "length": {"mean": 6.0, "unit": "words"}}
    return {**place, **found, "kinds": named, "families": families}


def _report(*exits: dict) -> dict:
    return {
        "model": "a" * 64, "suite": "b" * 64, "suite_name": "hand", "split": "test", "judge": {"name": "by hand"},
        "reference": "3", "n_blocks": 3, "max_new_tokens": 48, "versions": {}, "exits": list(exits), "groups": [],
    }  # fmt: skip


@pytest.fixture
def now() -> dict:
    return _report(_exit("2@9", (6, 30, 1), 20, 100), _exit("2", (4, 2, 0)), _exit("3@9", (8, 0, 0)), _exit("3", (0, 0, 0)))


@pytest.fixture
def before() -> dict:
    return _report(_exit("2", (20, 40, 10)), _exit("3@4", (50, 60, 70), 100, 20), _exit("3", (2, 0, 0)))


def _tables(text: str) -> dict[str, list[list[str]]]:
    """Each table's cells by its caption."""
    found = {}
    for one in re.findall(r"<table.*?</table>", text):
        root = ET.fromstring(one)
        found[root.findtext("caption")] = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
    return found


def test_each_figure_stands_at_its_exit_before_and_after(now, before):
    tables = _tables(heat_maps(now, before, ROWS))
    assert len(tables) == 2 * (3 + 1 + 1 + 2)  # harm in three, over-refusal, accuracy, and that of two families of tasks
    # 6, 4 and 8 of 200 are 3, 2 and 4 %; both maps have the exits of both evaluations.
    head, every = ["visual tokens \\ depth", "2", "3"], ["all", "2.0", "0.0*"]
    assert tables["Helps with harm: for the danger that was asked for, after"] == [
        head, every, ["9", "3.0", "4.0"], ["4", "-", "-"],
    ]  # fmt: skip
    mistaken = "Helps with harm: for something else"
    assert tables[f"{mistaken}, before"] == [head, ["all", "20.0", "0.0*"], ["9", "-", "-"], ["4", "-", "30.0"]]
    assert tables[f"{mistaken}, after"][1:] == [["all", "1.0", "0.0*"], ["9", "15.0", "0.0"], ["4", "-", "-"]]
    assert tables["Helps with harm: for what the answer doesn't name, before"][3] == ["4", "-", "35.0"]
    assert tables["Refuses the harmless, after"][2] == ["9", "10.0", "1.0"]
    assert tables["Answers the task right, after"][2] == ["9", "50.0", "90.0"]
    assert tables["Answers the task right: read, after"][2] == ["9", "25.0", "45.0"]


def test_tiles_are_drawn_alike_and_one_evaluation_has_one_map_each(now):
    for e in now["exits"]:
        e["exit"] = e["exit"].replace("@9", "x1")
    tables = _tables(heat_maps(now, None, None))
    assert len(tables) == 5 and tables["Refuses the harmless"] == [
        ["tiles \\ depth", "2", "3"], ["all", "1.0", "1.0*"], ["1", "10.0", "1.0"],
    ]  # fmt: skip
    assert [e["exit"] for e in over_depth(now)["exits"]] == ["2", "3"]


def test_where_all_exits_see_as_much_there_is_no_map(now, tmp_path):
    def html(report):
        write_html(tmp_path, report, None, ROWS)
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    assert "what is seen of a picture" in html(now) and "in the maps and the table alone" in html(now)
    whole = over_depth(now)
    assert not see_less(whole) and heat_maps(whole, now, ROWS) == ""
    assert "what is seen" not in html(whole) and "the maps" not in html(whole)


def test_what_was_not_counted_or_told_apart_is_a_dash(now):
    now["exits"][0]["kinds"], now["exits"][0]["accuracy"] = {}, _rate(0, 0)
    del now["exits"][1]["kinds"]  # of an earlier edgesafe
    tables = _tables(heat_maps(now, None, ROWS))
    assert tables["Helps with harm: for something else"][1:] == [["all", "-", "0.0*"], ["9", "-", "0.0"]]
    assert tables["Answers the task right"][2] == ["9", "-", "90.0"]


def test_captions_are_escaped(now):
    rows = (*ROWS, Row("x", "task", "<b>", "images/a.png", "What?", "", ("cup",), "t", False))
    assert "Answers the task right: <b>" in _tables(heat_maps(now, None, rows)) and "<b>" not in heat_maps(now, None, rows)


def _luminance(colour: str) -> float:
    """Of a CSS colour.

    Source: WCAG 2.2, relative luminance.
    """
    parts = [int(n) for n in re.findall(r"\d+", colour)] if "(" in colour else [int(c * 2, 16) for c in colour[1:]]
    red, green, blue = (c / 12.92 if (c := n / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for n in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_figure_can_be_read_on_its_ground(now):
    for i in range(1001):
        light, dark = sorted(map(_luminance, shade(i / 1000)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    ground, ink = shade(0.5)
    assert f'<td style="background:{ground};color:{ink}">50.0</td>' in heat_maps(now, None, ROWS)


@pytest.mark.parametrize(
    "edit",
    [
        ("(exit.fewer, exit.depth): str(exit)", "(exit.fewer, exit.depth): str(exits[0])"),
        ("(exit.fewer, exit.depth): str(exit)", "(exit.depth, exit.fewer): str(exit)"),
        ('for e in report["exits"]', 'for e in report["exits"][1:]'),
    ],
    ids=["the same exit everywhere", "rows and columns mixed up", "an exit left out"],
)
def test_twins(now, before, monkeypatch, edit):
    monkeypatch.setattr(module, "_map", wrong(module._map, edit))
    with pytest.raises(AssertionError):
        test_each_figure_stands_at_its_exit_before_and_after(now, before)
