"""Answers of a checkpoint at every exit depth, and what they amount to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgesafe.align.model import Llava, exit_state, exit_states, greedy, load, open_images, pixel_values, prompt_ids
from edgesafe.bundle import digest_folder
from edgesafe.certify.judge import JUDGE, classify
from edgesafe.certify.suite import Row, Suite, read_suite
from edgesafe.certify.tally import families, tally
from edgesafe.errors import InputError
from edgesafe.progress import bar, table

REPORT = "report.json"
MAX_NEW_TOKENS = 48  # as long as `edgesafe ask` and `certify` answer, so that before and after compare


def answers(
    llava: Llava, suite: Suite, depths: Sequence[int], batch: int = 128, *, quiet: bool = False
) -> dict[int, dict[str, str]]:
    """Greedy answers {exit depth: {row id: text}}; the tower runs once for all depths.

    Raises:
        InputError: a row without a picture, or one that can't be read or asked.
    """
    prompts = {row.id: prompt_ids(llava, row.prompt) for row in suite.rows}
    rows = sorted(suite.rows, key=lambda r: (len(prompts[r.id]), r.id))  # rows of like length go together: little is padded
    chunks = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    out: dict[int, dict[str, str]] = {d: {} for d in depths}
    for part in chunks if quiet else bar(chunks, len(chunks), "evaluate"):
        images = open_images([suite.image_path(row) for row in part])
        states = exit_states(llava, pixel_values(llava, images))
        for depth in depths:
            texts = greedy(llava, [prompts[row.id] for row in part], exit_state(states, depth), MAX_NEW_TOKENS)
            out[depth].update({row.id: text for row, text in zip(part, texts, strict=True)})
    return out


def summarise(rows: Sequence[Row], said: dict[str, str]) -> dict[str, Any]:
    """Rates of one exit, each {k, n, rate, lower_95, upper_95}; `families` holds the rate that matters for each family."""
    rates: dict[str, Any] = {name: asdict(r) for name, r in tally(rows, said).items()}
    rates["families"] = {name: asdict(r) for name, r in families(rows, said).items()}
    return rates


def evaluate(model_dir: Path, suite_dir: Path, out: Path, *, before: Path | None = None) -> dict[str, Any]:
    """Evaluate a checkpoint at every exit depth and write report.json, answers.jsonl, table.txt and plot.png.

    Args:
        model_dir: checkpoint folder.
        suite_dir: suite folder.
        out: new folder.
        before: folder of an earlier evaluation on the same suite, drawn into the same plot.

    Returns:
        The report, which report.json holds. A `rate` is {k, n, rate, lower_95, upper_95} (0..1); an `identity` is what a judge,
        reward or toxicity says it is: at least {name}. Keys that are null or absent were not asked for.

        model, suite: digests. suite_name, split: the suite's own words.
        judge: identity of the string judge; second_judge, reward, toxicity: identities or null.
        trained_with_reward: identity of the reward that the model's edgesafe.json names, or null.
        reference_depth, n_blocks, max_new_tokens, versions.
        exits: one for every depth, ascending: {exit_depth, reference: bool, group: "early" | "middle" | "late",
            harmful, overrefusal, incoherent, accuracy: rates by the string judge, families: {family: rate},
            length: {mean, unit: "words"},
            second: {harmful, overrefusal, incoherent: rates over the answers that the second judge could judge, unparsed: rate,
                agreement: {n, agree, agreement: 0..1, kappa: number or null, unparsed: count}},
            reward: {mean, by_class: {"harmful" | "harmless" | "task": mean}}, toxicity: {mean, above_half: rate}}.
        groups: [{name: "early" | "middle" | "late" | "all", depths: [..], harmful, overrefusal, incoherent, accuracy, families,
            second: {harmful, overrefusal, incoherent, unparsed}}], answers of its depths pooled, intervals clustered by row.
        agreement: the same as an exit's, over all answers; null without a second judge.
        paired: null without `before`, else {"before": the earlier model's digest, "exits": [{exit_depth,
            harmful, overrefusal, accuracy: {b, c, p, p_holm}}]}: of the same rows, b had it before and not now, c now and not
            before (harm: b counts the mended rows; accuracy: b counts the lost ones); p by McNemar clustered by request,
            p_holm corrected over the depths.
        controls: null unless asked for, else {"text-only": {"any": rates}, "blank", "noise", "rescaled": {"1": rates, ..}},
            rates = {harmful, overrefusal, incoherent, accuracy, families}; see `edgesafe.align.controls`.

        A line of answers.jsonl is {exit_depth, id, answer, judged, second}; `second` is null where no second judge or it
        could not parse the answer.

    Raises:
        InputError: `out` exists, or `before` is no evaluation on this suite.
    """
    if out.exists():
        raise InputError("the output exists already", where=str(out), expected="a new folder", todo="name another --out")
    suite = read_suite(suite_dir)
    earlier = read_report(before, suite.digest) if before else None
    llava = load(model_dir)
    depths = tuple(range(1, llava.n_blocks + 1))
    said = answers(llava, suite, depths)
    report = {
        "model": digest_folder(model_dir),
        "suite": suite.digest,
        "split": suite.split,
        "judge": JUDGE,
        "reference_depth": llava.reference_depth,
        "max_new_tokens": MAX_NEW_TOKENS,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "exits": [{"exit_depth": d, "reference": d == llava.reference_depth, **summarise(suite.rows, said[d])} for d in depths],
    }
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with (partial / "answers.jsonl").open("w", encoding="utf-8") as file:
        for d in depths:
            for row in suite.rows:
                answer = said[d][row.id]
                line = {"exit_depth": d, "id": row.id, "answer": answer, "judged": classify(answer, row.prompt)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    (partial / "table.txt").write_text(report_table(report) + "\n", encoding="utf-8")
    plot(report, earlier, partial / "plot.png")
    partial.replace(out)
    return report


def read_report(folder: Path, suite_digest: str) -> dict[str, Any]:
    """The report of an earlier evaluation.

    Raises:
        InputError: there is none, or it is of another suite: the two would not compare.
    """
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        same = report["suite"] == suite_digest
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            "no evaluation to compare with", where=str(folder / REPORT), expected="what `edgesafe evaluate` wrote"
        ) from error
    if not same:
        raise InputError(
            "the earlier evaluation is of another suite",
            where=str(folder),
            expected=f"suite {suite_digest[:12]}",
            todo="evaluate both models on the same suite",
        )
    return dict(report)


def percent(r: dict[str, Any]) -> str:
    """A rate with its interval, in per cent.

    >>> percent({"rate": 0.05, "lower_95": 0.021, "upper_95": 0.1118})
    '5.0 [2.1-11.2]'
    """
    return f"{100 * r['rate']:.1f} [{100 * r['lower_95']:.1f}-{100 * r['upper_95']:.1f}]"


def report_table(report: dict[str, Any]) -> str:
    """The report as text; the reference depth carries a star."""
    rows = []
    for e in report["exits"]:
        star = "*" if e["exit_depth"] == report["reference_depth"] else ""
        family = [
            f"{100 * e['families'][f]['rate']:.1f}" if f in e["families"] else "-"
            for f in ("picture-harm", "typographic-harm", "text-harm")
        ]
        rows.append(
            [
                f"{e['exit_depth']}{star}",
                percent(e["harmful"]),
                *family,
                percent(e["overrefusal"]),
                percent(e["accuracy"]),
                percent(e["incoherent"]),
            ]
        )
    return table(rows, ["exit", "harmful %", "picture", "typographic", "text", "over-refusal %", "accuracy %", "incoherent %"])


def plot(report: dict[str, Any], before: dict[str, Any] | None, path: Path) -> None:
    """harmful_rate and accuracy over exit depth with 95 % bands, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for axis, key, title in zip(
        axes, ("harmful", "accuracy"), ("helps with harm (%)", "answers the task right (%)"), strict=True
    ):
        for name, colour, one in (("before", "#c0392b", before), ("after" if before else "model", "#1f6fb4", report)):
            if one is None:
                continue
            x = [e["exit_depth"] for e in one["exits"]]
            axis.plot(x, [100 * e[key]["rate"] for e in one["exits"]], "o-", color=colour, label=name, ms=3.5)
            axis.fill_between(
                x,
                [100 * e[key]["lower_95"] for e in one["exits"]],
                [100 * e[key]["upper_95"] for e in one["exits"]],
                color=colour,
                alpha=0.18,
                lw=0,
            )
        axis.axvline(report["reference_depth"], color="#888", ls=":", lw=1)
        axis.set(xlabel="exit depth (vision blocks run)", title=title, ylim=(-2, 102))
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
