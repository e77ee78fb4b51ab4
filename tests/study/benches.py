"""Tables of what the benches and the long runs measured, from the results that are kept as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgesafe.format.exits import Exit
from study.documents import markdown

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
FULLSIZE, ALIGNED, RUNGS = "fullsize-*.json", "align-*.json", "rungs-*.json"


def bench_tables(folder: Path = RESULTS) -> dict[str, str]:
    """The tables by name; one whose results are not there says so."""
    return {name: make(folder) if any(folder.glob(file)) else f"Not run: {file}" for name, (file, make) in _TABLES.items()}


def _read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def _when(run: Mapping[str, Any], threads: int) -> str:
    return f"{run['date'][:10]}, {run['machine']}, {threads} threads."


def engines_table(folder: Path) -> str:
    """Prefill and decode next to the peers; a ratio is the median over rounds of the peer's time over ours."""
    found = _read(folder, "speed.json")
    rows = []
    for name, row in found["engines"].items():
        ratios = row["times_as_fast_as_first"]  # ours / theirs
        shown = [f"{1 / ratios[key]:.2f}" for key in ("prefill_ms", "decode_ms", "prefill_cpu_ms", "decode_cpu_ms")]
        rows.append([name, f"{row['prefill_ms']:.0f}", f"{row['decode_ms']:.1f}", *shown])
    headers = ["engine", "prefill of 600 tokens, ms", "per token, ms", "prefill, edgesafe = 1", "per token, edgesafe = 1"]
    headers += ["prefill, processor time", "per token, processor time"]
    run = found["runs"]["engines"]
    peers = ", ".join(found["peers"])
    return f"{markdown(headers, rows)}\n\n{_when(run, run['threads'])} {peers}; {run['rounds']} rounds in turns."


def vision_table(folder: Path) -> str:
    """Blocks of CLIP-L/14-336: int8 against float32 and torch."""
    found = _read(folder, "speed.json")
    rows = [
        [name, f"{row['picture_ms']:.0f}", f"{row['times_as_fast_as_first']['picture_ms']:.2f}"]
        for name, row in found["vision"].items()
    ]
    run, agree = found["runs"]["vision"], found["vision_agreement"]
    table = markdown(["graph", f"{found['vision_blocks']} blocks, ms", "times as fast as fp32"], rows)
    return (
        f"{table}\n\n{_when(run, run['threads'])} Least cosine of any int8 state to its float32 one: {agree['least_cosine']}."
    )


def session_table(folder: Path) -> str:
    """What a session of the reference bundle costs beside its graphs' work."""
    found = _read(folder, "speed.json")
    talk, memory, start = found["conversation"], found["memory"], found["cold_start"]
    exits = list(found["by_exit"].items())
    rows = [
        ["second question about a picture, first token over the first one's", f"{talk['second_over_first']:.2f}", "0.40"],
        ["most memory, every exit asked, MiB", f"{memory['peak_mib']:.1f}", f"{memory['limit_mib']:.1f}"],
        ["of it numpy, onnxruntime, pillow and tokenizers", f"{memory['imports_mib']:.1f}", "-"],
        ["import edgesafe after numpy and onnxruntime, ms", f"{start['import_edgesafe_ms']:.1f}", "150"],
        ["the same with Session, ms", f"{start['with_session_ms']:.0f}", "150"],
        *([f"first token at exit {d}, ms", f"{row['ttft_ms']:.1f}", "-"] for d, row in (exits[0], exits[-1])),
    ]
    run = found["runs"]["session"]
    return f"{markdown(['of the reference bundle', 'measured', 'limit'], rows)}\n\n{_when(run, run['threads'])}"


def tower_schemes_table(folder: Path) -> str:
    """The vision tower's weight schemes by the reference model's answers."""
    found = _read(folder, "schemes.json")
    rows = [[name, f"{100 * share:.0f}"] for name, share in found["agreement"]["vision"].items()]
    table, run = markdown(["scheme of the tower", "same answers, %"], rows), found["run"]
    asked = f"{found['agreement']['rows']} rows at half and at the reference depth."
    return f"{table}\n\n{_when(run, run['threads'])} {asked}"


def quality_table(folder: Path) -> str:
    """Text schemes on SmolLM2's weights beside llama.cpp's: quality and bytes beside speed, Q4_K_M's speed = 1."""
    found = _read(folder, "quality.json")
    rows = [_quality_row(found, name) for name in found["rows"]]
    headers = ["scheme", "text side, MiB", "perplexity", "the same, dithered", "KL", "best token same, %", "answers equal"]
    headers += ["on subject", "prefill of 300, ms", "per token, ms", "prefill, Q4_K_M = 1", "per token, Q4_K_M = 1"]
    text, run = found["text"], found["speed_run"]
    refused = [name for name, row in found["rows"].items() if row.get("refused")]
    notes = f"{text['tokens']:,} tokens (text {text['digest']}), {text['requests']} requests; {run['rounds']} rounds in turns."
    notes += f" The export refuses {', '.join(refused)}, unless the damage is accepted." if refused else ""
    return f"{markdown(headers, rows)}\n\n{_when(run, run['threads'])} {', '.join(found['peers'])}. {notes}"


def _quality_row(found: Mapping[str, Any], name: str) -> list[str]:
    """A scheme's cells; perplexities as they lie above the float bundle's on the same weights."""
    row, fast = found["rows"][name], found["speed"].get(name)
    taken = row.get("taken", name)
    title = f"llama.cpp {name}" if row["engine"] == "llama.cpp" else name if taken == name else f"{name} (takes {taken})"
    cells = [f"**{title}**" if name == found["default"] else title, f"{row['mib']:.1f}"]
    cells += [f"{row['perplexity']:.2f} ({_above(found, 'rows', name)})", _above(found, "dithered", name)]
    cells += [f"{row['kl']:.3f}", f"{100 * row['top1']:.1f}"]
    cells += [f"{row['equal']} of {found['text']['requests']}" if "equal" in row else "-"]
    cells += [f"{row['on_subject']} of {len(row['answers'])}" if "answers" in row else "-"]
    if fast is None:
        return cells + ["-"] * 4
    cells += [f"{fast['prefill_ms']:.0f}", f"{fast['decode_ms']:.2f}"]
    return cells + [f"{fast['times_as_fast_as_first'][key]:.2f}" for key in ("prefill_ms", "decode_ms")]


def _above(found: Mapping[str, Any], kind: str, name: str) -> str:
    if name not in found.get(kind, {}):
        return "-"
    share = found[kind][name]["perplexity"] / found[kind]["fp32"]["perplexity"] - 1
    return f"{100 * share:+.1f} %" if share else "0"


def budget_table(folder: Path) -> str:
    """Deadlines kept and depths reached under load."""
    found = _read(folder, "budget.json")
    rows = []
    for name, trace in found["traces"].items():
        cells = [f"{100 * row['miss_rate']:.1f} / {100 * row['depth_of_oracle']:.0f}" for row in trace["policies"].values()]
        rows.append([name, str(trace["requests"]), *cells[:-1]])
    policies = list(next(iter(found["traces"].values()))["policies"])[:-1]
    headers = ["trace", "requests", *(f"{policy}: missed % / depth, % of the oracle's" for policy in policies)]
    return f"{markdown(headers, rows)}\n\n{_when(found, found['threads'])} Quantile {found['quantile']}."


def budget_rungs_table(folder: Path) -> str:
    """Deadlines kept and accuracy reached under load, where exits have fewer visual tokens."""
    found = _read(folder, "budget-rungs.json")
    shown = [name for name in next(iter(found["traces"].values()))["policies"] if name != "oracle"]
    rows = []
    for name, trace in found["traces"].items():
        rates = [trace["policies"][one] for one in shown]
        pairs = [f"{100 * rate['miss_rate']:.1f} / {100 * rate['accuracy_of_oracle']:.1f}" for rate in rates]
        rows.append([name, str(trace["requests"] - trace["too_short"]), str(trace["too_short"]), *pairs])
    headers = ["trace", "requests", "with too short a deadline"]
    headers += [f"{policy}: missed % / accuracy, % of the oracle's" for policy in shown]
    note = f"Quantile {found['quantile']}. Accuracy: {found['accuracy_from']}."
    return f"{markdown(headers, rows)}\n\n{_when(found, found['threads'])} {note}"


def fullsize_table(folder: Path) -> str:
    """Published shapes with random weights through the whole line, smallest first; what was planned stands in brackets."""
    found = sorted((_read(folder, path.name) for path in folder.glob(FULLSIZE)), key=lambda row: row["plan"]["weights"])
    rows = []
    for model in found:
        plan, asked = model["plan"], model["every_exit"]["rows"]
        reference = _exit(plan, "reference")
        half = min(asked, key=lambda row: abs(_exit(row).depth - reference.depth / 2))
        whole = next(row for row in asked if _exit(row) == reference)
        errors = [100 * (row["predicted_ms"] / row["ttft_ms"] - 1) for row in asked if "predicted_ms" in row]
        rows.append(
            [
                model["model"],
                f"{plan['weights'] / 1e6:.0f}",
                f"{model['export']['seconds']:.0f}",
                f"{model['export']['peak_gib']:.2f} ({plan['export_gib']:.2f})",
                f"{model['export']['bytes'] / 1e9:.3f} ({plan['bundle_bytes'] / 1e9:.3f})",
                f"{model['ask']['peak_gib']:.2f} ({plan['run_gib']:.2f})",
                f"{whole['ttft_ms'] / 1e3:.2f} at {reference}",
                f"{half['ttft_ms'] / 1e3:.2f} at {_exit(half)}",
                f"{max(errors, key=abs):+.0f}" if errors else "-",
                f"{whole['token_ms']:.0f}",
            ]
        )
    headers = ["shape", "weights, M", "export, s", "export's memory, GiB", "bundle, GB", "answering, GiB"]
    headers += ["first token, s, at the reference depth", "at half of it", "worst prediction after measure, %", "per token, ms"]
    run = [f"{model['model']} {model['date'][:10]}" for model in found]
    return f"{markdown(headers, rows)}\n\n{found[0]['machine']}; {', '.join(run)}."


def rungs_table(folder: Path) -> str:
    """Exits that see less of a picture: time to the first token, and what they cost in bytes and memory."""
    rows, notes = [], []
    for model in sorted((_read(folder, path.name) for path in folder.glob(RUNGS)), key=lambda found: found["bytes"]["with"]):
        for exit, one in reversed(model["exits"].items()):
            seconds = [f"{one[key] / 1e3:.2f}" for key in ("ttft_ms", "vision_ms", "prefill_ms")]
            rows.append([model["model"], exit, str(one["tiles"]), *seconds, f"{one['times_as_fast']:.1f}"])
        size, most = model["bytes"], model["peak_mib"]
        notes.append(
            f"{model['model']} on {model['picture']}, {model['date'][:10]}: bundle {size['with'] / size['without']:.5f} and "
            f"most memory {most['with'] / most['without']:.3f} times those without such exits ({most['with']:.0f} MiB), "
            f"{model['rounds']} rounds in turns, {model['clock']}, {model['machine']}."
        )
    headers = ["shape", "exit", "tiles", "first token, s", "vision, s", "prefill, s", "times as fast as the reference"]
    return "\n\n".join([markdown(headers, rows), "\n".join(notes)])


def heat_table(folder: Path) -> str:
    """Deadlines kept while a simulated machine grows hot, with and without what is learned."""
    found = _read(folder, "heat.json")
    rows = [
        [ramp, str(policies["edgesafe"]["requests"])]
        + [f"{100 * row['miss_rate']:.1f} / {100 * row['depth_of_oracle']:.0f}" for row in policies.values()]
        for ramp, policies in found["ramps"].items()
    ]
    policies = next(iter(found["ramps"].values()))
    headers = ["heat grows in", "requests", *(f"{name}: missed % / depth, % of the oracle's" for name in policies)]
    about = (
        f"{found['seconds'] / 60:.0f} simulated minutes, stages up to {found['hottest']} times as long, {found['date'][:10]}"
    )
    return f"{markdown(headers, rows)}\n\n{about}. Quantile {found['quantile']}."


def estimates_table(folder: Path) -> str:
    """What was predicted from this machine's rates beside what was taken."""
    found = _read(folder, "estimates.json")
    rows = []
    for model, shape in found["shapes"].items():
        for row in shape["exits"]:
            pairs = [(row["predicted"][part], row["taken"][part]) for part in _PARTS]
            cells = [f"{_figure(ours)} / {_figure(taken)} ({100 * (ours / taken - 1):+.0f} %)" for ours, taken in pairs]
            rows.append([model, row["exit"], *cells, str(len(row["wall_of_answer_ms"]))])
    headers = ["shape", "exit", *(f"{name}, ms" for name in _PARTS.values()), "questions"]
    days = ", ".join(f"{model} {shape['date'][:10]}" for model, shape in found["shapes"].items())
    kept = found["reference"]
    asked = (
        f"The reference model, after `edgesafe measure`: {kept['questions']} questions, first token from the second on off by "
        f"{100 * kept['median_error']:.1f} % (median), {100 * kept['worst_error']:+.1f} % at worst."
    )
    return f"{markdown(headers, rows)}\n\n{_when(found, found['threads'])} {days}; {found['clock']}.\n{asked}"


_PARTS = {"tower": "tower", "prefill": "prefill", "first": "first token", "token": "per token"}


def _figure(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _exit(row: Mapping[str, Any], key: str = "exit") -> Exit:
    """The exit that a result names; earlier results have its depth, a number."""
    return Exit.parse(row[key]) if key in row else Exit(row[f"{key}_depth"])


def long_table(folder: Path) -> str:
    """What the soak, load, fuzz and chaos runs counted; one that is not there is left out."""
    rows = [row for name, rows_of in _LONG.items() if (folder / name).is_file() for row in rows_of(_read(folder, name))]
    return markdown(["run", "cases", "outcome", "failures", "date"], rows)


def _soak_rows(run: Mapping[str, Any]) -> list[list[str]]:
    failures = len(run["wrong"]) + run["interleaved"]
    outcome = f"from {run['threads']} threads; memory {100 * run['growth']:+.1f} %"
    return [["`make soak`", f"{run['asks']} requests", outcome, str(failures), run["date"][:10]]]


def _load_rows(run: Mapping[str, Any]) -> list[list[str]]:
    late, budgets = run["tokens_after_close"], run["budgets"]
    within = f"{sum(late.get(count, 0) for count in '01')} of {sum(late.values())} closed streams ended within a token"
    first = f"first event {run['first_event_ms']['median']:.1f} ms after the first token"
    kept = f"{budgets['serve']['kept']} of {budgets['asked']} budgets kept, by `ask` {budgets['ask']['kept']}"
    requests = f"{sum(run['ways'].values())} HTTP requests, {run['connections']} connections"
    return [["`make load`", requests, f"{first}; {within}; {kept}", str(len(run["wrong"])), run["date"][:10]]]


def _fuzz_rows(run: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            f"`make fuzz`: {_FUZZED[kind]}",
            str(row["cases"]),
            f"{row['refused']} refused, {row['answered']} answered",
            str(len(row["failures"])),
            row.get("date", run["date"])[:10],
        ]
        for kind, row in run["kinds"].items()
    ]


def _chaos_rows(run: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            f"`make chaos`: `{name}`",
            f"{row['kills']} kills",
            f"{row['old']} left the old result, {row['new']} the new one",
            str(len(row["failures"])),
            run["date"][:10],
        ]
        for name, row in run["commands"].items()
    ]


_LONG: Mapping[str, Callable[[Mapping[str, Any]], list[list[str]]]] = {
    "soak.json": _soak_rows,
    "load.json": _load_rows,
    "fuzz.json": _fuzz_rows,
    "chaos.json": _chaos_rows,
}
_FUZZED = {
    "sealed": "a changed file",
    "resealed": "a changed file in a bundle sealed again",
    "forged": "the same with a forged certificate",
    "tiled": "tiled bundles, half of the certificates forged",
    "picture": "pictures",
    "prompt": "prompts",
    "request": "HTTP requests",
}


def memory_table(folder: Path) -> str:
    """What `edgesafe align` said that it needs and what it took, killed and resumed runs included."""
    rows = []
    for path in sorted(folder.glob(ALIGNED)):
        run = _read(folder, path.name)
        peak = max(one["peak_gib"] for one in run["runs"].values())
        seconds = sum(run["update_seconds"]) / len(run["update_seconds"])
        kept = "yes" if all(run["promises"].values()) else "no"
        rows.append([run["model"], run["method"], f"{run['estimated_gib']:.2f}", f"{peak:.2f}", f"{seconds:.0f}", kept])
    headers = ["shape", "method", "estimated, GiB", "peak, GiB", "seconds per update", "resumed run ends with the same weights"]
    found = _read(folder, next(iter(sorted(folder.glob(ALIGNED)))).name)
    return f"{markdown(headers, rows)}\n\n{found['date'][:10]}, {found['machine']}, three updates of six rows."


def opened_table(folder: Path) -> str:
    """What an exit's map, trained to begin answers to harmful requests, does to an aligned model."""
    found = _read(folder, "open-map.json")
    rows = [
        [exit, _OPENED[way], *(f"{100 * own[key]['rate']:.1f}" for key in ("harmful", "overrefusal", "accuracy"))]
        + [" / ".join(str(count) for count in own["kinds"].values())]
        for exit, ways in found["exits"].items()
        for way, own in ways.items()
    ]
    headers = ["exit", "its map", "harm %", "over-refusal %", "accuracy %", "harmful answers: named / mistaken / other"]
    asked = next(iter(next(iter(found["exits"].values())).values()))["harmful"]["n"]
    note = f"{found['updates']} updates of one map; {asked} harmful requests of the {found['split']} split."
    return f"{markdown(headers, rows)}\n\n{found['date'][:10]}, {found['machine']}. {note}"


_OPENED = {"as it is": "as it ships", "whole": "trained", "bias": "its bias alone trained"}


def map_cost_table(folder: Path) -> str:
    """Bytes and time of exit maps at LLaVA-1.5-7B's size."""
    found = _read(folder, "map-cost.json")
    size, folded, first, ms = found["bytes"], found["folded"], found["first_token"], found["ms"]
    rows = [
        [f"bundle with all {size['maps']} maps, without them = 1", f"{size['ratio']:.4f}", "1.01"],
        ["first token at the exit that has the shortest, without a map = 1", f"{first['ratio']:.4f}", "1.02"],
        ["a map, MB", f"{size['map'] / 1e6:.2f}", "-"],
        [f"a map / {found['tower']['segment_blocks']} blocks of the tower / head, ms", _three(ms), "-"],
        ["bundle with maps folded into a head for each exit, without them = 1", f"{folded['ratio']:.4f}", "-"],
    ]
    busy = f"The machine's load was {found['load_average'][0]:.0f}; first tokens without maps are of an idle one."
    return f"{markdown(['of LLaVA-1.5-7B, random weights', 'found', 'limit'], rows)}\n\n{_when(found, found['threads'])} {busy}"


def flips_table(folder: Path) -> str:
    """What other precisions of one model do to its refusals, row by row against the file as it was published."""
    found = _read(folder, "endpoint-flips.json")
    rows = []
    for name, runs in found["variants"].items():
        (own, first), *others = [(kind, run) for kind, run in runs.items() if kind != "system"]
        rows.append([name, own, *(_share(first[rate]) for rate in ("harmful", "overrefusal")), "-", "-", "-"])
        for kind, run in others:
            against = run["against own"]
            harm = against["classes"]["harmful"]
            shares = [_share(run[rate]) for rate in ("harmful", "overrefusal")]
            more = f"{100 * harm['difference']:+.1f} [{100 * harm['lower_95']:+.1f}, {100 * harm['upper_95']:+.1f}]"
            turned = f"{harm['c']} / {harm['b']}, {harm['p']:.3f}"
            rows.append([name, kind, *shares, more, turned, str(against["identical"])])
    headers = ["asked", "precision", "harmful helped, %", "harmless refused, %", "harmful, points more [95 %]"]
    headers += ["newly helped / no more, p", "same answers"]
    return f"{markdown(headers, rows)}\n\n{found['date'][:10]}, {found['machine']}. p: McNemar's exact test."


def _share(rate: Mapping[str, Any]) -> str:
    return f"{100 * rate['rate']:.1f} ({rate['k']} of {rate['n']})"


def _three(ms: Mapping[str, float]) -> str:
    return " / ".join(f"{ms[name]:.1f}" for name in ("map", "segment", "head"))


_TABLES: Mapping[str, tuple[str, Callable[[Path], str]]] = {
    "engines": ("speed.json", engines_table),
    "vision-speed": ("speed.json", vision_table),
    "session": ("speed.json", session_table),
    "tower-schemes": ("schemes.json", tower_schemes_table),
    "quality": ("quality.json", quality_table),
    "budget": ("budget.json", budget_table),
    "budget-rungs": ("budget-rungs.json", budget_rungs_table),
    "heat": ("heat.json", heat_table),
    "fullsize": (FULLSIZE, fullsize_table),
    "rungs": (RUNGS, rungs_table),
    "estimates": ("estimates.json", estimates_table),
    "long-runs": ("soak.json", long_table),
    "align-memory": (ALIGNED, memory_table),
    "map-opened": ("open-map.json", opened_table),
    "map-cost": ("map-cost.json", map_cost_table),
    "endpoint-flips": ("endpoint-flips.json", flips_table),
}
