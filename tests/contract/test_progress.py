"""Progress goes to stderr and says how long things took; tables line up."""

from __future__ import annotations

import pytest

from edgesafe import progress
from edgesafe.format.exits import Exit
from edgesafe.progress import bar, step, table


def test_step_prints_start_and_end_to_stderr(capsys):
    with step("counting"):
        pass
    with pytest.raises(ValueError, match="no"), step("breaking"):
        raise ValueError("no")
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "> counting" and lines[1].startswith("+ counting took ")
    assert lines[3].startswith("x breaking failed after ")


def test_bar_passes_items_through_and_ends_with_a_line(capsys):
    assert list(bar([3, 1, 2], label="rows")) == [3, 1, 2]
    assert list(bar(iter([1]), label="free")) == [1]
    assert list(bar([], label="none")) == []
    out, err = capsys.readouterr()
    assert out == "" and "rows 3/3" in err and "free 1 in" in err


def test_the_time_left_is_said_after_the_first_step(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])

    def lines(each: float, **sizes) -> list[str]:
        for _ in bar(range(100), label="rows", **sizes):
            now[0] += each
        return capsys.readouterr().err.splitlines()

    # By hand: 99 s of a hundred are left; where the first step is half of all work, as much as it took; of 2 s nobody is told.
    assert lines(1.0)[0].strip() == "rows 1/100 in 1.0 s, 1 min 39 s left"
    assert lines(9.0, sizes=[99] + [1] * 99)[0].strip() == "rows 1/100 in 9.0 s, 9.0 s left"
    assert len(lines(0.02)) == 1


def test_table_lines_up():
    # Numbers to the right, texts to the left, None as a dash, written by hand.
    shown = table([[1, "a", None], [10, "bc", 2.25]], ["n", "name", "x"])
    assert shown == " n  name    x\n--  ----  ---\n 1  a       -\n10  bc    2.2"
    assert table([], ["a"]) == "a\n-"
    # An exit is read as a number.
    assert table([[Exit(2), True], [Exit(11), False]], ["exit", "x"]) == "exit  x\n----  -----\n   2  True\n  11  False"
