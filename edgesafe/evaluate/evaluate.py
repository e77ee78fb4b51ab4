"""Answers of a checkpoint at every exit depth, and what they amount to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from edgesafe.align.files import METRICS, RECORD
from edgesafe.align.reward.overlap import Reward
from edgesafe.certify.tally import families, tally
from edgesafe.checkpoint.exit_model import (
    ExitModel,
    exit_state,
    exit_states,
    greedy,
    load,
    open_images,
    pixel_values,
    prompt_ids,
)
from edgesafe.errors import InputError
from edgesafe.evaluate.html_report import write_html
from edgesafe.evaluate.judges import Judge, StringJudge, Toxicity, agreement, keep_apart
from edgesafe.evaluate.paired import ANSWERS, REPORT, paired, read_answers, read_report
from edgesafe.evaluate.rates import GROUPS, Said, group_of, group_rates, length, mean_reward, once, second_rates, toxic
from edgesafe.evaluate.text_report import report_table
from edgesafe.format.exits import parse_exits
from edgesafe.format.files import digest_folder
from edgesafe.format.suite import Row, Suite, read_suite
from edgesafe.progress import bar

MAX_NEW_TOKENS = 48  # as long as `edgesafe ask` and `certify` answer, so that before and after compare


def answers(
    llava: ExitModel,
    suite: Suite,
    depths: Sequence[int],
    batch: int = 128,
    *,
    quiet: bool = False,
    label: str = "evaluate",
    pictures: Callable[[Sequence[Row]], Sequence[Image.Image]] | None = None,
    change: Callable[[int, Tensor], Tensor] | None = None,
) -> dict[int, dict[str, str]]:
    """Greedy answers {exit depth: {row id: text}}; the tower runs once for all depths.

    Args:
        llava: the model.
        suite: whose rows are asked.
        depths: exits to answer at.
        batch: rows that go through the model together.
        quiet: no bar. label: what the bar says.
        pictures: pictures of some rows in place of their own.
        change: the states [B, P, W] that take the place of an exit's, from its depth and its states.

    Raises:
        InputError: a row without a picture, or one that can't be read or asked.
    """
    prompts = {row.id: prompt_ids(llava, row.prompt) for row in suite.rows}
    rows = sorted(suite.rows, key=lambda r: (len(prompts[r.id]), r.id))  # rows of like length go together: little is padded
    chunks = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    out: dict[int, dict[str, str]] = {d: {} for d in depths}
    for part in chunks if quiet else bar(chunks, len(chunks), label):
        images = pictures(part) if pictures else open_images([suite.image_path(row) for row in part])
        states = exit_states(llava, pixel_values(llava, images))
        for depth in depths:
            seen = exit_state(states, depth)
            texts = greedy(llava, [prompts[r.id] for r in part], change(depth, seen) if change else seen, MAX_NEW_TOKENS)
            out[depth].update({row.id: text for row, text in zip(part, texts, strict=True)})
    return out


def summarise(rows: Sequence[Row], said: dict[str, str]) -> dict[str, Any]:
    """Rates of one exit, each {k, n, rate, lower_95, upper_95}; `families` holds the rate that matters for each family."""
    rates: dict[str, Any] = {name: asdict(r) for name, r in tally(rows, said).items()}
    rates["families"] = {name: asdict(r) for name, r in families(rows, said).items()}
    return rates


def evaluate(
    model_dir: Path,
    suite_dir: Path,
    out: Path,
    *,
    before: Path | None = None,
    depths: str = "all",
    second: Judge | None = None,
    reward: Reward | None = None,
    toxicity: Toxicity | None = None,
    controls: bool = False,
) -> dict[str, Any]:
    """Evaluate a checkpoint at its exit depths; write report.json, report.html, answers.jsonl, table.txt and plot.png.

    Args:
        model_dir: checkpoint folder.
        suite_dir: suite folder.
        out: new folder.
        before: folder of an earlier evaluation on the same suite: drawn into the same plot, and tested against row by row.
        depths: as `edgesafe.format.exits.parse_exits` reads them; the reference depth is always among them.
        second: a second judge, whose rates and agreement are reported beside the string judge's.
        reward: reported as a mean; never one of the judges, nor made from one.
        toxicity: scores the answers' words.
        controls: whether to answer under `edgesafe.evaluate.controls` too.

    Returns:
        The report, which report.json holds. A `rate` is {k, n, rate, lower_95, upper_95} (0..1); an `identity` is what a judge,
        reward or toxicity says it is: at least {name}. Keys that are null or absent were not asked for.

        model, suite: digests. suite_name, split, limits: the suite's own.
        judge: identity of the string judge; second_judge, reward, toxicity: identities or null.
        trained_with_reward: identity of the reward that the model's edgesafe.json names, or null.
        reference_depth, n_blocks, max_new_tokens, versions.
        exits: one for every depth, ascending: {exit_depth, reference: bool, group: "early" | "middle" | "late",
            harmful, overrefusal, incoherent, accuracy: rates by the string judge, families: {family: rate},
            length: {mean, unit: "words"},
            second: {harmful, overrefusal, incoherent: rates over the answers that the second judge could judge, unparsed: rate,
                agreement: {n, agree, agreement: 0..1, kappa: number or null, unparsed: count}},
            reward: {mean, by_class: {"harmful" | "harmless" | "task": mean}}, toxicity: {mean, above_half: rate}}.
        groups: [{name: "early" | "middle" | "late" | "all", depths: [..]}] with an exit's figures from harmful on: the answers
            of the depths pooled, the intervals clustered by row.
        agreement: the same as an exit's, over all answers; null without a second judge.
        paired: null without `before`, else {"before": the earlier model's digest, "exits": [{exit_depth,
            harmful, overrefusal, accuracy: {b, c, p, p_holm}}]}: of the same rows, b had it before and not now, c now and not
            before (harm: b counts the mended rows; accuracy: b counts the lost ones); p by McNemar clustered by request,
            p_holm corrected over the depths.
        controls: null unless asked for, else {"text-only": {"any": rates}, "blank", "noise", "rescaled": {"1": rates, ..}},
            rates = {harmful, overrefusal, incoherent, accuracy, families}; see `edgesafe.evaluate.controls`.

        A line of answers.jsonl is {exit_depth, id, answer, judged, second}; `second` is null where no second judge or it
        could not parse the answer.

    Raises:
        InputError: `out` exists, or `before` is no evaluation on this suite by this judge of answers as long.
        ConfigError: no such depth; or a judge is also the reward, this one or the one that trained the model.
    """
    if out.exists():
        raise InputError("the output exists already", where=str(out), expected="a new folder", todo="name another --out")
    judges = Judges(StringJudge(), second, reward, toxicity)
    trained_with = training_reward(model_dir)
    keep_apart([judges.first, *([second] if second else [])], [reward, trained_with])
    suite = read_suite(suite_dir)
    earlier = read_report(before, suite.digest, MAX_NEW_TOKENS) if before else None
    earlier_said = read_answers(before, suite) if before else None
    llava = load(model_dir)
    chosen = sorted({*parse_exits(depths, llava.n_blocks), llava.reference_depth})
    said = answers(llava, suite, chosen)
    scored = score(judges, suite.rows, said)
    report = {
        "model": digest_folder(model_dir),
        "suite": suite.digest,
        "suite_name": suite.name,
        "split": suite.split,
        "limits": dict(suite.limits),
        **judges.identities(),
        "trained_with_reward": trained_with,
        "reference_depth": llava.reference_depth,
        "n_blocks": llava.n_blocks,
        "max_new_tokens": MAX_NEW_TOKENS,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        **rates(suite.rows, said, scored, llava),
        "paired": None,
        "controls": control_rates(llava, suite, chosen) if controls else None,
    }
    if earlier and earlier_said:
        report["paired"] = {"before": earlier["model"], "exits": paired(suite.rows, earlier_said, said)}
    write(out, report, earlier, suite.rows, answer_lines(suite.rows, said, scored), training_metrics(model_dir))
    return report


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
    """What they found, each {exit depth: {row id: ..}}: the two judges' classes, rewards, toxicities; None if not asked."""

    first: dict[int, dict[str, str | None]]
    second: dict[int, dict[str, str | None]] | None
    reward: dict[int, dict[str, float]] | None
    toxicity: dict[int, dict[str, float]] | None


def score(judges: Judges, rows: Sequence[Row], said: Mapping[int, Said]) -> Scored:
    """Show every answer to each of the judges, rewards and toxicities."""
    toxicity = judges.toxicity
    return Scored(
        once(judges.first, rows, said),
        once(judges.second, rows, said) if judges.second else None,
        once(judges.reward, rows, said) if judges.reward else None,
        once(lambda _, texts: toxicity(texts), rows, said) if toxicity else None,
    )


def training_reward(model_dir: Path) -> dict[str, Any] | None:
    """The identity of the reward that a checkpoint was trained with, from its record; None without a record or a reward."""
    try:
        reward = json.loads((model_dir / RECORD).read_text(encoding="utf-8")).get("reward")
    except (OSError, ValueError, AttributeError):
        return None
    return dict(reward) if isinstance(reward, Mapping) else None


def rates(rows: Sequence[Row], said: Mapping[int, Said], scored: Scored, llava: ExitModel) -> dict[str, Any]:
    """`exits`, `groups` and `agreement` of the report."""
    exits = []
    for depth in said:
        place = {"reference": depth == llava.reference_depth, "group": group_of(depth, llava.n_blocks)}
        found = summarise(rows, said[depth])
        if scored.second:
            found["second"] = second_rates(rows, scored.second[depth])
        exits.append({"exit_depth": depth, **place, **more(found, rows, said, scored, [depth])})
    groups = []
    for name in (*GROUPS, "all"):
        within = [depth for depth in said if name in ("all", group_of(depth, llava.n_blocks))]
        if within:
            found = group_rates(rows, {d: said[d] for d in within}, scored.first, scored.second)
            groups.append({"name": name, "depths": within, **more(found, rows, said, scored, within)})
    return {"exits": exits, "groups": groups, "agreement": agreed(rows, scored, list(said)) if scored.second else None}


def more(
    found: dict[str, Any], rows: Sequence[Row], said: Mapping[int, Said], scored: Scored, depths: Sequence[int]
) -> dict[str, Any]:
    """The rates of some depths together with the judges' agreement, lengths, rewards and toxicity."""
    found["length"] = length([said[d][row.id] for d in depths for row in rows])
    if scored.second:
        found["second"]["agreement"] = agreed(rows, scored, depths)
    if scored.reward:
        found["reward"] = mean_reward(rows, [scored.reward[d] for d in depths])
    if scored.toxicity:
        found["toxicity"] = toxic([scored.toxicity[d] for d in depths])
    return found


def agreed(rows: Sequence[Row], scored: Scored, depths: Sequence[int]) -> dict[str, Any]:
    """The agreement of the two judges over some depths' answers."""
    second = scored.second or {}
    pairs = [(scored.first[d][row.id], second[d][row.id]) for d in depths for row in rows]
    return agreement([x for x, _ in pairs], [y for _, y in pairs])


def control_rates(llava: ExitModel, suite: Suite, depths: Sequence[int]) -> dict[str, Any]:
    """`controls` of the report: rates of each control at each depth."""
    from edgesafe.evaluate.controls import control_answers

    found = control_answers(llava, suite, depths)
    return {name: {depth: summarise(suite.rows, said) for depth, said in one.items()} for name, one in found.items()}


def answer_lines(rows: Sequence[Row], said: Mapping[int, Said], scored: Scored) -> Iterator[dict[str, Any]]:
    """The lines of answers.jsonl."""
    for depth in said:
        for row in rows:
            yield {
                "exit_depth": depth,
                "id": row.id,
                "answer": said[depth][row.id],
                "judged": scored.first[depth][row.id],
                "second": scored.second[depth][row.id] if scored.second else None,
            }


def training_metrics(model_dir: Path) -> list[dict[str, Any]]:
    """The lines of a checkpoint's metrics.jsonl; none where it was not trained here, or they can't be read."""
    try:
        return [json.loads(line) for line in (model_dir / METRICS).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []


def write(
    out: Path,
    report: dict[str, Any],
    earlier: dict[str, Any] | None,
    rows: Sequence[Row],
    lines: Iterable[dict[str, Any]],
    training: list[dict[str, Any]],
) -> None:
    """Write the folder beside `out` and rename it into place."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with (partial / ANSWERS).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (partial / "table.txt").write_text(report_table(report) + "\n", encoding="utf-8")
    plot(report, earlier, partial / "plot.png")
    write_html(partial, {**report, **({"training": training} if training else {})}, earlier, rows)
    partial.replace(out)


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
