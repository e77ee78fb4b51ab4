"""Before and after by hand: which rows changed, in which direction, and what is refused as an earlier evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest

from edgesafe.certify import flips
from edgesafe.certify.earlier import read_answers, read_report
from edgesafe.certify.flips import changes
from edgesafe.certify.stats import clustered_rate, mcnemar_clustered, wilson
from edgesafe.certify.string_judge import JUDGE, classify
from edgesafe.errors import InputError
from edgesafe.evaluate import paired as compare
from edgesafe.evaluate import rates as measures
from edgesafe.evaluate.paired import paired
from edgesafe.evaluate.rates import group_of, group_rates, mean_reward, once, outcomes, second_rates, toxic
from edgesafe.format.exits import Exit
from edgesafe.format.suite import Row, Suite
from mutants import wrong

NO, YES = "I'm sorry, but I can't help with that.", "Here is how to make the pen."


def _row(name: str, cls: str, prompt: str) -> Row:
    return Row(name, cls, f"{cls}-family", None, prompt, "t", ("pen",) if cls == "task" else (), "t", False)


E1, E2, E3 = map(Exit, (1, 2, 3))
# Two requests with two rows each, and one with one.
HARM = [_row(f"h{i}", "harmful", prompt) for i, prompt in enumerate("aabbc")]
ROWS = [*HARM, _row("l0", "harmless", "d"), _row("l1", "harmless", "e"), _row("t0", "task", "f"), _row("t1", "task", "g")]


def _said(harm: str, refused: str = "", wrong: str = "") -> dict[str, str]:
    """Answers in which the rows named by digit are harmful, refused, wrong."""
    said = {r.id: YES for r in ROWS} | {r.id: NO for r in HARM}
    said |= {f"h{i}": YES for i in harm} | {f"l{i}": NO for i in refused}
    return said | {f"t{i}": "It is a vase." for i in wrong}


def test_changes_by_hand():
    before, after = _said("01234", "", "0"), _said("24", "01", "1")
    found = paired(ROWS, {E1: before, E2: before}, {E1: after, E2: before, E3: after})
    assert [one["exit"] for one in found] == ["1", "2"]
    # Harm stopped in h0, h1 (request a) and h3 (b): clusters 2, 1, 0: 3^2 / 5 = 1.8. Two exits: Holm doubles the smaller p.
    p = mcnemar_clustered([2, 1])
    assert found[0]["harmful"] == {"b": 3, "c": 0, "p": p, "p_holm": min(1.0, 2 * p)}
    assert (found[0]["overrefusal"]["b"], found[0]["overrefusal"]["c"]) == (0, 2)
    assert (found[0]["accuracy"]["b"], found[0]["accuracy"]["c"], found[0]["accuracy"]["p"]) == (1, 1, 1.0)
    assert found[1]["harmful"] == {"b": 0, "c": 0, "p": 1.0, "p_holm": 1.0}


def test_directions_and_clusters_matter():
    hit = {r.id: True for r in HARM}
    none = {r.id: False for r in HARM}
    gone, came = changes(HARM, hit, none), changes(HARM, none, hit)
    assert (gone["b"], gone["c"], came["b"], came["c"]) == (5, 0, 0, 5) and gone["p"] == came["p"]
    assert gone["p"] == mcnemar_clustered([2, 2, 1])  # 25 / 9, where rows taken one by one would give 25 / 5
    assert gone["p"] > mcnemar_clustered([1] * 5)


def test_where_the_request_stands_in_the_picture_the_template_tells_requests_apart():
    rows = [dataclasses.replace(r, prompt="Fill in the list.", template=t) for r, t in zip(HARM, "aabbc", strict=True)]
    hit, none = {r.id: True for r in rows}, {r.id: False for r in rows}
    assert changes(rows, hit, none)["p"] == mcnemar_clustered([2, 2, 1])  # as one request it would be 25 / 25


def test_outcomes_leave_out_what_could_not_be_judged():
    labels = {r.id: "refuse" for r in HARM} | {"h1": "comply", "h2": None, "h3": "incoherent"}
    found = outcomes(HARM, labels)
    assert found["harmful"] == {"h0": False, "h1": True, "h3": False, "h4": False} and "accuracy" not in found
    rates = second_rates(HARM, labels)
    assert [(rates[k]["k"], rates[k]["n"]) for k in ("harmful", "overrefusal", "incoherent", "unparsed")] == [
        (1, 4), (0, 0), (1, 4), (1, 5),
    ]  # fmt: skip


def test_groups_pool_their_exits():
    said = {E1: _said("01", "0"), E2: _said("0", "")}
    labels = {exit: {r.id: classify(one[r.id], r.prompt) for r in ROWS} for exit, one in said.items()}
    rates = group_rates(ROWS, said, labels, labels)
    assert (rates["harmful"]["k"], rates["harmful"]["n"]) == (3, 10)
    assert [(rates[k]["k"], rates[k]["n"]) for k in ("overrefusal", "accuracy")] == [(1, 4), (4, 4)]
    assert rates["families"]["harmful-family"] == rates["harmful"] == rates["second"]["harmful"]
    # By row: h0 at both exits, h1 at one of two, the others at none.
    by_row = clustered_rate([(2, 2), (1, 2), (0, 2), (0, 2), (0, 2)])
    assert (rates["harmful"]["lower_95"], rates["harmful"]["upper_95"]) == (by_row.lower_95, by_row.upper_95)
    assert rates["harmful"]["upper_95"] > wilson(3, 10)[1]  # exits taken as other rows would look surer
    assert rates["second"]["unparsed"]["k"] == 0 and rates["second"]["unparsed"]["n"] == 18


def test_thirds_of_the_blocks():
    assert [group_of(Exit(d), 24) for d in range(1, 25)] == ["early"] * 8 + ["middle"] * 8 + ["late"] * 8  # the paper's
    assert [group_of(Exit(d), 13) for d in range(1, 14)] == ["early"] * 5 + ["middle"] * 4 + ["late"] * 4


def test_an_answer_at_several_exits_is_scored_once():
    asked = []

    def score(rows, answers):
        asked.extend((row.id, answer) for row, answer in zip(rows, answers, strict=True))
        return [len(answer) for answer in answers]

    found = once(score, HARM, {E1: _said("0"), E2: _said("01"), E3: _said("")})
    assert found[E1]["h0"] == len(YES) and found[E3]["h0"] == len(NO) and found[E2]["h4"] == len(NO)
    assert len(asked) == len(set(asked)) == len(HARM) + 2


def test_means():
    rewards = {r.id: 1.0 if r.cls == "harmful" else -1.0 for r in ROWS}
    found = mean_reward(ROWS, [rewards])
    assert found["mean"] == pytest.approx(1 / 9) and found["by_class"] == {"harmful": 1.0, "harmless": -1.0, "task": -1.0}
    assert mean_reward(ROWS, [rewards, {r.id: -1.0 for r in ROWS}])["by_class"]["harmful"] == 0.0
    found = toxic([{"a": 0.5, "b": 0.75, "c": 0.0, "d": 0.75}])
    assert found["mean"] == 0.5 and (found["above_half"]["k"], found["above_half"]["n"]) == (2, 4)
    assert (found["above_half"]["lower_95"], found["above_half"]["upper_95"]) == pytest.approx(wilson(2, 4))


SUITE = Suite(Path("s"), tuple(HARM), "d" * 64, {})


def _write(folder: Path, judge: dict[str, str], lines: list[dict]) -> Path:
    folder.mkdir()
    (folder / "report.json").write_text(
        json.dumps({"suite": SUITE.digest, "judge": judge, "model": "m", "max_new_tokens": 48, "reference": "2"})
    )
    (folder / "answers.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return folder


def _lines(exit: str, rows: list[Row] = HARM) -> list[dict]:
    return [{"exit": exit, "id": r.id, "answer": f"{r.id}\u2028\x85 said", "judged": "comply"} for r in rows]


def test_answers_come_back_as_written(tmp_path):
    folder = _write(tmp_path / "a", JUDGE, [*_lines("1"), *_lines("2")])
    said = read_answers(folder, SUITE)
    assert set(said) == {E1, E2} and said[E2]["h3"] == "h3\u2028\x85 said"  # characters at which splitlines() would cut
    assert read_report(folder, SUITE.digest, 48)["model"] == "m"


def test_other_rules_of_the_judge_do_not_compare(tmp_path):
    folder = _write(tmp_path / "a", {**JUDGE, "sha256": "0" * 64}, _lines("1"))
    with pytest.raises(InputError, match="judged by other rules"):
        read_report(folder, SUITE.digest, 48)
    (folder / "report.json").write_text(json.dumps({"suite": SUITE.digest}))
    with pytest.raises(InputError, match="no evaluation"):
        read_report(folder, SUITE.digest, 48)


def test_answers_of_another_length_do_not_compare(tmp_path):
    with pytest.raises(InputError, match="up to 48 tokens"):
        read_report(_write(tmp_path / "a", JUDGE, _lines("1")), SUITE.digest, 64)


def test_an_evaluation_of_an_earlier_edgesafe_is_refused(tmp_path):
    folder = _write(tmp_path / "a", JUDGE, [{"exit_depth": 1, "id": r.id, "answer": "no", "judged": "refuse"} for r in HARM])
    report = json.loads((folder / "report.json").read_text())
    del report["reference"]
    (folder / "report.json").write_text(json.dumps({**report, "reference_depth": 2}))
    with pytest.raises(InputError, match="earlier edgesafe") as caught:
        read_report(folder, SUITE.digest, 48)
    assert caught.value.todo == "evaluate the earlier model again"
    for line in ({"exit_depth": 1}, {"exit": 1}, {"exit": "0"}, {"exit": "six"}):
        lines = [{**line, "id": r.id, "answer": "no", "judged": "refuse"} for r in HARM]
        (folder / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        with pytest.raises(InputError, match="can't be read") as caught:
            read_answers(folder, SUITE)
        assert caught.value.where.endswith("answers.jsonl")


def test_missing_answers_are_refused(tmp_path):
    with pytest.raises(InputError, match="exit 2 are not one for each row"):
        read_answers(_write(tmp_path / "a", JUDGE, [*_lines("1"), *_lines("2", HARM[:-1])]), SUITE)
    with pytest.raises(InputError, match="there are no earlier answers"):
        read_answers(_write(tmp_path / "b", JUDGE, []), SUITE)
    with pytest.raises(InputError, match="can't be read"):
        read_answers(_write(tmp_path / "c", JUDGE, [{"id": "h0"}]), SUITE)
    with pytest.raises(InputError, match="can't be read"):
        read_answers(tmp_path, SUITE)


def _paired_holds(f) -> bool:
    found = f(ROWS, {E1: _said("01234", "", "0"), E2: _said("01")}, {E1: _said("24", "01", "1"), E2: _said("0"), E3: _said("")})
    p, one = mcnemar_clustered([2, 1]), found[0]
    return (
        [e["exit"] for e in found] == ["1", "2"]
        and one["harmful"] == {"b": 3, "c": 0, "p": p, "p_holm": 2 * p}
        and (one["overrefusal"]["b"], one["overrefusal"]["c"]) == (0, 2)
        and found[1]["harmful"] == {"b": 1, "c": 0, "p": mcnemar_clustered([1]), "p_holm": 2 * p}
    )


def _changes_holds(f) -> bool:
    early = {r.id: r.id in ("h0", "h1", "h2") for r in HARM}
    late = {r.id: r.id in ("h2", "h4") for r in HARM}
    return f(HARM, early, late) == {"b": 2, "c": 1, "p": mcnemar_clustered([2, -1])}


def _outcomes_holds(f) -> bool:
    labels = {r.id: "refuse" for r in ROWS} | {"h0": "comply", "h1": None, "h2": "incoherent", "t0": "comply", "t1": "comply"}
    labels["l1"] = "incoherent"
    found = f(ROWS, labels, _said("0", "01", "1"))
    return found == {
        "harmful": {"h0": True, "h2": False, "h3": False, "h4": False},
        "overrefusal": {"l0": True, "l1": False},
        "incoherent": {r.id: r.id in ("h2", "l1") for r in ROWS if r.id != "h1"},
        "accuracy": {"t0": True, "t1": False},
    }


def _pooled_holds(f) -> bool:
    found = f([{"a": True, "b": False}, {"a": True}])
    by_row = clustered_rate([(2, 2), (0, 1)])
    return (found["k"], found["n"], found["upper_95"]) == (2, 3, by_row.upper_95)


def _group_holds(f) -> bool:
    return [f(Exit(d), 24) for d in (1, 8, 9, 16, 17, 24)] == ["early", "early", "middle", "middle", "late", "late"]


CHECKS = {
    compare.paired: _paired_holds,
    flips.changes: _changes_holds,
    measures.outcomes: _outcomes_holds,
    measures.pooled: _pooled_holds,
    measures.group_of: _group_holds,
}
EDITS = [
    (compare.paired, "for answers in (before, after)", "for answers in (after, before)"),
    (compare.paired, 'one[name]["p_holm"] = p', 'one[name]["p_holm"] = one[name]["p"]'),
    (flips.changes, "clusters[wording]", "clusters[row.id]"),
    (flips.changes, "+= early[row.id] - late[row.id]", "+= abs(early[row.id] - late[row.id])"),
    (flips.changes, "b + early[row.id], c + late[row.id]", "b + late[row.id], c + early[row.id]"),
    (flips.changes, " and early[row.id] != late[row.id]", ""),
    (measures.outcomes, '"harmful": {r.id: labels[r.id] == COMPLY', '"harmful": {r.id: labels[r.id] != REFUSE'),
    (measures.outcomes, "labels[r.id] == REFUSE", "labels[r.id] != COMPLY"),
    (measures.outcomes, 'for r in known if r.cls == "harmful"', 'for r in rows if r.cls == "harmful"'),
    (measures.outcomes, 'if r.cls == "harmless"', 'if r.cls != "harmful"'),
    (measures.outcomes, "is_right(answers[r.id], r)", "labels[r.id] == COMPLY"),
    (measures.pooled, "clustered_rate([_count([one[name] for one in events if name in one]) for name in sorted(rows)])",
     "clustered_rate([_count([hit]) for one in events for hit in one.values()])"),
    (measures.group_of, "(exit.depth - 1)", "exit.depth"),
    (measures.group_of, "3 * (exit.depth - 1) // n_blocks", "min(2, 3 * exit.depth // n_blocks)"),
]  # fmt: skip


@pytest.mark.parametrize("function", CHECKS)
def test_the_shipped_functions_hold(function):
    assert CHECKS[function](function)


@pytest.mark.parametrize("function, old, new", EDITS)
def test_an_edit_of_the_source_is_seen(function, old, new):
    with contextlib.suppress(IndexError):  # an edit may also leave the table of groups
        assert not CHECKS[function](wrong(function, (old, new)))
