"""What an export will do, before anything is loaded: config.json and safetensors headers are read, and the device's profile.

Bytes are counted from the shapes; times come from the profile's figures, as the runtime's own estimates do.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgesafe import machine
from edgesafe.checkpoint.chat import prompt_ids
from edgesafe.checkpoint.geometry import check_exits
from edgesafe.device import DeviceProfile
from edgesafe.errors import InputError
from edgesafe.format import graph_io
from edgesafe.format.exits import MOST_RUNGS, Exit, default_ladder, parse_exits
from edgesafe.format.specs import GraphSpec
from edgesafe.format.targets import free_bytes, work_folder
from edgesafe.format.tiles import ALONE, PICTURE, at_most, cut_of, prompt_runs
from edgesafe.progress import table
from edgesafe.runtime.forecast import Work, decoder_work, vision_work, work_ms
from edgesafe_export.estimate import (
    GIB,
    calibration_bytes,
    calibration_seconds,
    exit_graphs,
    export_bytes,
    graph_specs,
    matrix_bytes,
    run_bytes,
    state_bytes,
    text_bytes,
)
from edgesafe_export.family import text_spec
from edgesafe_export.quantize import AUTO
from edgesafe_export.skeleton import Sketch
from edgesafe_export.stream import scheme_of
from edgesafe_export.tolerances import WHOLE_WEIGHTS

# What `parity.check` in the manifest says: that transformers' whole model was the judge, or torch piece by piece.
WHOLE_MODEL, PIECES = "whole model", "pieces"
# A graph beside its weights: nodes, names and shapes. Seen: 3 to 8 kB a vision segment, 14 kB a decoder layer.
_GRAPH_BYTES, _LAYER_BYTES = 8_000, 14_000
_QUESTION = "What is this?"
_FELT_HOURS = 0.1  # of calibration, from which on it is said
# How far off times are taken to be that are reckoned from a machine's measured figures.
_SURE = 1.3
# Shapes of published models that are smaller, to name what a device can do: weights of the encoder, its positions and the
# operations of attention's products (12 blocks of 768), weights of the decoder without and of its head, and tokens of a prompt
# with one picture.
_SIGLIP = (93e6, 1024, 12 * 4 * 1024**2 * 768)
SMALLER = {
    "SmolVLM-500M, one tile": (*_SIGLIP, 363e6, 47e6, 96),
    "SmolVLM-256M, one tile": (*_SIGLIP, 135e6, 28e6, 96),
}


@dataclass(frozen=True)
class ExitPlan:
    """One exit: its graphs' bytes with the text's, and the first token at the earliest (None: not known).

    Looking up the prompt's embeddings counts as no time.
    """

    exit: Exit
    bytes: int
    ttft_ms: float | None


@dataclass(frozen=True)
class Plan:
    """What will happen.

    Attributes:
        tiles, prompt_tokens: how often the tower runs, and the tokens of a short question, for a picture of `PICTURE` at the
            reference.
        check: what the exporter will compare with, `WHOLE_MODEL` or `PIECES`.
        bundle_bytes: of the whole bundle, a suite left out.
        export_gib, disk_gib: most memory of the exporting process, and room on the disk while it runs.
        run_gib: memory of a process that answers on the device.
        token_ms: a token of the answer after the first (None: not known).
        measured_on: the machine that the times were reckoned from (`edgesafe devices measure`); without it they are floors.
        fits: whether some exit's first token may come within the device's budget; None where that is not known.
        notes: what the reader should know, in sentences.
    """

    model: str
    device: str
    weights: int
    n_blocks: int
    reference: Exit
    quantization: dict[str, str]
    check: str
    tiles: int
    prompt_tokens: int
    exits: tuple[ExitPlan, ...]
    bundle_bytes: int
    export_gib: float
    disk_gib: float
    run_gib: float
    token_ms: float | None
    measured_on: str | None
    budget_ms: float
    fits: bool | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        exits = [{**asdict(plan), "exit": str(plan.exit)} for plan in self.exits]
        return {**asdict(self), "reference": str(self.reference), "exits": exits}


def choose_ladder(sketch: Sketch, exits: str | None, most: int | None = MOST_RUNGS) -> tuple[Exit, ...]:
    """The exits to export, of which at most so many have fewer tokens or tiles; the reference is always one of them."""
    geometry = sketch.family.geometry
    if exits is None:
        return default_ladder(geometry.n_blocks, geometry.reference_depth)
    ladder = tuple(sorted({*parse_exits(exits, geometry.n_blocks, most), geometry.reference}))
    check_exits(ladder, sketch.family.recipe, geometry, sketch.family.tiles)
    return ladder


def make_plan(
    sketch: Sketch,
    folder: Path,
    name: str,
    device: DeviceProfile,
    ladder: tuple[Exit, ...],
    layout: str,
    schemes: Mapping[str, str],
) -> Plan:
    """The plan of an export.

    Args:
        sketch: the checkpoint without its weights.
        folder: where it lies.
        name: what it is called.
        device: gives the figures that times are estimated with.
        ladder: the exits that will be exported.
        layout: as it will be exported.
        schemes: as they will be exported; text "auto" is planned as its first choice, with disk for all that it may try.
    """
    tries = AUTO[:-1] if schemes["text"] == "auto" else (schemes["text"],)  # float32 is for models that nothing else suits
    vision, text = schemes["vision"], tries[0]
    specs = graph_specs(sketch, ladder, layout, vision, text)
    seen, whole = {exit: _prompt(sketch, exit) for exit in ladder}, sketch.count <= WHOLE_WEIGHTS
    tiles, tokens = seen[sketch.family.geometry.reference]
    once = {path: work_ms(vision_work(path, spec), device, scheme_of(path, vision, text)) for path, spec in specs.items()}
    sizes = {scheme: text_bytes(sketch, graph_specs(sketch, ladder, layout, vision, scheme), scheme) for scheme in tries}
    texts = sizes[text]
    decoder, about = specs[graph_io.DECODER_PATH], text_spec(sketch.family, sketch.layers)
    prefill = {exit: work_ms(decoder_work(decoder, about, length), device, text) for exit, (_, length) in seen.items()}
    times = {exit: (seen[exit][0], ms) for exit, ms in prefill.items()}
    exits = _exits(exit_graphs(sketch.family, ladder, layout), specs, once, times, texts)
    graph_bytes = exits[-1].bytes + _GRAPH_BYTES * len(specs) + _LAYER_BYTES * sketch.layers
    bundle = graph_bytes + (folder / "tokenizer.json").stat().st_size
    known = [e.ttft_ms for e in exits if e.ttft_ms is not None]
    running = run_bytes(sketch, specs, text, tiles, tokens)
    beside = 8 * sketch.count if whole else state_bytes(sketch, tiles, tokens)
    beside += calibration_bytes(sketch, text)[1] + sum(sizes.values()) - texts  # an attempt's pieces stay until the end
    plan = Plan(
        model=name,
        device=device.name,
        weights=sketch.count,
        n_blocks=sketch.family.geometry.n_blocks,
        reference=sketch.family.geometry.reference,
        quantization={"vision": vision, "text": text},
        check=WHOLE_MODEL if whole else PIECES,
        tiles=tiles,
        prompt_tokens=tokens,
        exits=exits,
        bundle_bytes=bundle,
        export_gib=round(export_bytes(sketch, whole, running, text) / GIB, 2),
        disk_gib=round((2 * bundle + beside) / GIB, 2),
        run_gib=round(running / GIB, 2),
        token_ms=_sum([work_ms(decoder_work(decoder, about, 1, tokens), device, text)]),
        measured_on=device.measured_on,
        budget_ms=device.ttft_budget_ms,
        fits=min(known) <= device.ttft_budget_ms if len(known) == len(exits) else None,
        notes=(),
    )
    return replace(plan, notes=(*_notes(plan, device), *_auto_notes(sizes), *_calibration_notes(sketch, tries)))


def _exits(
    chains: Mapping[Exit, tuple[str, ...]],
    specs: Mapping[str, GraphSpec],
    once: Mapping[str, float | None],
    times: Mapping[Exit, tuple[int, float | None]],
    texts: int,
) -> tuple[ExitPlan, ...]:
    """Every exit of its graphs, `texts` being the bytes of both text graphs.

    `once` is how long a graph takes for a tile, and `times` says by exit for how many tiles it runs, and the prefill's time.
    """
    return tuple(
        ExitPlan(
            exit=exit,
            bytes=texts + sum(specs[path].weight_bytes for path in chain),
            ttft_ms=_sum([*(once[path] for path in chain for _ in range(times[exit][0])), times[exit][1]]),
        )
        for exit, chain in chains.items()
    )


def _spared(sketch: Sketch, exit: Exit) -> int:
    """Image tokens that an exit's prompt lacks."""
    return 0 if exit.visual_tokens is None else sketch.family.geometry.image_tokens - exit.visual_tokens


def _sum(times: Iterable[float | None]) -> float | None:
    known = list(times)
    return None if None in known else round(sum(t for t in known if t is not None), 1)


def _prompt(sketch: Sketch, exit: Exit) -> tuple[int, int]:
    """How often the tower runs at an exit for a picture of `PICTURE`, and how many tokens a short question about it has."""
    family, side = sketch.family, sketch.family.geometry.image_size
    tiles = family.tiles if family.tiles is None or exit.tiles is None else at_most(family.tiles, side, exit.tiles)
    cut = cut_of(tiles, side, PICTURE) if tiles else ALONE
    text, features = prompt_runs(tiles, cut, family.processor.image_token, family.geometry.image_tokens)
    words = prompt_ids(family.processor, family.chat, _QUESTION, text)
    return cut.tiles, len(words) - len(features) + sum(features) - _spared(sketch, exit)


def _notes(plan: Plan, device: DeviceProfile) -> Iterable[str]:
    """What the reader should know."""
    budget = f"the budget of {device.ttft_budget_ms / 1e3:g} s"
    if plan.fits is None:
        yield f"no time can be predicted: the profile of {device.title} lacks a figure"
    elif not plan.fits:
        best = min(e.ttft_ms for e in plan.exits if e.ttft_ms is not None)
        least = "about" if plan.measured_on else "at least"
        yield (
            f"not interactive on {device.title}: the first token takes {least} {best / 1e3:.1f} s at any exit, beyond {budget}"
            f" ({plan.prompt_tokens} tokens of prompt through the decoder)"
        )
        fitting = [f"{n} ({ms / 1e3:.1f} s)" for n, ms in _smaller(device) if ms <= device.ttft_budget_ms]
        yield f"what fits {budget}: " + (", ".join(fitting) if fitting else "none of the smaller models known here")
    if device.memory_mib and plan.run_gib * 1024 > device.memory_mib:
        yield f"needs {plan.run_gib:.1f} GiB to answer, more than the {device.memory_mib / 1024:.1f} GiB of {device.title}"


def _auto_notes(sizes: Mapping[str, int]) -> Iterable[str]:
    """What auto may take in place of its first choice, `sizes` being the bytes of the text in each scheme, in its order."""
    first, *others = sizes
    if others:
        last = others[-1]
        more = (sizes[last] - sizes[first]) / 1e9
        yield f"the text is planned as {first}; where that changes the model, auto takes up to {last}: {more:.2g} GB more"


def _calibration_notes(sketch: Sketch, schemes: Iterable[str]) -> Iterable[str]:
    """How long calibration takes where it is felt."""
    hours = sum(calibration_seconds(sketch, scheme) for scheme in schemes) / 3600
    if hours > _FELT_HOURS:
        yield f"calibrating the text takes up to about {hours:.2g} hours of one core; int8-block32 takes none"


def _smaller(device: DeviceProfile) -> Iterable[tuple[str, float]]:
    """Smaller models and the time to their first token by the same arithmetic, in the schemes that are tried first."""
    for name, (encoder, positions, attention, layers, head, tokens) in SMALLER.items():
        tower = Work(2 * encoder * positions, attention, encoder)
        text = Work(2 * (layers * tokens + head), 0, (layers + head) * matrix_bytes(1024, 1, AUTO[0]) / 1024)
        total = _sum([work_ms(tower, device, "int8-dynamic"), work_ms(text, device, AUTO[0])])
        if total is not None:
            yield name, total


def check_room(plan: Plan, out: Path) -> None:
    """Refuse an export that this machine has no disk or memory for.

    Raises:
        InputError: too little of either; it names what is needed and what is free.
    """
    work = work_folder(Path(os.path.realpath(out)))
    held = sum(path.stat().st_size for path in work.rglob("*") if path.is_file()) / GIB  # what a stopped export left
    free = free_bytes(work) / GIB
    if plan.disk_gib - held > free:
        raise InputError(
            f"the export needs {plan.disk_gib - held:.1f} GiB on the disk, {free:.1f} GiB are free",
            where=str(work),
            expected="room for the pieces and the bundle",
            todo="make room, or name an --out on another disk",
        )
    memory = machine.free_mib()
    if memory is not None and plan.export_gib * 1024 > memory:
        raise InputError(
            f"the export needs about {plan.export_gib:.1f} GiB of memory, {memory / 1024:.1f} GiB are free",
            where=plan.model,
            expected="memory for its largest piece and for the finished bundle's answers",
            todo="end other programs, or export on a machine with more memory",
        )


def describe(plan: Plan) -> str:
    """The plan as text."""
    rows = []
    for e in plan.exits:
        # A floor can rule an exit out, and promises nothing; what was reckoned from measured figures can.
        low, high = (1 / _SURE, _SURE) if plan.measured_on else (1.0, math.inf)
        within = "?" if e.ttft_ms is None else "perhaps"
        within = "no" if e.ttft_ms and low * e.ttft_ms > plan.budget_ms else within
        within = "yes" if e.ttft_ms and high * e.ttft_ms <= plan.budget_ms else within
        seconds = "-" if e.ttft_ms is None else f"{e.ttft_ms / 1e3:.3g}"
        rows.append([f"{e.exit}{'*' if e.exit == plan.reference else ''}", f"{e.bytes / 1e6:.1f}", seconds, within])
    lines = [
        table(
            rows,
            [
                "exit",
                "MB",
                f"first token s, {'about' if plan.measured_on else 'at least'}",
                f"within {plan.budget_ms / 1e3:g} s",
            ],
        ),
        "",
        f"{plan.model} for {plan.device}: {plan.weights / 1e6:.1f} million weights, {plan.quantization['vision']} vision, "
        f"{plan.quantization['text']} text, a picture of {PICTURE[1]} x {PICTURE[0]} in {plan.tiles} and a prompt of "
        f"{plan.prompt_tokens} tokens",
        f"bundle {plan.bundle_bytes / 1e6:.1f} MB; export needs {plan.export_gib:.1f} GiB of memory and {plan.disk_gib:.1f} "
        f"GiB of disk; answering needs {plan.run_gib:.1f} GiB; checked: {plan.check}",
        *([] if plan.measured_on is None else [f"times are reckoned from figures measured on {plan.measured_on}"]),
        *plan.notes,
    ]
    return "\n".join(lines)
