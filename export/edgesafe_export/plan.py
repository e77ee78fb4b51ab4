"""What an export will do, before anything is loaded: config.json and safetensors headers are read, and the device's profile.

Bytes are counted from the shapes; times come from the profile's figures, as the runtime's own estimates do.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from edgesafe import machine
from edgesafe.checkpoint.chat import prompt_ids
from edgesafe.device import DeviceProfile
from edgesafe.errors import InputError
from edgesafe.format import graph_io
from edgesafe.format.exits import default_ladder, parse_exits, segments
from edgesafe.format.manifest import GraphSpec
from edgesafe.format.tiles import ALONE, cut_of, prompt_runs
from edgesafe.progress import table
from edgesafe.runtime.forecast import graph_ms
from edgesafe.runtime.shared import PART_TOKENS
from edgesafe_export import graphs
from edgesafe_export.modules import Whole
from edgesafe_export.quantize import AUTO, EMBED_SCHEME
from edgesafe_export.skeleton import Sketch
from edgesafe_export.stream import scheme_of
from edgesafe_export.tolerances import WHOLE_WEIGHTS

GIB = 2**30
# What `parity.check` in the manifest says: that transformers' whole model was the judge, or torch piece by piece.
WHOLE_MODEL, PIECES = "whole model", "pieces"
# A graph beside its weights: nodes, names and shapes. Seen: 3 to 8 kB a vision segment, 14 kB a decoder layer.
_GRAPH_BYTES, _LAYER_BYTES = 8_000, 14_000
_QUESTION = "What is this?"
PICTURE = (480, 640)  # height and width of the picture that times are planned for
# Shapes of published models that are smaller, to name what a device can do: weights of the encoder, positions that it reads a
# picture as, weights of the decoder, and tokens of a prompt with one picture.
SMALLER = {
    "SmolVLM-500M, one tile": (93e6, 1024, 410e6, 96),
    "SmolVLM-256M, one tile": (93e6, 1024, 163e6, 96),
}


@dataclass(frozen=True)
class ExitPlan:
    """One exit: its graphs' bytes with the text's, and when the first token is expected (None: the profile lacks a figure)."""

    exit_depth: int
    bytes: int
    ttft_ms: float | None


@dataclass(frozen=True)
class Plan:
    """What will happen.

    Attributes:
        tiles, prompt_tokens: how often the tower runs, and the tokens of a short question, for a picture of `PICTURE`.
        check: what the exporter will compare with, `WHOLE_MODEL` or `PIECES`.
        bundle_bytes: of the whole bundle, a suite left out.
        export_gib, disk_gib: most memory of the exporting process, and room on the disk while it runs.
        run_gib: memory of a process that answers on the device.
        fits: whether some exit's first token is expected within the device's budget; None where that is not known.
        notes: what the reader should know, in sentences.
    """

    model: str
    device: str
    weights: int
    n_blocks: int
    reference_depth: int
    quantization: dict[str, str]
    check: str
    tiles: int
    prompt_tokens: int
    exits: tuple[ExitPlan, ...]
    bundle_bytes: int
    export_gib: float
    disk_gib: float
    run_gib: float
    budget_ms: float
    fits: bool | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def choose_ladder(sketch: Sketch, exits: str | None) -> tuple[int, ...]:
    """The exits to export; the reference depth is always one of them."""
    family = sketch.family
    if exits is None:
        return default_ladder(family.geometry.n_blocks, family.geometry.reference_depth)
    return tuple(sorted({*parse_exits(exits, family.geometry.n_blocks), family.geometry.reference_depth}))


def make_plan(
    sketch: Sketch,
    folder: Path,
    name: str,
    device: DeviceProfile,
    ladder: tuple[int, ...],
    layout: str,
    schemes: Mapping[str, str],
) -> Plan:
    """The plan of an export.

    Args:
        sketch: the checkpoint without its weights.
        folder, name: where it lies, and what it is called.
        device: gives the figures that times are estimated with.
        ladder, layout, schemes: as they will be exported; text "auto" is planned as its first choice.
    """
    vision, text = schemes["vision"], AUTO[0] if schemes["text"] == "auto" else schemes["text"]
    specs = graph_specs(sketch, ladder, layout, vision, text)
    (tiles, tokens), whole = _prompt(sketch), sketch.count <= WHOLE_WEIGHTS
    times = {
        path: graph_ms(spec, device, scheme_of(path, vision, text), tokens if path == graph_io.DECODER_PATH else tiles)
        for path, spec in specs.items()
    }
    exits = tuple(_exit(depth, chain, specs, times) for depth, chain in exit_graphs(ladder, layout).items())
    graph_bytes = exits[-1].bytes + _GRAPH_BYTES * len(specs) + _LAYER_BYTES * sketch.layers
    bundle = graph_bytes + (folder / "tokenizer.json").stat().st_size
    known = [e.ttft_ms for e in exits if e.ttft_ms is not None]
    plan = Plan(
        model=name,
        device=device.name,
        weights=sketch.count,
        n_blocks=sketch.family.geometry.n_blocks,
        reference_depth=sketch.family.geometry.reference_depth,
        quantization={"vision": vision, "text": text},
        check=WHOLE_MODEL if whole else PIECES,
        tiles=tiles,
        prompt_tokens=tokens,
        exits=exits,
        bundle_bytes=bundle,
        export_gib=round(export_bytes(sketch, whole) / GIB, 2),
        disk_gib=round((2 * bundle + (8 * sketch.count if whole else 0)) / GIB, 2),
        run_gib=round(run_bytes(sketch, specs, text, tiles, tokens) / GIB, 2),
        budget_ms=device.ttft_budget_ms,
        fits=min(known) <= device.ttft_budget_ms if len(known) == len(exits) else None,
        notes=(),
    )
    return replace(plan, notes=tuple(_notes(plan, device)))


def _exit(depth: int, chain: tuple[str, ...], specs: Mapping[str, GraphSpec], times: Mapping[str, float | None]) -> ExitPlan:
    """One exit; looking up the prompt's embeddings counts as no time."""
    weights = sum(specs[path].weight_bytes for path in (*chain, graph_io.EMBED_PATH, graph_io.DECODER_PATH))
    return ExitPlan(depth, weights, _sum(times[path] for path in (*chain, graph_io.DECODER_PATH)))


def exit_graphs(ladder: tuple[int, ...], layout: str) -> dict[int, tuple[str, ...]]:
    """The vision graphs of each exit, in order."""
    if layout == "standalone":
        return {depth: (graph_io.standalone_path(depth),) for depth in ladder}
    chain = [graph_io.segment_path(a, b) for a, b in segments(ladder)]
    return {depth: (*chain[: i + 1], graph_io.HEAD_PATH) for i, depth in enumerate(ladder)}


def graph_specs(sketch: Sketch, ladder: tuple[int, ...], layout: str, vision: str, text: str) -> dict[str, GraphSpec]:
    """Operations and weights' bytes of every graph, by its path; nothing is traced."""
    family, specs = sketch.family, {}
    if layout == "standalone":
        for depth in ladder:
            module = Whole(family.segment(0, depth), family.head())
            specs[graph_io.standalone_path(depth)] = _spec(module, family.geometry.tokens, vision)
    else:
        for start, end in segments(ladder):
            specs[graph_io.segment_path(start, end)] = _spec(family.segment(start, end), family.geometry.tokens, vision)
        specs[graph_io.HEAD_PATH] = _spec(family.head(), family.geometry.tokens, vision)
    embed_scheme = scheme_of(graph_io.EMBED_PATH, vision, text)
    specs[graph_io.EMBED_PATH] = GraphSpec((), (), 0, module_bytes(family.embed_tokens(), embed_scheme))
    causal = family.decoder()
    layer, last = _spec(causal.model.layers[0], 1, text), _spec(nn.ModuleList([causal.model.norm, causal.lm_head]), 1, text)
    config = family.text_config
    weights = (
        sketch.layers * layer.weight_bytes + last.weight_bytes + 4 * config.max_position_embeddings * family.geometry.head_dim
    )
    flops = sketch.layers * (layer.flops or 0) + (last.flops or 0)
    specs[graph_io.DECODER_PATH] = GraphSpec((), (), flops, weights)
    return specs


def _spec(module: nn.Module, tokens: int, scheme: str) -> GraphSpec:
    return GraphSpec((), (), graphs.flops(module, tokens), module_bytes(module, scheme))


def module_bytes(module: nn.Module, scheme: str) -> int:
    """A module's weights in a scheme: matrices as `edgesafe_export.quantize` stores them, all else in float32.

    >>> module_bytes(nn.Linear(64, 10, bias=False), "int4-block32"), module_bytes(nn.Linear(64, 10), "int8-dynamic")
    (410, 730)
    """
    total = 0
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            if isinstance(part, nn.Linear) and name == "weight":
                total += _matrix_bytes(part.in_features, part.out_features, scheme)
            elif scheme == EMBED_SCHEME and weight.dim() == 2:
                total += weight.numel() + 4 * len(weight)
            else:
                total += 4 * weight.numel()
    return total


def _matrix_bytes(rows: int, columns: int, scheme: str) -> int:
    if scheme == "fp32":
        return 4 * rows * columns
    if scheme == "int8-dynamic":
        return columns * (rows + 4 + 1)  # a scale and a zero point a column
    bits, size = (int(n) for n in scheme.removeprefix("int").split("-block"))
    blocks = math.ceil(rows / size)
    return columns * (blocks * size * bits // 8 + 4 * blocks + math.ceil(blocks * bits / 8))


def export_bytes(sketch: Sketch, whole: bool) -> float:
    """Most memory of an exporting process.

    Seen at most: what is imported; one tile in the tower; of the largest piece its weights in float32 `_COPIES` times (read, in
    the graph, in the quantizer's copy) and its largest matrix `_MATRIX_COPIES` times more, while it is turned and cut into
    blocks; of a model that is compared whole, transformers' model and the float graphs' own.
    """
    family = sketch.family
    causal = family.decoder()
    parts = [causal.model.layers[0], causal.lm_head, family.embed_tokens(), family.head(), family.segment(0, 1)]
    piece = max(4 * (_COPIES * _count(part) + _MATRIX_COPIES * _largest(part)) for part in parts)
    return _IMPORTED + looking_bytes(sketch, 1) + max(piece, _WHOLE_COPIES * 4 * sketch.count if whole else 0)


_IMPORTED, _COPIES, _MATRIX_COPIES, _WHOLE_COPIES = 0.55 * GIB, 2.2, 2.4, 3.0


def looking_bytes(sketch: Sketch, tiles: int) -> float:
    """A picture in the tower: the tiles' pixels, their states before and behind a graph, and what a block works with."""
    family, vision = sketch.family, sketch.family.model.config.vision_config
    states = family.geometry.tokens * family.geometry.vision_width
    scores = vision.num_attention_heads * family.geometry.tokens**2
    work = scores + family.geometry.tokens * 2 * vision.intermediate_size + 4 * states
    return 4 * (tiles * (3 * family.geometry.image_size**2 + 2 * states) + work)


def run_bytes(sketch: Sketch, specs: Mapping[str, GraphSpec], text: str, tiles: int, tokens: int) -> float:
    """Memory of a process that answers: what is imported, the weights, the picture, the cache of a prompt and an answer.

    onnxruntime packs weights for its kernels when it opens a graph and then lets the read ones go: of weights in blocks the
    packed ones are larger by a scale and a sum a block, and the scales stay; of the tower's int8 weights both seem to stay.
    """
    config = sketch.family.text_config
    cache = 2 * 4 * sketch.layers * config.num_key_value_heads * sketch.family.geometry.head_dim * (tokens + 64)
    states = 4 * min(tokens, PART_TOKENS) * (4 * config.intermediate_size + 6 * config.hidden_size)
    causal = sketch.family.decoder()
    matrices = sketch.layers * _count(causal.model.layers[0]) + _count(causal.lm_head)
    packed = 8 * matrices / int(text.partition("-block")[2]) if "-block" in text else 0
    texts = (graph_io.EMBED_PATH, graph_io.DECODER_PATH)
    tower = sum(spec.weight_bytes for path, spec in specs.items() if path not in texts)
    weights = sum(specs[path].weight_bytes for path in texts) + packed + 2 * tower
    # The picture is let go before the prompt is read.
    return _STARTED + weights + cache + max(states, looking_bytes(sketch, tiles))


_STARTED = 0.1 * GIB


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _largest(module: nn.Module) -> int:
    return max((weight.numel() for weight in module.parameters()), default=0)


def _sum(times: Iterable[float | None]) -> float | None:
    known = list(times)
    return None if None in known else round(sum(t for t in known if t is not None), 1)


def _prompt(sketch: Sketch) -> tuple[int, int]:
    """How often the tower runs for a picture of `PICTURE`, and how many tokens a short question about it has."""
    family = sketch.family
    token = family.processor.image_token
    cut = cut_of(family.tiles, family.geometry.image_size, PICTURE) if family.tiles else ALONE
    text, features = prompt_runs(family.tiles, cut, token, family.geometry.image_tokens)
    words = prompt_ids(family.processor, family.chat, _QUESTION, text)
    return cut.tiles, len(words) - len(features) + sum(features)


def _notes(plan: Plan, device: DeviceProfile) -> Iterable[str]:
    """What the reader should know."""
    budget = f"the budget of {device.ttft_budget_ms / 1e3:g} s"
    if plan.fits is None:
        yield f"no time can be predicted: the profile of {device.title} lacks a figure"
    elif not plan.fits:
        best = min(e.ttft_ms for e in plan.exits if e.ttft_ms is not None)
        yield (
            f"not interactive on {device.title}: the first token takes at least {best / 1e3:.1f} s at any exit, beyond {budget}"
            f" ({plan.prompt_tokens} tokens of prompt through the decoder)"
        )
        fitting = [f"{n} ({ms / 1e3:.1f} s)" for n, ms in _smaller(device) if ms <= device.ttft_budget_ms]
        yield f"what fits {budget}: " + (", ".join(fitting) if fitting else "none of the smaller models known here")
    if device.memory_mib and plan.run_gib * 1024 > device.memory_mib:
        yield f"needs {plan.run_gib:.1f} GiB to answer, more than the {device.memory_mib / 1024:.1f} GiB of {device.title}"


def _smaller(device: DeviceProfile) -> Iterable[tuple[str, float]]:
    """Smaller models and the time to their first token by the same arithmetic, in the schemes that are tried first."""
    for name, (encoder, positions, decoder, tokens) in SMALLER.items():
        tower = GraphSpec((), (), int(2 * encoder * positions), int(encoder))
        text = GraphSpec((), (), int(2 * decoder), int(decoder * _matrix_bytes(1024, 1, AUTO[0]) / 1024))
        total = _sum([graph_ms(tower, device, "int8-dynamic", 1), graph_ms(text, device, AUTO[0], tokens)])
        if total is not None:
            yield name, total


def check_room(plan: Plan, out: Path) -> None:
    """Refuse an export that this machine has no disk or memory for.

    Raises:
        InputError: too little of either; it names what is needed and what is free.
    """
    place = out.absolute()
    while not place.exists():
        place = place.parent
    started = out.with_name(out.name + ".partial")  # what a stopped export left counts as there
    held = sum(path.stat().st_size for path in started.rglob("*") if path.is_file()) / GIB
    free = shutil.disk_usage(place).free / GIB
    if plan.disk_gib - held > free:
        raise InputError(
            f"the export needs {plan.disk_gib - held:.1f} GiB on the disk, {free:.1f} GiB are free",
            where=str(place),
            expected="room for the pieces and the bundle",
            todo="make room, or name an --out on another disk",
        )
    memory = machine.free_mib()
    if memory is not None and plan.export_gib * 1024 > memory:
        raise InputError(
            f"the export needs about {plan.export_gib:.1f} GiB of memory, {memory / 1024:.1f} GiB are free",
            where=plan.model,
            expected="memory for its largest piece",
            todo="end other programs, or export on a machine with more memory",
        )


def describe(plan: Plan) -> str:
    """The plan as text."""
    rows = []
    for e in plan.exits:
        within = "?" if e.ttft_ms is None else ("yes" if e.ttft_ms <= plan.budget_ms else "no")
        seconds = "-" if e.ttft_ms is None else f"{e.ttft_ms / 1e3:.3g}"
        rows.append(
            [f"{e.exit_depth}{'*' if e.exit_depth == plan.reference_depth else ''}", f"{e.bytes / 1e6:.1f}", seconds, within]
        )
    lines = [
        table(rows, ["exit", "MB", "first token s (estimated)", f"within {plan.budget_ms / 1e3:g} s"]),
        "",
        f"{plan.model} for {plan.device}: {plan.weights / 1e6:.1f} million weights, {plan.quantization['vision']} vision, "
        f"{plan.quantization['text']} text, a picture of {PICTURE[1]} x {PICTURE[0]} in {plan.tiles} and a prompt of "
        f"{plan.prompt_tokens} tokens",
        f"bundle {plan.bundle_bytes / 1e6:.1f} MB; export needs {plan.export_gib:.1f} GiB of memory and {plan.disk_gib:.1f} "
        f"GiB of disk; answering needs {plan.run_gib:.1f} GiB; checked: {plan.check}",
        *plan.notes,
    ]
    return "\n".join(lines)
