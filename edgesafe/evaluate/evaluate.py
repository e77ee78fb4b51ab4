"""Evaluation of a checkpoint at its exits: answers, judges, rates, and the folder that holds them.

report.json, in which a `rate` is {k, n, rate, lower_95, upper_95} (0..1) and an `identity` is what a judge, reward or toxicity
says it is, at least {name}. Keys that are null or absent were not asked for.

    model, suite: digests. suite_name, split, limits: the suite's own.
    judge: identity of the string judge; second_judge, reward, toxicity: identities or null.
    trained_with_reward: identity of the reward that the model's edgesafe.json names, or null.
    reference: an exit's text, as every exit here ("6"); n_blocks, max_new_tokens, versions.
    exits: one for every exit, ascending: {exit, reference: bool, group: "early" | "middle" | "late",
        harmful, overrefusal, incoherent, accuracy: rates by the string judge, families: {family: rate},
        kinds: {"named" | "mistaken" | "other": how many of the harmful answers, by what they name},
        length: {mean, unit: "words"},
        second: {harmful, overrefusal, incoherent: rates over the answers that the second judge could judge, unparsed: rate,
            agreement: {n, agree, agreement: 0..1, kappa: number or null, unparsed: count}},
        reward: {mean, by_class: {"harmful" | "harmless" | "task": mean}}, toxicity: {mean, above_half: rate}}.
    groups: [{name: "early" | "middle" | "late" | "all", exits: [..]}] with an exit's figures from harmful on: the answers of
        the exits pooled, the intervals clustered by row. Exits with fewer visual tokens ("6@9") are in none.
    agreement: the same as an exit's, over all answers; null without a second judge.
    open: {exit: {family: rate}}: the suite's open families, which all other figures leave out.
    broken: {exit: reasons}: the certificate's limits that its answers break, compared with `before` at its reference depth;
        without it, with a model that makes no mistake.
    paired: null without `before`, else {"before": the earlier model's digest, "exits": [{exit,
        harmful, overrefusal, accuracy: {b, c, p, p_holm}}]}: of the same rows, b had it before and not now, c now and not
        before (harm: b counts the fixed rows; accuracy: b counts the lost ones); p by McNemar clustered by request, p_holm
        corrected over the exits.
    controls: null unless asked for, else {"text-only": {"any": rates}, "blank", "noise", "rescaled": {"1": rates, ..}},
        rates = {harmful, overrefusal, incoherent, accuracy, families}; see `edgesafe.evaluate.controls`.

A line of answers.jsonl is {exit, id, answer, judged, second}; `second` is null where there is no second judge or it could
not parse the answer. Beside them lie report.html, table.txt and plot.png.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgesafe.certify.earlier import ANSWERS, REPORT, read_answers, read_report
from edgesafe.certify.tally import families, tally
from edgesafe.certify.verdict import kinds_of_harm, make_baseline, verdicts
from edgesafe.checkpoint.exit_model import ExitModel, by_cost, load, prompt_ids
from edgesafe.checkpoint.geometry import check_exits
from edgesafe.evaluate.answers import answer_suite
from edgesafe.evaluate.charts import save_plot
from edgesafe.evaluate.controls import control_answers
from edgesafe.evaluate.html_report import write_html
from edgesafe.evaluate.judges import Judge, Reward, StringJudge, Toxicity, agreement, keep_apart
from edgesafe.evaluate.paired import paired
from edgesafe.evaluate.rates import GROUPS, Answers, group_of, group_rates, length, mean_reward, once, second_rates, toxic
from edgesafe.evaluate.text_report import report_table
from edgesafe.format.certificate import Baseline
from edgesafe.format.exits import Exit, parse_exits
from edgesafe.format.files import digest_folder, replacing
from edgesafe.format.suite import MAX_NEW_TOKENS, Row, Suite, read_suite
from edgesafe.format.targets import NEW, check_target
from edgesafe.format.training_record import read_training_metrics, read_training_reward

# More tokens in a batch fill the memory of small machines: 128 rows beside one of 6,000 tokens did not fit into 23 GB.
_ROWS, _TOKENS = 128, 128 * 512


@dataclass(frozen=True)
class Judges:
    """Who looks at the answers: the string judge and, where asked for, a second judge, a reward and a toxicity."""

    first: Judge
    second: Judge | None = None
    reward: Reward | None = None
    toxicity: Toxicity | None = None

    def identities(self) -> dict[str, Any]:
        """Who they are, by the report's keys; None for those that were not asked for."""
        named = {"judge": self.first, "second_judge": self.second, "reward": self.reward, "toxicity": self.toxicity}
        return {key: dict(one.identity) if one else None for key, one in named.items()}


@dataclass(frozen=True)
class Scored:
    """Their scores, each {exit: {row id: ..}}: the two judges' classes, rewards, toxicities; None if not asked for."""

    first: dict[Exit, dict[str, str | None]]
    second: dict[Exit, dict[str, str | None]] | None
    reward: dict[Exit, dict[str, float]] | None
    toxicity: dict[Exit, dict[str, float]] | None


def evaluate(
    model_dir: Path,
    suite_dir: Path,
    out: Path,
    *,
    before: Path | None = None,
    exits: str = "all",
    second: Judge | None = None,
    reward: Reward | None = None,
    toxicity: Toxicity | None = None,
    controls: bool = False,
) -> dict[str, Any]:
    """Evaluate a checkpoint at its exits; write report.json, report.html, answers.jsonl, table.txt and plot.png.

    Args:
        model_dir: checkpoint folder.
        suite_dir: suite folder.
        out: new folder.
        before: folder of an earlier evaluation on the same suite: drawn into the same plot, and tested against row by row.
        exits: as `edgesafe.format.exits.parse_exits` reads them; the reference is always among them.
        second: a second judge, whose rates and agreement are reported beside the string judge's.
        reward: reported as a mean; never one of the judges, nor made from one.
        toxicity: scores the answers' words.
        controls: whether to answer under `edgesafe.evaluate.controls` too.

    Returns:
        The report, which report.json holds.

    Raises:
        InputError: `out` exists, or `before` is not an evaluation by this edgesafe and judge of this suite and answers as long.
        ConfigError: no such exit; or a judge is also the reward, this one or the one that trained the model.
    """
    check_target(out, model=model_dir)
    judges = Judges(StringJudge(), second, reward, toxicity)
    trained_with = read_training_reward(model_dir)
    keep_apart([judges.first, *([second] if second else [])], [reward, trained_with])
    suite = read_suite(suite_dir)
    earlier = read_report(before, suite.digest, MAX_NEW_TOKENS) if before else None
    earlier_answers = read_answers(before, suite) if before else None
    llava = load(model_dir)
    chosen = sorted({*parse_exits(exits, llava.n_blocks, None), llava.reference})
    check_exits(chosen, llava.recipe, llava.geometry)
    answers = answer_suite(llava, suite, chosen, rows_at_once(llava, suite.rows))
    scored = score(judges, suite.rows, answers)
    report = {
        **_run(llava, suite, digest_folder(model_dir), judges, trained_with),
        **rates(suite.counted, answers, scored, llava),
        "open": {str(exit): open_families(suite, said) for exit, said in answers.items()} if suite.left_open else {},
        "broken": broken(suite, answers, llava.reference, _baseline(suite, earlier, earlier_answers), by_cost(llava, chosen)),
        "paired": None,
        "controls": control_rates(llava, suite, chosen) if controls else None,
    }
    if earlier and earlier_answers:
        report["paired"] = {"before": earlier["model"], "exits": paired(suite.counted, earlier_answers, answers)}
    lines = answer_lines(suite.rows, answers, scored)
    write(out, report, earlier, suite.rows, lines, read_training_metrics(model_dir))
    return report


def rows_at_once(llava: ExitModel, rows: Sequence[Row]) -> int:
    """Rows of a batch: 128, or as many of the longest as fit `_TOKENS`, since a batch is as long as its longest row."""
    longest = max(len(prompt_ids(llava, row.prompt)) for row in rows) + MAX_NEW_TOKENS
    return max(1, min(_ROWS, _TOKENS // longest))


def broken(
    suite: Suite,
    answers: Mapping[Exit, Answers],
    reference: Exit,
    baseline: Baseline | None,
    ascending: Sequence[Exit] = (),
) -> dict[str, list[str]]:
    """The limits that each exit's answers break, {the exit's text: reasons}; none for rows that the suite lacks."""
    left_open, limits = suite.left_open, suite.limits
    found = verdicts(suite.rows, answers, reference, limits, baseline, left_open=left_open, by_cost=ascending)
    return {str(one.exit): [check.reason() for check in one.checks if check.n and not check.kept] for one in found}


def _baseline(suite: Suite, earlier: Mapping[str, Any] | None, answers: Mapping[Exit, Answers] | None) -> Baseline | None:
    """The earlier model at its reference; None without one, and then exits compare with a model that makes no mistake."""
    if not (earlier and answers):
        return None
    reference = Exit.parse(earlier["reference"])
    return make_baseline(suite.counted, answers[reference], earlier["model"], reference) if reference in answers else None


def _run(llava: ExitModel, suite: Suite, model: str, judges: Judges, trained_with: dict[str, Any] | None) -> dict[str, Any]:
    """What was run, as the report has it before its figures."""
    return {
        "model": model,
        "suite": suite.digest,
        "suite_name": suite.name,
        "split": suite.split,
        "limits": dict(suite.limits),
        **judges.identities(),
        "trained_with_reward": trained_with,
        "reference": str(llava.reference),
        "n_blocks": llava.n_blocks,
        "max_new_tokens": MAX_NEW_TOKENS,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def score(judges: Judges, rows: Sequence[Row], answers: Mapping[Exit, Answers]) -> Scored:
    """Show every answer to each of the judges, rewards and toxicities."""
    toxicity = judges.toxicity
    return Scored(
        once(judges.first, rows, answers),
        once(judges.second, rows, answers) if judges.second else None,
        once(judges.reward, rows, answers) if judges.reward else None,
        once(lambda _, texts: toxicity(texts), rows, answers) if toxicity else None,
    )


def summarise(rows: Sequence[Row], answers: Answers) -> dict[str, Any]:
    """Rates of one exit, each {k, n, rate, lower_95, upper_95}; `families` holds the rate that matters for each family."""
    rates: dict[str, Any] = {name: asdict(r) for name, r in tally(rows, answers).items()}
    rates["families"] = {name: asdict(r) for name, r in families(rows, answers).items()}
    return rates


def open_families(suite: Suite, answers: Answers) -> dict[str, Any]:
    """The rates of the families that no verdict speaks of, at one exit."""
    rows = [row for row in suite.rows if row.family in suite.left_open]
    return {name: asdict(r) for name, r in families(rows, answers).items()}


def rates(rows: Sequence[Row], answers: Mapping[Exit, Answers], scored: Scored, llava: ExitModel) -> dict[str, Any]:
    """`exits`, `groups` and `agreement` of the report."""
    exits = []
    for exit in answers:
        place = {"reference": exit == llava.reference, "group": group_of(exit, llava.n_blocks)}
        figures = {**summarise(rows, answers[exit]), "kinds": kinds_of_harm(rows, answers[exit])}
        if scored.second:
            figures["second"] = second_rates(rows, scored.second[exit])
        exits.append({"exit": str(exit), **place, **_with_scores(figures, rows, answers, scored, [exit])})
    groups = []
    for name in (*GROUPS, "all"):
        whole = [exit for exit in answers if exit.whole]
        within = [exit for exit in whole if name in ("all", group_of(exit, llava.n_blocks))]
        if within:
            figures = group_rates(rows, {exit: answers[exit] for exit in within}, scored.first, scored.second)
            named = {"name": name, "exits": [str(exit) for exit in within]}
            groups.append({**named, **_with_scores(figures, rows, answers, scored, within)})
    return {"exits": exits, "groups": groups, "agreement": agreed(rows, scored, list(answers)) if scored.second else None}


def _with_scores(
    figures: dict[str, Any], rows: Sequence[Row], answers: Mapping[Exit, Answers], scored: Scored, exits: Sequence[Exit]
) -> dict[str, Any]:
    """The rates of some exits together with the judges' agreement, lengths, rewards and toxicity."""
    figures["length"] = length([answers[exit][row.id] for exit in exits for row in rows])
    if scored.second:
        figures["second"]["agreement"] = agreed(rows, scored, exits)
    if scored.reward:
        figures["reward"] = mean_reward(rows, [scored.reward[exit] for exit in exits])
    if scored.toxicity:
        figures["toxicity"] = toxic([scored.toxicity[exit] for exit in exits])
    return figures


def agreed(rows: Sequence[Row], scored: Scored, exits: Sequence[Exit]) -> dict[str, Any]:
    """The agreement of the two judges over some exits' answers."""
    second = scored.second or {}
    pairs = [(scored.first[exit][row.id], second[exit][row.id]) for exit in exits for row in rows]
    return agreement([x for x, _ in pairs], [y for _, y in pairs])


def control_rates(llava: ExitModel, suite: Suite, exits: Sequence[Exit]) -> dict[str, Any]:
    """`controls` of the report: rates of each control at each exit."""
    by_control = control_answers(llava, suite, exits)
    return {
        name: {exit: summarise(suite.counted, answers) for exit, answers in by_exit.items()}
        for name, by_exit in by_control.items()
    }


def answer_lines(rows: Sequence[Row], answers: Mapping[Exit, Answers], scored: Scored) -> Iterator[dict[str, Any]]:
    """The lines of answers.jsonl."""
    for exit in answers:
        for row in rows:
            yield {
                "exit": str(exit),
                "id": row.id,
                "answer": answers[exit][row.id],
                "judged": scored.first[exit][row.id],
                "second": scored.second[exit][row.id] if scored.second else None,
            }


def write(
    out: Path,
    report: dict[str, Any],
    earlier: dict[str, Any] | None,
    rows: Sequence[Row],
    lines: Iterable[dict[str, Any]],
    training: list[dict[str, Any]],
) -> None:
    """Write the folder beside `out` and rename it into place."""
    with replacing(out) as work:
        (folder := work / NEW).mkdir()
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        with (folder / ANSWERS).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / "table.txt").write_text(report_table(report) + "\n", encoding="utf-8")
        save_plot(report, earlier, folder / "plot.png")
        write_html(folder, {**report, **({"training": training} if training else {})}, earlier, rows)
