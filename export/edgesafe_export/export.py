"""The export step: checkpoint in, bundle out, or an error and nothing."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from edgesafe import __version__
from edgesafe.checkpoint.hub import resolve_model
from edgesafe.checkpoint.scan import scan_checkpoint
from edgesafe.device import DeviceProfile
from edgesafe.errors import InputError, ParityError
from edgesafe.format import graph_io
from edgesafe.format.bundle import Bundle, file_specs, is_bundle, write_manifest
from edgesafe.format.exits import Exit
from edgesafe.format.files import replacing
from edgesafe.format.manifest import Manifest
from edgesafe.format.pictures import open_picture
from edgesafe.format.specs import ExitSpec, GraphSpec, ParentSpec, SuiteRef
from edgesafe.format.suite import MAX_NEW_TOKENS, Suite, read_suite
from edgesafe.format.targets import NEW, check_target
from edgesafe.format.training_record import read_trained_from
from edgesafe.progress import step
from edgesafe_export import held_out
from edgesafe_export import parity_model as parity
from edgesafe_export.calibrate import neutral_text
from edgesafe_export.estimate import exit_graphs
from edgesafe_export.family import Family, load_family, text_spec
from edgesafe_export.graphs import Exported
from edgesafe_export.parity_answers import Request, ask, changed, compare, figures
from edgesafe_export.pieces import Piece, decoder_spec, join_decoder
from edgesafe_export.placeholders import fill, with_weights
from edgesafe_export.plan import PIECES, WHOLE_MODEL, check_room, choose_ladder, make_plan
from edgesafe_export.quantize import AUTO, check_schemes, weight_bytes
from edgesafe_export.scoring import score
from edgesafe_export.shared_cache import attend_whole, fold_tables
from edgesafe_export.shared_weights import SharedWeights
from edgesafe_export.skeleton import Sketch, open_sketch
from edgesafe_export.stream import Made, by_exit, make_pieces, of_text, trace_pieces
from edgesafe_export.tolerances import CALIBRATION_REQUESTS, LARGE_ROWS, PARITY_ROWS, ROWS_PER_PICTURE, WHOLE_WEIGHTS

LAYOUTS = ("chain", "standalone")
# What the manifest says of the scheme that was chosen, in place of a reason against it.
TAKEN = "taken"
FLOAT = {"vision": "fp32", "text": "fp32"}
# A graph of more bytes keeps its weights in a file beside it: protobuf ends at 2 GiB, and putting a graph together in memory
# takes three times its size (eight decoder layers of 1 GB: a peak of 4.0 GiB, where the pieces themselves needed 2.8).
INLINE_BYTES = 2**28
_RECORDED = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True)
class Job:
    """What stays the same between the float and the quantized bundle of one export.

    `layers` are the decoder's, where the family was built with fewer.
    """

    family: Family
    model_dir: Path
    name: str
    parent_digest: str
    device: DeviceProfile
    layout: str
    ladder: tuple[Exit, ...]
    suite: Suite | None
    config: Mapping[str, Any]
    seed: int
    layers: int | None = None


def export_bundle(
    model_dir: str | Path,
    out: Path,
    device: DeviceProfile,
    *,
    layout: str = "chain",
    vision_scheme: str | None = None,
    text_scheme: str | None = None,
    exits: str | None = None,
    suite_dir: Path | None = None,
    seed: int = 0,
    accept_damage: bool = False,
) -> Bundle:
    """Export a checkpoint for a device.

    Args:
        model_dir: checkpoint folder of a supported family, or its id on the Hugging Face hub.
        out: the bundle's folder; an older bundle there is replaced only when the new one is whole.
        device: profile that gives the schemes unless they are named here.
        layout: "chain" (segments and one head) or "standalone" (one graph per exit over one shared weight file).
        vision_scheme: see `edgesafe_export.quantize`.
        text_scheme: likewise; "auto" takes the smallest of `AUTO` whose bundle answers and reads as the checkpoint does.
        exits: ladder, as `edgesafe.format.exits.parse_exits` reads it.
        suite_dir: certification suite to ship inside the bundle.
        seed: recorded; picks the text that a scheme is calibrated on.
        accept_damage: write the bundle of a named scheme even if it doesn't answer or read as the checkpoint does; its manifest
            says so.

    Raises:
        UnsupportedModelError, InputError, ConfigError: what was asked for can't be done, a damaged checkpoint among it; found
            before anything is traced.
        ParityError: a graph does not compute what transformers computes, or the bundle doesn't say what the checkpoint says;
            nothing is written.
    """
    vision, text = vision_scheme or device.vision_scheme, text_scheme or device.text_scheme
    check_schemes(vision, text, accept_damage=accept_damage)
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}", where="--layout", expected=" or ".join(LAYOUTS), todo="choose one")
    check_target(out, "bundle", is_bundle, model=model_dir)
    suite = read_suite(suite_dir) if suite_dir else None
    folder, name = resolve_model(model_dir)
    sketch = open_sketch(folder)
    ladder = choose_ladder(sketch, exits)
    check_room(make_plan(sketch, folder, name, device, ladder, layout, {"vision": vision, "text": text}), out)
    profile = {k: v for k, v in asdict(device).items() if k != "name" and v is not None}
    config = {"vision_scheme": vision, "text_scheme": text, "exits": [str(exit) for exit in ladder], "device_profile": profile}
    untouched = read_trained_from(folder)
    config |= {"retrained_from": untouched} if untouched else {}
    digest = scan_checkpoint(folder, sketch.stored)
    job = Job(sketch.family, folder, name, digest, device, layout, ladder, suite, config, seed, sketch.layers)
    with replacing(out, "bundle", is_bundle, key=_key(job), model=folder) as work:
        _write_checked(job, sketch, vision, text, accept_damage, work)
    return Bundle.open(out)


def _key(job: Job) -> str:
    """What the pieces of an interrupted export must have been made of to be used again."""
    suite = job.suite.digest if job.suite else ""
    text = hashlib.sha256(neutral_text(job.seed).encode()).hexdigest()
    parts = [job.parent_digest, job.layout, job.config, suite, text, _versions(), __version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def trace(job: Job, *, text: bool = True) -> dict[str, Exported]:
    """The float graphs by their path in the bundle, whole and in memory; without `text` the vision ones alone."""
    sketch = open_sketch(job.model_dir)
    return filled(sketch, trace_pieces(sketch, job.ladder, job.layout, text=text))


def filled(sketch: Sketch, pieces: Iterable[Piece]) -> dict[str, Exported]:
    """Traced pieces as the float graphs that they make, by their path in the bundle."""
    protos: dict[str, list[onnx.ModelProto]] = {}
    specs: dict[str, GraphSpec] = {}
    for piece in pieces:
        constants = fill(piece.blueprint, sketch.load(piece.weights))
        protos.setdefault(piece.graph, []).append(with_weights(piece.blueprint, constants))
        specs[piece.graph] = piece.blueprint.spec
    if graph_io.DECODER_PATH in specs:
        specs[graph_io.DECODER_PATH] = decoder_spec(sketch, specs[graph_io.DECODER_PATH])
    return {path: (_joined(path, found, specs[path]), specs[path]) for path, found in protos.items()}


def _joined(path: str, protos: Iterable[onnx.ModelProto], spec: GraphSpec) -> onnx.ModelProto:
    return join_decoder(protos, spec) if path == graph_io.DECODER_PATH else next(iter(protos))


def probes(job: Job, count: int = PARITY_ROWS) -> list[parity.Probe]:
    """Pictures and requests for the parity checks."""
    return parity.probes(_spread(job, count), count, job.family.geometry.image_size)


def examples(job: Job, asked: list[Request]) -> list[parity.Probe]:
    """Pictures and requests that errors are compensated on: other ones than those that the bundle is asked.

    Where the suite has no others, made-up ones behind those that a check may take.
    """
    rows = _spread(job, CALIBRATION_REQUESTS, {prompt for (_, prompt), _ in asked})
    count = CALIBRATION_REQUESTS if rows else PARITY_ROWS + CALIBRATION_REQUESTS
    return parity.probes(rows, count, job.family.geometry.image_size)[-CALIBRATION_REQUESTS:]


def _spread(job: Job, count: int, without: Collection[str] = ()) -> list[parity.Probe]:
    """So many of the suite's rows with pictures, spread evenly, none with a request among some others."""
    if job.suite is None:
        return []
    rows = [(job.suite.image_path(row), row.prompt) for row in job.suite.rows if row.image and row.prompt not in without]
    return [(open_picture(path), prompt) for path, prompt in rows[:: max(1, len(rows) // count)][:count]]


def requests(job: Job, whole: bool) -> list[Request]:
    """What the bundle is asked, and at which exits.

    A model that is compared whole is asked each request at every exit. One that is compared in pieces may need a minute per
    picture: a few requests share one, and pictures take turns between the reference and the shallowest exit.
    """
    if whole:
        return [(row, job.ladder) for row in probes(job)]
    rows, turns = probes(job, LARGE_ROWS), (job.family.geometry.reference, job.ladder[0])
    shared = [(i // ROWS_PER_PICTURE, row) for i, row in enumerate(rows)]
    return [((rows[n * ROWS_PER_PICTURE][0], prompt), (turns[n % 2],)) for n, (_, prompt) in shared]


def write(
    job: Job, folder: Path, parts: Mapping[str, Exported | Made], schemes: dict[str, str], checked: dict[str, Any]
) -> None:
    """Write a whole bundle folder."""
    folder.mkdir(parents=True)
    specs: dict[str, GraphSpec] = {}
    beside = {room: SharedWeights(folder / room / "weights.bin") for room in ("vision", "text")}
    for path, part in parts.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        spec = part.spec if isinstance(part, Made) else part[1]
        shared = beside[target.parent.name] if _shares(job, path, part, schemes) else None
        proto = _joined(path, _protos(job, path, part, schemes, shared), spec)
        specs[path] = GraphSpec(spec.inputs, spec.outputs, spec.flops, weight_bytes(proto))
        onnx.save(proto, target)
    shutil.copyfile(job.model_dir / "tokenizer.json", folder / "tokenizer.json")
    if job.suite:
        _copy_suite(job.suite, folder / "suite")
    write_manifest(folder, _manifest(job, folder, specs, schemes, checked))


def _shares(job: Job, path: str, part: Exported | Made, schemes: Mapping[str, str]) -> bool:
    """Whether a graph's weights lie in a file beside it: other graphs have the same ones, or protobuf is too small for them."""
    size = sum(file.stat().st_size for file in part.files) if isinstance(part, Made) else part[0].ByteSize()
    same = job.layout == "standalone" if path.startswith("vision/") else job.family.tied and schemes["text"] != "fp32"
    return same or size >= INLINE_BYTES


def _protos(
    job: Job, path: str, part: Exported | Made, schemes: Mapping[str, str], shared: SharedWeights | None
) -> Iterator[onnx.ModelProto]:
    """A graph's parts, one at a time; with `shared` their weights are there and no longer in memory."""
    for proto in map(onnx.load, part.files) if isinstance(part, Made) else part[:1]:
        if path == graph_io.DECODER_PATH and job.device.attends_whole and isinstance(part, Made):
            proto = attend_whole(proto, job.family.geometry.head_dim)
        if path == graph_io.DECODER_PATH and schemes["text"] != "fp32":
            proto = fold_tables(proto)
        yield shared.move(proto) if shared else proto


def _copy_suite(suite: Suite, to: Path) -> None:
    # Not copytree: it gathers what went wrong into an error without a number, and a full disk would not be told as one.
    for file in sorted(p for p in suite.root.rglob("*") if p.is_file()):
        target = to / file.relative_to(suite.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _exit_specs(job: Job) -> tuple[ExitSpec, ...]:
    """Which graphs each exit runs, in order."""
    return tuple(ExitSpec(exit, chain) for exit, chain in exit_graphs(job.family, job.ladder, job.layout).items())


def _manifest(
    job: Job, folder: Path, specs: dict[str, GraphSpec], schemes: dict[str, str], checked: dict[str, Any]
) -> Manifest:
    family = job.family
    return Manifest(
        name=job.name,
        family=family.name,
        device=job.device.name,
        layout=job.layout,
        parent=ParentSpec("checkpoint", job.name, job.parent_digest),
        n_blocks=family.geometry.n_blocks,
        reference=family.geometry.reference,
        exits=_exit_specs(job),
        text=text_spec(family, job.layers or family.text_config.num_hidden_layers),
        graphs=specs,
        image=family.image_spec,
        image_token=family.processor.image_token,
        image_token_id=family.geometry.image_token_id,
        image_tokens=family.geometry.image_tokens,
        tiles=family.tiles,
        chat=family.chat.spec,
        quantization=schemes,
        files=file_specs(folder),
        parity=checked,
        suite=SuiteRef("suite", job.suite.digest) if job.suite else None,
        seed=job.seed,
        config=dict(job.config),
        versions=_versions(),
        created=datetime.date.today().isoformat(),
    )


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _RECORDED}


def _write_checked(job: Job, sketch: Sketch, vision: str, text: str, accept_damage: bool, work: Path) -> None:
    """Every piece against torch, of a model that fits the float bundle against transformers, and what the bundle says."""
    with step(f"trace {len(job.ladder)} exits and the text graphs"):
        pieces = trace_pieces(sketch, job.ladder, job.layout)
    whole = sketch.count <= WHOLE_WEIGHTS
    asked = requests(job, whole)
    make = partial(
        make_pieces, sketch, pieces, work=work / "pieces", probe=asked[0][0], examples=examples(job, asked), seed=job.seed
    )
    checked, meant = _check_whole(job, make(FLOAT)[0], asked, work) if whole else ({"check": PIECES}, None)
    tried: dict[str, Any] = {}
    why: dict[str, str] = {}
    for scheme in AUTO if text == "auto" else (text,):
        schemes = {"vision": vision, "text": scheme}
        try:
            with step(f"quantize: vision {vision}, text {scheme}"):
                parts, measured = make(schemes)
                shutil.rmtree(work / NEW, ignore_errors=True)
                write(job, work / NEW, parts, schemes, {**_by_exit(job, measured), **checked})
            with step("what the bundle says beside the checkpoint"):
                tried[scheme], why[scheme] = _judge(sketch, pieces, asked, meant, work)
        except ParityError as error:
            if text != "auto":
                raise
            why[scheme] = str(error)
            continue
        if not why[scheme] or accept_damage:
            found = {"answers": len(asked), **tried[scheme]}
            found |= {"damage": why[scheme]} if why[scheme] else {}
            why[scheme] = why[scheme] or TAKEN
            _record(work / NEW, {**found, "schemes_tried": tried, "schemes_why": why})
            return
    raise _changed_answers(vision, text, why)


def _check_whole(job: Job, parts: Mapping[str, Made], asked: list[Request], work: Path) -> tuple[dict[str, Any], list[str]]:
    """The float bundle against transformers' whole model at every exit; what was measured, and its answers."""
    shutil.rmtree(work / "float", ignore_errors=True)
    write(job, work / "float", parts, FLOAT, {})
    with step("parity of the float graphs with transformers, every exit"), parity.open_session(work / "float") as session:
        checked = parity.check_float(load_family(job.model_dir), session, [probe for probe, _ in asked])
        return {"check": WHOLE_MODEL, **checked}, [one.text for one in ask(session, asked, MAX_NEW_TOKENS)]


def _judge(
    sketch: Sketch, pieces: list[Piece], asked: list[Request], meant: list[str] | None, work: Path
) -> tuple[dict[str, Any], str]:
    """How the bundle, as it will be shipped, answers and reads text beside the checkpoint, and why that is not good enough."""
    with parity.open_session(work / NEW) as session:
        if meant is None:
            parity.check_inputs(sketch.family, session.tokenizer, session.manifest, [probe for probe, _ in asked])
        answers, texts = ask(session, asked, MAX_NEW_TOKENS), list(held_out.read(session, asked[0][0]))
    scores = score(sketch, pieces, [*answers, *texts], work / "states")
    shutil.rmtree(work / "states")
    compared = compare(session.tokenizer, answers, scores[: len(answers)], meant)
    read = held_out.figures(texts, scores[len(answers) :])
    return {"answer_figures": figures(compared), "text_figures": read}, changed(compared) or held_out.lost(read)


def _record(folder: Path, said: Mapping[str, Any]) -> None:
    """Add to what the manifest of a bundle says of parity."""
    manifest = Bundle.open(folder, verify=False).manifest
    write_manifest(folder, replace(manifest, parity={**manifest.parity, **said}))


def _by_exit(job: Job, measured: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The largest errors: of each exit's vision pieces, and of the text pieces that all exits share."""
    graphs = {spec.exit: spec.graphs for spec in _exit_specs(job)}
    exits = {f"{kind}_relative": by_exit(measured, graphs, kind) for kind in ("float", "quantized")}
    return {**exits, **{f"text_{kind}_relative": of_text(measured, kind) for kind in ("float", "quantized")}}


def _changed_answers(vision: str, text: str, why: dict[str, str]) -> ParityError:
    milder = "--vision-scheme fp32" if text in ("auto", "fp32") else "--text-scheme auto or --vision-scheme fp32"
    accept = "" if text == "auto" else "; or ship it as it is, with a note for ever: --accept-damage"
    return ParityError(
        "quantization changes the answers: " + "; ".join(f"{scheme}: {reason}" for scheme, reason in why.items()),
        where=f"vision {vision}, text {text}",
        expected="what the checkpoint could have said",
        todo=f"use a milder scheme: {milder}; or compare on the model's own kind of pictures: --suite{accept}",
    )
