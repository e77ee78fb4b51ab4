"""`edgesafe ship --plan`: every step's time on this machine, its memory and its disk, from headers and row counts.

Times are floors: matrix products at the rate of one product of the decoder's shape, plain operations at the rate of a sum of
large arrays. What is not in them is said by `NOT_COUNTED`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesafe import machine
from edgesafe.certify.ask import sessions_at_once
from edgesafe.errors import InputError
from edgesafe.format.exits import MOST_RUNGS, parse_exits
from edgesafe.format.suite import MAX_NEW_TOKENS
from edgesafe.format.targets import free_bytes
from edgesafe.maps import PICTURES
from edgesafe.progress import clock, table
from edgesafe.ship_plan.costs import FLOAT, Costs, Rates, Text, certify_seconds, count, measure_rates, update_seconds
from edgesafe.ship_plan.rows import Planned, drawn_rows, public_rows, rows_of
from edgesafe.steps import REFERENCE, settings_for

if TYPE_CHECKING:
    from edgesafe.align.settings import AlignConfig
    from edgesafe.align.sizes import Shapes, Sizes
    from edgesafe.checkpoint.shards import Reader
    from edgesafe.device import DeviceProfile
    from edgesafe_export.plan import Plan
    from edgesafe_export.skeleton import Sketch

MIB = 2**20
NOT_COUNTED = "fetching, a GPU, and what else runs here; a step that --work has already is not made again"
# Seen: a drawn row's picture takes 12 KiB of disk and 2 ms on two cores; of the exporting steps on two cores what does not
# come from calibration was 45 s and 60 s for each billion weights (RESULTS, "Published shapes").
_PICTURE_MIB, _PICTURE_S, _EXPORT_S, _EXPORT_A_WEIGHT = 12 / 1024, 0.002, 45.0, 60e-9
COUNTED = ("l-sft", "self-distill")  # methods whose updates are counted
_EVALUATED = 128  # rows that evaluation puts through a model together, if their tokens fit


@dataclass(frozen=True)
class Step:
    """One step: what it does in words, seconds (None: not counted), most memory of its process and what it leaves, MiB."""

    name: str
    what: str
    seconds: float | None
    memory_mib: float
    disk_mib: float


@dataclass(frozen=True)
class ShipPlan:
    """All steps, what this machine does and has free, and what lacks.

    gflops, gbytes: a second, as measured. free_memory_mib: None where the system does not tell. short: sentences on what
        there is too little of; empty where all of it will do.
    """

    model: str
    device: str
    machine: str
    gflops: float
    gbytes: float
    steps: tuple[Step, ...]
    free_memory_mib: float | None
    free_disk_mib: float
    short: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """All steps that are counted."""
        return sum(one.seconds or 0.0 for one in self.steps)

    @property
    def disk_mib(self) -> float:
        """All that the steps need together."""
        return sum(one.disk_mib for one in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        totals = {"seconds": self.seconds, "disk_mib": self.disk_mib, "memory_mib": max(s.memory_mib for s in self.steps)}
        return {**asdict(self), **totals}


@dataclass(frozen=True)
class Outline:
    """A checkpoint's small files, its name, and what looks at its files of weights."""

    folder: Path
    name: str
    reader: Reader


@dataclass(frozen=True)
class _Inputs:
    """What every step is counted from."""

    outline: Outline
    sketch: Sketch
    shapes: Shapes
    stored_mib: float
    sizes: Sizes
    config: AlignConfig
    costs: Costs
    rates: Rates
    rows: Planned
    suite: Planned
    validation: Planned | None  # by which `ship` will choose among the exits
    evaluated: int | None  # exits; every depth where None
    export: Plan

    @property
    def weights_mib(self) -> float:
        return FLOAT * sum(map(math.prod, self.shapes.values())) / MIB

    @property
    def image(self) -> int:
        return self.sizes.image_tokens


def plan_ship(
    model: str,
    device: DeviceProfile,
    out: Path,
    *,
    config: Path | None = None,
    data: Path | None = None,
    suite: Path | None = None,
    preset: bool = False,
    preset_data: Path | None = None,
    retrain: bool = False,
    exits: str | None = None,
    rates: Rates | None = None,
) -> ShipPlan:
    """Plan a run of `ship`. Nothing is written, no weight is read.

    Args:
        model: checkpoint folder, or an id on the hub, of which the small files are fetched.
        device: where the bundle will run.
        out: folder that would be written.
        config: alignment settings.
        data: training rows of your own.
        suite: certification suite of your own.
        preset: rows and suite of public sets.
        preset_data: folder of the sets.
        retrain: as `ship` takes it.
        exits: likewise.
        rates: of this machine; measured in a second where None.

    Raises:
        ConfigError: settings or schemes that can't be used.
        InputError, UnsupportedModelError: the checkpoint, rows or suite can't be used.
    """
    from edgesafe.align.config import LADDER, OPTION, check_trained, read_config, shipped_exits
    from edgesafe.checkpoint.hub import resolve_outline
    from edgesafe_export.plan import choose_ladder
    from edgesafe_export.quantize import check_schemes
    from edgesafe_export.skeleton import open_sketch

    check_schemes(device.vision_scheme, device.text_scheme)
    settings = read_config(config or settings_for(Path(model)), data=str(data) if data else None)
    where, named = (OPTION, exits) if exits else (LADDER, settings.ladder)
    exits, choose_by = named or shipped_exits(settings), "" if named else settings.eval.suite
    folder, name, reader = resolve_outline(model)
    sketch = open_sketch(folder, reader)
    if exits:
        trained = parse_exits(settings.exits, sketch.family.geometry.n_blocks, None)
        most = None if choose_by else MOST_RUNGS  # of more than those, `ship` will choose
        check_trained(choose_ladder(sketch, exits, most), trained, where)
    tokenizer = sketch.family.processor.tokenizer
    rows = _rows(data, "align", preset, preset_data, tokenizer)
    wanted = _rows(suite, "cert", preset, preset_data, tokenizer)
    chosen_by = rows_of(Path(choose_by), tokenizer) if exits and choose_by else None
    given = _given(sketch, Outline(folder, name, reader), device, settings, (rows, wanted, chosen_by), rates, exits)
    carried = not (retrain or config or data or suite or preset) and folder.samefile(REFERENCE)
    steps = (*_before(given, carried), *_training(given, carried), *_after(given))
    return _checked(name, device, given.rates, steps, out, _notes(given, carried))


def _given(
    sketch: Sketch,
    outline: Outline,
    device: DeviceProfile,
    config: AlignConfig,
    asked: tuple[Planned, Planned, Planned | None],
    rates: Rates | None,
    exits: str | None,
) -> _Inputs:
    """Everything that the steps are counted from; `asked` are training rows, suite and validation suite."""
    import torch

    from edgesafe.align.memory import language_of
    from edgesafe.align.settings import with_tune
    from edgesafe.align.sizes import read_headers, read_sizes
    from edgesafe.checkpoint.load import bf16_is_fast
    from edgesafe_export.plan import choose_ladder, make_plan

    shapes, stored = read_headers(outline.folder, outline.reader)
    config = with_tune(config, sum(map(math.prod, language_of(shapes).values())))
    sizes, text = read_sizes(outline.folder, shapes, config), sketch.family.text_config
    fast = config.precision == "bf16" or (config.precision == "auto" and bf16_is_fast())
    rates = rates or measure_rates(text.hidden_size, text.intermediate_size, torch.bfloat16 if fast else torch.float32)
    schemes = {"vision": device.vision_scheme, "text": device.text_scheme}
    ladder = choose_ladder(sketch, exits, None)
    return _Inputs(
        outline=outline,
        sketch=sketch,
        shapes=shapes,
        stored_mib=stored / MIB,
        sizes=sizes,
        config=config,
        costs=count(sketch, sizes),
        rates=rates,
        rows=asked[0],
        suite=asked[1],
        validation=asked[2],
        evaluated=len(ladder) if exits else None,
        export=make_plan(sketch, outline.folder, outline.name, device, ladder, "chain", schemes),
    )


def _rows(folder: Path | None, split: str, preset: bool, sets: Path | None, tokenizer: Any) -> Planned:
    if folder is not None:
        return rows_of(folder, tokenizer)
    if preset:
        return public_rows(sets, {"align": "train", "cert": "test"}[split], tokenizer)
    return drawn_rows(split, tokenizer)


def _running(given: _Inputs, rows: int, longest: int) -> float:
    """MiB of a process that answers so many rows at once: libraries, weights, the tower's states, the cache."""
    from edgesafe.align.memory import LIBRARIES_MIB

    s = given.sizes
    texts = rows * (longest + MAX_NEW_TOKENS) * (s.kv + 4 * s.width) + rows * s.vocabulary
    return LIBRARIES_MIB + given.weights_mib + FLOAT * max(rows * s.tower, texts + (s.tower_blocks + 1) * rows * s.states) / MIB


def _before(given: _Inputs, carried: bool) -> tuple[Step, ...]:
    """Rows and suite, and the untouched model's evaluation."""
    c, rates, rows, suite = given.costs, given.rates, given.rows, given.suite
    pictures = rows.pictures + suite.pictures
    disk = pictures * _PICTURE_MIB
    made = f"{rows.count} training rows, {suite.count} of the suite, {pictures} pictures"
    steps = [Step("rows", made, pictures * _PICTURE_S, 0.0, disk)]
    if rows.asked:
        tower = rates.seconds(rows.asked * c.tower(c.reference))
        asking = c.answering(rates, rows.asked, rows.request(given.image), given.rows.answer, MAX_NEW_TOKENS, 16)
        what = f"{made}; {rows.asked} answers of the model"
        seconds, longest = pictures * _PICTURE_S + tower + asking, rows.lengths(given.image).request
        steps = [Step("rows", what, seconds, _running(given, 16, longest), disk)]
    if carried:
        return (*steps, Step("evaluate", "the clone carries it (--retrain evaluates here)", 0.0, 0.0, 6.0))
    return (*steps, _evaluating(given, "evaluate", suite, given.evaluated or c.blocks, "before alignment"))


def _evaluating(given: _Inputs, name: str, asked: Planned, exits: int, why: str) -> Step:
    """Answers of the checkpoint to a suite."""
    c, rates, longest = given.costs, given.rates, max(one.lengths(given.image).request for one in (given.rows, asked))
    batch = max(1, min(_EVALUATED, _EVALUATED * 512 // longest))
    each = c.answering(rates, asked.count, asked.request(given.image), given.rows.answer, MAX_NEW_TOKENS, batch)
    seconds = rates.seconds(asked.count * c.tower(c.blocks)) + exits * each
    return Step(name, f"{asked.count} rows at {exits} exits, {why}", seconds, _running(given, batch, longest), 6.0)


def _training(given: _Inputs, carried: bool) -> tuple[Step, ...]:
    """The exit maps and the updates."""
    from edgesafe.align.memory import LIBRARIES_MIB, estimate, language_of, trained_values
    from edgesafe.align.settings import NO_MAP

    c, config, s, rows = given.costs, given.config, given.sizes, given.rows
    if carried:
        return (Step("align", "the clone carries it (--retrain aligns here)", 0.0, 0.0, given.stored_mib),)
    steps = []
    width, states = given.sketch.family.geometry.vision_width, given.sketch.family.geometry.states
    if config.exit_map != NO_MAP:
        used = min(PICTURES, rows.pictures)
        sums = 2 * 2 * states * width**2 * c.blocks
        held = LIBRARIES_MIB + given.weights_mib + (64 * FLOAT * s.tower + 2 * c.blocks * 2 * 8 * width**2) / MIB
        steps.append(Step("maps", f"{used} pictures", given.rates.seconds(used * (c.tower(c.blocks) + sums)), held, 0.0))
    trained = trained_values(language_of(given.shapes), config)
    at = given.outline
    need = estimate(at.folder, config, lengths=rows.lengths(given.image), reader=at.reader)
    kept = (1 if config.optimizer == "muon" else 2) + 1
    disk = given.stored_mib + FLOAT * kept * trained / MIB
    what = f"{config.steps} updates of {config.batch_size} + {config.reference_rows} rows, {config.method}, {config.tune}"
    seconds = None
    if config.method in COUNTED:
        once, each = _updates(given, trained)
        seconds, what = once + config.steps * each, f"{what}, {clock(each)} each"
    return (*steps, Step("align", what, seconds, need.total, disk))


def _updates(given: _Inputs, trained: int) -> tuple[float, float]:
    """Seconds of the tower and the teacher before the updates, and of one update."""
    c, config, rows = given.costs, given.config, given.rows
    prompt, answer = rows.padded(given.image, config.batch_size + config.reference_rows)
    tokens = prompt + answer
    seen = min(rows.count, config.steps * config.batch_size)
    once = given.rates.seconds(seen * c.tower(c.reference))
    if config.method == "self-distill":
        once += given.rates.seconds(seen * c.reading(tokens, answer), seen * c.moved(tokens, answer))
    return once, update_seconds(c, given.rates, config, tokens, answer, trained)


def _after(given: _Inputs) -> tuple[Step, ...]:
    """The export and the certificate."""
    from edgesafe_export.estimate import calibration_seconds, exit_graphs, graph_specs

    plan, sketch, suite = given.export, given.sketch, given.suite
    schemes = plan.quantization
    ladder = tuple(one.exit for one in plan.exits)
    specs = graph_specs(sketch, ladder, "chain", schemes["vision"], schemes["text"])
    chains = exit_graphs(sketch.family, ladder, "chain")
    text = Text(suite.request(plan.prompt_tokens) if plan.tiles > 1 else suite.request(given.image), given.rows.answer)
    calibrating = calibration_seconds(sketch, schemes["text"]) / machine.host_cores()
    making = _EXPORT_S + _EXPORT_A_WEIGHT * plan.weights + calibrating
    sessions = sessions_at_once(plan.bundle_bytes, suite.count)
    certifying = certify_seconds(specs, chains.values(), given.costs, given.rates, suite.count, plan.tiles, text, sessions)
    what = f"{schemes['vision']} vision, {schemes['text']} text, {len(ladder)} exits"
    chosen_by = [given.validation] if given.validation else []
    return (
        *(_evaluating(given, "choose", one, len(ladder), "to choose among them") for one in chosen_by),
        Step("export", what, making, plan.export_gib * 1024, plan.disk_gib * 1024),
        Step("certify", f"{suite.count} rows at {len(ladder)} exits", certifying, plan.run_gib * 1024, 6.0),
    )


def _checked(
    name: str, device: DeviceProfile, rates: Rates, steps: tuple[Step, ...], out: Path, notes: tuple[str, ...]
) -> ShipPlan:
    """The plan with what lacks."""
    memory, disk = machine.free_mib(), free_bytes(out.absolute()) / MIB
    need, most = sum(one.disk_mib for one in steps), max(steps, key=lambda one: one.memory_mib)
    short = []
    if memory is not None and most.memory_mib > memory:
        short.append(f"{most.name} needs about {_gib(most.memory_mib)} GiB of memory, {_gib(memory)} GiB are free")
    if need > disk:
        short.append(f"all steps need about {_gib(need)} GiB of disk, {_gib(disk)} GiB are free")
    figures = rates.operations / 1e9, rates.moved / 1e9
    return ShipPlan(name, device.name, machine.machine_name(), *figures, steps, memory, disk, tuple(short), notes)


def _notes(given: _Inputs, carried: bool) -> tuple[str, ...]:
    notes = [f"not counted: {NOT_COUNTED}"]
    if carried:
        notes.append("the clone's results are taken where its weights, rows, suite and settings are unchanged")
    if given.config.method not in COUNTED:
        notes.append(f"the updates of {given.config.method} sample and compare answers, which is not counted")
    return (*notes, *(note for note in given.export.notes if "calibrating" in note))


def check_room(plan: ShipPlan, out: Path) -> None:
    """Refuse what this machine has no memory or disk for.

    Raises:
        InputError: it names what is needed and what is free.
    """
    if plan.short:
        todo = "end other programs or make room, lower batch_size in --config, or take a larger machine"
        raise InputError("; ".join(plan.short), where=str(out), expected="room for every step", todo=todo)


def describe(plan: ShipPlan) -> str:
    """The plan as text, one line a step."""
    rows = [
        [
            one.name,
            "-" if one.seconds is None else clock(one.seconds),
            _gib(one.memory_mib) if one.memory_mib else "-",
            _gib(one.disk_mib),
            one.what,
        ]
        for one in plan.steps
    ]
    free = "" if plan.free_memory_mib is None else f"{_gib(plan.free_memory_mib)} GiB of memory and "
    return "\n".join(
        [
            table(rows, ["step", "at least", "memory GiB", "disk GiB", "what"]),
            "",
            f"{plan.model} for {plan.device}: at least {clock(plan.seconds)} on this machine ({plan.machine}: "
            f"{plan.gflops:.0f} GFLOP/s, {plan.gbytes:.0f} GB/s)",
            f"memory {_gib(max(one.memory_mib for one in plan.steps))} GiB, disk {_gib(plan.disk_mib)} GiB; {free}"
            f"{_gib(plan.free_disk_mib)} GiB of disk are free",
            *plan.notes,
        ]
    )


def _gib(mib: float) -> str:
    return f"{mib / 1024:.2f}" if mib < 10240 else f"{mib / 1024:.0f}"
