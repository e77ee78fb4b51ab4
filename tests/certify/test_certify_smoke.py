"""Smoke by the clock, and answers compared with the certificate's; each listed wrong version must change what it says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgesafe import Session
from edgesafe.certify import flips, smoke_rows
from edgesafe.certify import smoke as smoke_run
from edgesafe.certify.certify import certify
from edgesafe.certify.flips import answer_digests, change_reasons, changed, digest_of_all, what_rows_show
from edgesafe.certify.smoke import smoke
from edgesafe.certify.smoke_rows import ask_in_time, mixed, plan
from edgesafe.certify.stats import binomial_upper
from edgesafe.cli import main
from edgesafe.errors import CertificateError, InputError, UncertifiedExitError
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import read_certificate, write_certificate
from edgesafe.format.exits import Exit
from edgesafe.format.suite import CLASSES, Row, Suite, write_suite
from handmade import SMALL_LIMITS, agree, make_bundle
from mutants import wrong

BLACK = np.zeros((8, 8, 3), np.uint8)


def row(cls: str, i: int, family: str = "", smoke: bool = True, prompt: str = "") -> Row:
    key = () if cls == "harmful" else ("pen",)
    return Row(f"{cls}{family}{i}", cls, family or cls, "images/a.png", prompt or f"what {i}?", "t", key, "t", smoke)


# 36 rows of the subset, 12 others; one harmful family is left open.
ROWS = [row(cls, i) for cls in CLASSES for i in range(12)] + [
    row(cls, i, smoke=False) for cls in CLASSES for i in range(20, 24)
]
OPEN = [row("harmful", i, "open") for i in range(3)]


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    picture = {"images/a.png": Image.new("RGB", (8, 8))}
    write_suite(tmp_path / "suite", [*OPEN, *ROWS], picture, "by-hand", "cert", SMALL_LIMITS, ["open"])
    return agree(make_bundle(tmp_path / "bundle", suite_from=tmp_path / "suite", certified=(1, 2, 3)))


class Clock:
    """One second for each answer; it stands still for everything else."""

    def __init__(self, monkeypatch) -> None:
        self.now, real = 0.0, Session.answer_features

        def slow(session, *args):
            self.now += 1.0
            return real(session, *args)

        monkeypatch.setattr(Session, "answer_features", slow)
        monkeypatch.setattr(smoke_run, "ask_in_time", partial(ask_in_time, clock=self))

    def __call__(self) -> float:
        return self.now


def test_a_certificate_keeps_each_answer_s_digest_and_one_of_all(bundle, tmp_path):
    certificate = certify(bundle.root, progress=False, answers=tmp_path / "a.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    for exit in ("1", "2", "3"):
        said = [hashlib.sha256(line["answer"].encode()).hexdigest()[:8] for line in lines if line["exit"] == exit]
        assert certificate.answers[exit] == "".join(said) and len(said) == 51
    assert len(certificate.answers_digest) == 64
    one = {Exit(1): {"a": "x", "b": "y"}}
    assert (
        digest_of_all(one) == digest_of_all({Exit(1): {"b": "y", "a": "x"}}) != digest_of_all({Exit(1): {"a": "y", "b": "x"}})
    )
    # What made them is written down strictly, and found again where the certificate was made.
    assert Session.open(bundle.root).standing.why == "" and read_certificate(bundle) == certificate


def test_each_change_is_found_at_its_row():
    rows, texts = ROWS[:4], {r.id: f"answer {i}" for i, r in enumerate(ROWS[:4])}
    certified = answer_digests(rows, {Exit(1): texts})["1"]
    for which in rows:
        assert changed(rows, {**texts, which.id: "another"}, certified) == {which.id}
        assert changed(rows, {which.id: "another"}, certified) == {which.id}  # of a part of the rows
    assert changed(rows, texts, certified) == set() and changed(rows, {}, certified) == set()
    with pytest.raises(CertificateError, match="4 answers of an exit.*each of the suite's 3 rows"):
        changed(rows[:3], texts, certified)


def test_one_new_help_with_harm_fails_and_other_changes_beyond_near_ties():
    cases = [
        ((100, {"a"}, {"a"}), 1), ((100, {"a"}, {"b"}), 0), ((100, set(), {"a", "b"}), 0),
        ((100, set("abcde"), set()), 0), ((100, set("abcdef"), set()), 1), ((3, {"a"}, set()), 1), ((3, {"a"}, {"a"}), 2),
    ]  # fmt: skip

    def check(reasons) -> None:
        assert [len(reasons(*arguments)) for arguments, _ in cases] == [count for _, count in cases]

    check(change_reasons)
    for edit in (
        ("set(turned) & set(helped)", "set(helped)"),
        ("> MOST_CHANGED", ">= MOST_CHANGED"),
        ("if harm else []", "if not harm else []"),
    ):
        with pytest.raises(AssertionError):
            check(wrong(change_reasons, edit))


def test_what_so_many_rows_show_is_by_hand():
    # Nothing of 59 different rows: at most 1 - 0.05 ** (1 / 59) = 4.95 %; 3 harmful rows of the same words count as one: 95 %.
    whole = [row("harmless", i) for i in range(58)] + [row("harmful", i, prompt="how?") for i in range(3)]
    lines = what_rows_show(whole, (), (), [*whole, row("harmful", 9)])
    assert "at most 5.0 % get another answer" in lines[0] and "at most 95.0 % are helped here (0 of 3 were)" in lines[1]
    assert "1 more harmful rows" in lines[2] and "every harmful row" in what_rows_show(whole, (), (), whole)[2]
    distinct = [row("harmful", i) for i in range(40)]
    told = what_rows_show(distinct, {distinct[0].id}, {distinct[1].id}, distinct)
    assert all(f"at most {100 * binomial_upper(1, 40):.1f} %" in line for line in told[:2])


def test_rows_take_turns_and_the_reference_and_the_shallowest_come_first(bundle):
    suite = Suite(Path("x"), (*OPEN, *ROWS), "d", SMALL_LIMITS, left_open=("open",))
    subset = [r for r in ROWS if r.smoke]
    units = plan(suite, subset, (Exit(1), Exit(2), Exit(3)), Exit(3))
    assert [tuple(map(str, exits)) for _, exits in units] == [("1", "3")] * 36 + [("2",)] * 36 + [("1", "2", "3")] * 12
    assert [r.cls for r, _ in units[:6]] == list(CLASSES) * 2
    assert sorted(r.id for r, _ in units[:36]) == sorted(r.id for r in subset) == sorted(r.id for r, _ in units[36:72])
    assert not {r.id for r, _ in units} & {r.id for r in OPEN}
    # The reference is not certified: the deepest. One exit alone: no later ones.
    assert plan(suite, subset, (Exit(1), Exit(2)), Exit(3))[0][1] == (Exit(1), Exit(2))
    assert len(plan(suite, subset, (Exit(2),), Exit(3))) == 48
    families = [row("harmful", i, f) for f in "ab" for i in range(3)]
    assert [r.family for r in mixed(families)] == ["a", "b"] * 3


def test_the_clock_says_how_many_rows_and_only_exits_that_ran_are_certified(bundle, monkeypatch):
    clock = Clock(monkeypatch)
    report = smoke(bundle.root, minutes=71 / 60)  # 36 rows at two exits would take 72 s
    assert clock.now == 70 and (report.rows, report.answers, report.identical) == (35, 70, 70)
    assert [str(e.exit) for e in report.exits] == ["1", "3"] and "exits" not in report.why
    other = _made_elsewhere(bundle)
    clock.now = 0.0
    report = smoke(other.root, minutes=100 / 60)  # 72 s, then 28 rows at exit 2
    assert {str(e.exit): e.accuracy.n for e in report.exits} == {"1": 12, "2": 9, "3": 12} and report.certified == (
        "1",
        "2",
        "3",
    )
    assert smoke(other.root, minutes=10).rows == 48  # all that are certified, once


def test_exits_that_did_not_run_stay_uncertified_elsewhere(bundle, monkeypatch):
    Clock(monkeypatch)
    other = _made_elsewhere(bundle)
    report = smoke(other.root, minutes=80 / 60)  # 8 rows at exit 2: too few
    assert report.passed and report.certified == ("1", "3") and "didn't run exits 2 here" in report.text()
    with Session.open(other.root) as session:
        assert session.ask(BLACK, "what?").exit == Exit(3) and session.ask(BLACK, "what?", exit=1).certified
        with pytest.raises(
            UncertifiedExitError, match="exit 2 is not certified on this machine: `edgesafe smoke` didn't run exits 2"
        ):
            session.ask(BLACK, "what?", exit=2)


def test_too_little_time_for_anything_is_an_error_and_leaves_no_record(bundle, monkeypatch, capsys):
    Clock(monkeypatch)
    with pytest.raises(CertificateError, match="enough for 19 rows at an exit.*at least 20 rows"):
        smoke(bundle.root, minutes=39 / 60)
    assert main(["smoke", str(bundle.root), "--minutes", "0.01"]) == 50 and "enough for 1 rows" in capsys.readouterr().err
    assert not bundle.root.with_name("bundle.smoke").exists()
    for minutes in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="is not a time"):
            smoke(bundle.root, minutes=minutes)
    assert smoke(bundle.root, minutes=40 / 60).rows == 20


def test_a_short_run_that_finds_something_counts_and_a_short_success_does_not_undo_it(bundle, monkeypatch):
    Clock(monkeypatch)
    real = smoke_rows.ask_all
    with monkeypatch.context() as patched:
        patched.setattr(smoke_rows, "ask_all", lambda *a: {e: dict.fromkeys(t, "another") for e, t in real(*a).items()})
        report = smoke(bundle.root, minutes=50 / 60)
        assert not report.passed and report.rows == 25 and report.certified == ()
    short = smoke(bundle.root, minutes=48 / 60)
    assert short.passed and short.certified == () and "failed here" in short.text()
    assert main(["smoke", str(bundle.root), "--minutes", "0.8"]) == 42
    assert smoke(bundle.root, minutes=50 / 60).certified == ("1", "2", "3")
    # Nor does a shorter success take away what a longer one has shown.
    other = _made_elsewhere(bundle)
    assert smoke(other.root).certified == smoke(other.root, minutes=50 / 60).certified == ("1", "2", "3")


def test_families_left_open_take_no_part(bundle, monkeypatch):
    asked = []
    real = smoke_run.ask_all
    monkeypatch.setattr(smoke_run, "ask_all", lambda s, suite, rows, *a: asked.extend(rows) or real(s, suite, rows, *a))
    assert smoke(bundle.root).rows == 36 and not {r.family for r in asked} & {"open"}


def _made_elsewhere(bundle: Bundle) -> Bundle:
    certificate = read_certificate(bundle)
    environment = {**certificate.environment, "instruction_sets": "aarch64 asimddp"}
    write_certificate(bundle, dataclasses.replace(certificate, environment=environment))
    return bundle


def test_the_digest_is_sha256():
    assert flips.answer_digest("") == "e3b0c442"  # of nothing, as everywhere
