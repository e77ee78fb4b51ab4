"""A short slice of `make soak`, and that its checks fail where asks alternate, answer wrongly or leak."""

from __future__ import annotations

from mmap import mmap

import soak

from edgesafe.runtime import Conversation
from edgesafe.runtime.turns import Turns
from mutants import wrong


def test_a_slice():
    row = soak.soak(None, asks=120, seconds=120)
    assert row["asks"] == 120 and row["wrong"] == [] and row["interleaved"] == 0
    # Six pictures and prompts at three exits; a slice is too short for the bound on memory.
    assert row["questions"] == 18 and set(row["kinds"]) == {"ask", "stream", "async", "cancel"}


def test_the_check_fails_where_asks_alternate(monkeypatch):
    waiting = "self._changed.wait_for(lambda: self._closed or turn.cancel.cancelled or self._line[0] is turn)"
    monkeypatch.setattr(Turns, "wait", wrong(Turns.wait, (waiting, "pass")))
    assert soak.soak(None, asks=120, seconds=120)["interleaved"] > 0


def test_the_check_fails_on_another_exit(monkeypatch):
    monkeypatch.setattr(soak, "questions", wrong(soak.questions, ("len(session.manifest.exit(exit).graphs)", "9")))
    row = soak.soak(None, asks=12, seconds=60)
    assert row["wrong"] and not soak.kept(row)


def test_the_check_fails_on_a_leak(monkeypatch):
    kept = []
    ask = Conversation.begin

    def leaking(self, *args, **options):
        page = mmap(-1, 2**20)  # from the system: malloc would hand out again what earlier tests freed
        page.write(b"x" * len(page))
        kept.append(page)
        return ask(self, *args, **options)

    monkeypatch.setattr(Conversation, "begin", leaking)
    row = soak.soak(None, asks=150, seconds=120)
    assert row["growth"] > soak.MOST_GROWTH and not soak.kept(row)


def test_a_run_that_was_cut_short_is_not_kept():
    row = {"wrong": [], "interleaved": 0, "growth": 0.0, "asks": 5, "wanted": 6}
    assert not soak.kept(row) and soak.kept({**row, "asks": 6})
