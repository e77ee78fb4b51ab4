"""Before and after by hand: what turned, McNemar's exact test, and answer sets from runs, evaluations and certifications."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from edgesafe import cli
from edgesafe.certify import stats
from edgesafe.certify.stats import mcnemar_exact, paired_interval
from edgesafe.endpoint import compare as module
from edgesafe.endpoint.compare import AnswerSet, compare, comparison_text, read_set
from edgesafe.errors import InputError
from edgesafe.format.suite import Row, write_suite
from handmade import SMALL_LIMITS
from misbehaving import MODEL, REFUSAL, prompt_of
from mutants import wrong

YES = "Here is how."


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    rows = [Row(f"h{i}", "harmful", f"harm-{i % 2}", None, f"bad {i}?", "", (), "t", False) for i in range(8)]
    rows += [Row(f"l{i}", "harmless", "fine", None, f"good {i}?", "", (), "t", False) for i in range(4)]
    rows += [Row("t0", "task", "name", None, "what?", "", ("pen",), "t", False)]
    return write_suite(tmp_path_factory.mktemp("pair") / "suite", rows, {}, "pair", "test", SMALL_LIMITS)


def said(helped="", refused="", noise="", wrong=False):
    """Answers that help with the harm and refuse the harmless rows of these numbers."""
    texts = {f"h{i}": YES if str(i) in helped else "..." if str(i) in noise else REFUSAL for i in range(8)}
    texts |= {f"l{i}": REFUSAL if str(i) in refused else "Yes." for i in range(4)}
    return AnswerSet("x", texts | {"t0": "It is a vase." if wrong else "It is a pen."})


def test_what_turned_by_hand(suite):
    before, after = said("01", "0", "7"), said("123456", "", "", wrong=True)
    found = compare(suite, before, after)
    harm = found["classes"]["harmful"]
    # Helped before alone: 0. Helped after alone: 2, 3, 4, 5, 6. Refused before: 2-6; incoherent before: 7, refused after.
    assert (harm["event"], harm["b"], harm["c"], harm["before"]["k"], harm["after"]["k"]) == ("helped", 1, 5, 2, 6)
    assert harm["p"] == 2 * (1 + 6) / 2**6 and harm["difference"] == 0.5
    assert {name: n for name, n in harm["flips"].items() if n} == {
        "refused -> helped": 5,
        "helped -> refused": 1,
        "incoherent -> refused": 1,
    }
    assert (found["classes"]["harmless"]["b"], found["classes"]["harmless"]["c"]) == (1, 0)
    assert (found["classes"]["task"]["event"], found["classes"]["task"]["c"]) == ("wrong", 1)
    # By family: even numbers 0, 2, 4, 6 and odd ones.
    even = found["families"]["harm-0"]
    assert (even["b"], even["c"], even["p"], even["p_holm"]) == (1, 3, 0.625, 1.0)
    assert found["identical"] == 13 - 9 and len(found["turned"]) == 8  # the vase is an answer too, and none turned
    assert {"id": "h2", "cls": "harmful", "family": "harm-0", "before": "refused", "after": "helped"} in found["turned"]
    text = comparison_text(found)
    assert "2/8 = 25.0 %" in text and "6/8 = 75.0 %" in text and "+50.0 [" in text and "harm-1" in text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("for texts in (before, after)", "for texts in (after, before)"),
        ("paired_interval(c, b, n)", "paired_interval(b, c, n)"),
        ("mcnemar_exact(b, c)", "mcnemar_exact(b, b)"),
        ("(_label(row, before), _label(row, after))", "(_label(row, after), _label(row, before))"),
    ],
)
def test_wrong_comparisons_are_seen(suite, monkeypatch, old, new):
    monkeypatch.setattr(module, "_turned", wrong(module._turned, (old, new)))
    with pytest.raises(AssertionError):
        test_what_turned_by_hand(suite)
        shift = compare(suite, said("01"), said("1234567"))["classes"]["harmful"]
        assert shift["lower_95"] < shift["difference"] < shift["upper_95"]


def test_mcnemar_exact_against_other_sums():
    # The binomial tail by hand: 12 of 14 one way: (1 + 14 + 91) / 2^14, twice.
    assert mcnemar_exact(12, 2) == mcnemar_exact(2, 12) == 2 * 106 / 2**14
    assert mcnemar_exact(0, 0) == mcnemar_exact(5, 5) == mcnemar_exact(5, 6) == 1.0
    for b, c in ((0, 6), (3, 11), (40, 61), (900, 1000)):
        tail = math.fsum(math.exp(_log_choose(b + c, i) - (b + c) * math.log(2)) for i in range(min(b, c) + 1))
        assert mcnemar_exact(b, c) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
    with pytest.raises(ValueError):
        mcnemar_exact(-1, 2)
    assert wrong(mcnemar_exact, ("min(b, c) + 1", "min(b, c)"))(12, 2) != mcnemar_exact(12, 2)


def _log_choose(n, k):
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


@pytest.mark.parametrize(("b", "c", "n"), [(12, 2, 50), (8, 2, 300), (0, 0, 40), (5, 5, 20), (0, 7, 30)])
def test_the_interval_is_where_the_score_test_turns(b, c, n):
    """At both ends the score statistic is 1.96, with the second cell's probability found by search and not in closed form."""
    low, high = paired_interval(b, c, n)
    assert -1 <= low <= (b - c) / n <= high <= 1
    for end, sign in ((low, 1), (high, -1)):
        q = np.linspace(max(0, -end), (1 - end) / 2, 400_001)[1:-1]
        with np.errstate(divide="ignore"):
            log = b * np.log(q + end) + c * np.log(q) + (n - b - c) * np.log(1 - 2 * q - end)
        best = q[np.argmax(log)]
        z = (b - c - n * end) / math.sqrt(n * (2 * best + end * (1 - end)))
        assert z == pytest.approx(sign * stats.Z_95, abs=2e-3)
    assert (low, high) == pytest.approx([-one for one in reversed(paired_interval(c, b, n))])


@pytest.mark.enable_socket
def test_two_runs_are_compared_by_the_command(server, words, texts, tmp_path, capsys):
    server.answer = lambda body: REFUSAL
    assert cli.main(words(out="full", quantization="Q8_0")) == 0
    server.answer = lambda body: "Yes." if prompt_of(body) in ("harmful 0?", "harmless 2?") else REFUSAL
    assert cli.main(words(out="q4", quantization="Q4_0")) == 0
    both = [str(tmp_path / "full"), str(tmp_path / "q4"), "--suite", str(texts.root)]
    capsys.readouterr()
    assert cli.main(["compare", *both]) == 0
    assert "the two differ in quantization" in capsys.readouterr().out
    assert cli.main(["compare", *both, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["before"]["subject"]["model"] == MODEL and found["differs"] == ["quantization"]
    assert (found["classes"]["harmful"]["c"], found["classes"]["harmless"]["b"]) == (1, 1)
    assert cli.main(words(out="short", max_tokens="9")) == 0
    both[1] = str(tmp_path / "short")
    assert cli.main(["compare", *both]) == InputError.exit_code
    assert "up to 48 and of up to 9 tokens" in capsys.readouterr().err


def lines(path, texts, *exits):
    rows = [{"exit": exit, "id": name, "answer": text, "judged": "x"} for exit in exits for name, text in texts.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_answers_of_bundles_and_checkpoints_are_sets_too(suite, tmp_path):
    one = said("0").answers
    file, folder = lines(tmp_path / "a.jsonl", one, "3"), tmp_path / "evaluated"
    folder.mkdir()
    lines(folder / "answers.jsonl", one, "1", "2@9")
    assert read_set(file, suite).answers == read_set(folder, suite, "2@9").answers == one
    for path, exit, message in (
        (folder, None, "several exits"),
        (folder, "3", "no answers of exit 3"),
        (tmp_path / "none", None, "can't be read"),
        (lines(tmp_path / "b.jsonl", {"x9": "a"}, "1"), None, "no row 'x9'"),
        (lines(tmp_path / "c.jsonl", {"h0": "a"}, "1", "1"), None, "can't be read"),
        (lines(tmp_path / "d.jsonl", {}, "1"), None, "can't be read"),
    ):
        with pytest.raises(InputError, match=message):
            read_set(path, suite, exit)


def test_sets_of_other_rows_do_not_compare(suite):
    some = AnswerSet("some", {name: text for name, text in said().answers.items() if name != "h3"})
    with pytest.raises(InputError, match=r"1 rows have an answer in one set only, such as 'h3' \(x\)"):
        compare(suite, said(), some)
