"""The export step: checkpoint in, bundle out, or an error and nothing."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
from PIL import Image

from edgesafe import graph_io
from edgesafe.bundle import (
    Bundle,
    ChatSpec,
    ExitSpec,
    GraphSpec,
    Manifest,
    ParentSpec,
    SuiteRef,
    TextSpec,
    digest_folder,
    file_specs,
    write_manifest,
)
from edgesafe.certify.suite import Suite, read_suite
from edgesafe.device import DeviceProfile
from edgesafe.errors import InputError, ParityError
from edgesafe.exits import default_ladder, parse_exits
from edgesafe.progress import step
from edgesafe_export import graphs, parity
from edgesafe_export.family import Family, load_family
from edgesafe_export.graphs import Exported
from edgesafe_export.place import check_target, replacing
from edgesafe_export.quantize import EMBED_SCHEME, check_schemes, quantize, weight_bytes
from edgesafe_export.resolve import resolve_model
from edgesafe_export.tolerances import ANSWER_TOKENS, PARITY_ROWS
from edgesafe_export.weights import SharedWeights

AUTO = ("int4-block128", "int4-block32", "int8-block32")
LAYOUTS = ("chain", "standalone")
_RECORDED = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True)
class Job:
    """What stays the same between the float and the quantized bundle of one export."""

    family: Family
    model_dir: Path
    name: str
    parent_digest: str
    device: DeviceProfile
    layout: str
    ladder: tuple[int, ...]
    suite: Suite | None
    config: Mapping[str, Any]
    seed: int

    @property
    def steps(self) -> list[tuple[int, int]]:
        """The chain's segments as (blocks before, blocks after)."""
        return list(zip((0, *self.ladder), self.ladder, strict=False))


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
) -> Bundle:
    """Export a checkpoint for a device.

    Args:
        model_dir: checkpoint folder of a supported family, or its id on the Hugging Face hub.
        out: the bundle's folder; an older bundle there is replaced only when the new one is whole.
        device: profile that gives the schemes unless they are named here.
        layout: "chain" (segments and one head) or "standalone" (one graph an exit over one shared weight file).
        vision_scheme, text_scheme: see `edgesafe_export.quantize`; text "auto" takes int4 in large blocks, or the first finer
            scheme of `AUTO` that does not change answers.
        exits: ladder, as `edgesafe.exits.parse_exits` reads it.
        suite_dir: certification suite to ship inside the bundle.
        seed: recorded.

    Raises:
        UnsupportedModelError, InputError, ConfigError: what was asked for can't be done.
        ParityError: a graph does not compute what transformers computes; nothing is written.
    """
    vision, text = vision_scheme or device.vision_scheme, text_scheme or device.text_scheme
    check_schemes(vision, text)
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}", where="--layout", expected=" or ".join(LAYOUTS), todo="choose one")
    check_target(out)
    suite = read_suite(suite_dir) if suite_dir else None
    folder, name = resolve_model(model_dir)
    family = load_family(folder)
    ladder = _ladder(family, exits)
    profile = {k: v for k, v in asdict(device).items() if k != "name"}
    config = {"vision_scheme": vision, "text_scheme": text, "exits": list(ladder), "device_profile": profile}
    job = Job(family, folder, name, digest_folder(folder), device, layout, ladder, suite, config, seed)
    with replacing(out) as work:
        with step(f"trace {len(ladder)} exits and the text graphs"):
            parts = trace(job)
        _write_checked(job, parts, vision, text, work)
    return Bundle.open(out)


def _ladder(family: Family, exits: str | None) -> tuple[int, ...]:
    """The exits to export; the reference depth is always one of them."""
    if exits is None:
        return default_ladder(family.n_blocks, family.reference_depth)
    return tuple(sorted({*parse_exits(exits, family.n_blocks), family.reference_depth}))


def trace(job: Job, *, text: bool = True) -> dict[str, Exported]:
    """The float graphs by their path in the bundle; without `text` the vision ones alone."""
    parts: dict[str, Exported] = {}
    if job.layout == "chain":
        for start, end in job.steps:
            parts[graph_io.segment_path(start, end)] = graphs.segment(job.family, start, end)
        parts[graph_io.HEAD_PATH] = graphs.head(job.family)
    else:
        for depth in job.ladder:
            parts[graph_io.standalone_path(depth)] = graphs.standalone(job.family, depth)
    if text:
        parts[graph_io.EMBED_PATH] = graphs.embed_tokens(job.family)
        parts[graph_io.DECODER_PATH] = graphs.decoder(job.family)
    return parts


def probes(job: Job) -> list[parity.Probe]:
    """Pictures and requests for the parity checks."""
    suite = job.suite
    rows = [(suite.image_path(r), r.prompt) for r in suite.rows if r.image] if suite else []
    step_ = max(1, len(rows) // PARITY_ROWS)
    picked = [(Image.open(path).convert("RGB"), prompt) for path, prompt in rows[::step_][:PARITY_ROWS]]
    return parity.probes(picked, PARITY_ROWS, job.family.image_size)


def write(job: Job, folder: Path, parts: Mapping[str, Exported], schemes: dict[str, str], checked: dict[str, Any]) -> None:
    """Write a whole bundle folder."""
    folder.mkdir(parents=True)
    specs: dict[str, GraphSpec] = {}
    standalone = job.layout == "standalone"
    with SharedWeights(folder / "vision" / "weights.bin") if standalone else nullcontext() as shared:
        for path, (proto, spec) in parts.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            specs[path] = GraphSpec(spec.inputs, spec.outputs, spec.flops, weight_bytes(proto))
            onnx.save(shared.move(proto) if shared and path.startswith("vision/") else proto, target)
    shutil.copyfile(job.model_dir / "tokenizer.json", folder / "tokenizer.json")
    if job.suite:
        _copy_suite(job.suite, folder / "suite")
    write_manifest(folder, _manifest(job, folder, specs, schemes, checked))


def _copy_suite(suite: Suite, to: Path) -> None:
    # Not copytree: it gathers what went wrong into an error without a number, and a full disk would not be told as one.
    for file in sorted(p for p in suite.root.rglob("*") if p.is_file()):
        target = to / file.relative_to(suite.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _exit_specs(job: Job) -> tuple[ExitSpec, ...]:
    """Which graphs each exit runs, in order."""
    if job.layout == "standalone":
        return tuple(ExitSpec(d, (graph_io.standalone_path(d),)) for d in job.ladder)
    chain = [graph_io.segment_path(a, b) for a, b in job.steps]
    return tuple(ExitSpec(d, (*chain[: i + 1], graph_io.HEAD_PATH)) for i, d in enumerate(job.ladder))


def _text_spec(family: Family) -> TextSpec:
    text = family.text_config
    return TextSpec(
        embed_tokens=graph_io.EMBED_PATH,
        decoder=graph_io.DECODER_PATH,
        num_layers=text.num_hidden_layers,
        num_kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        context_length=text.max_position_embeddings,
        eos_token_ids=family.eos_token_ids,
    )


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
        n_blocks=family.n_blocks,
        reference_depth=family.reference_depth,
        exits=_exit_specs(job),
        text=_text_spec(family),
        graphs=specs,
        image=family.image_spec,
        image_token=family.processor.image_token,
        image_token_id=family.image_token_id,
        image_tokens=family.image_tokens,
        tiles=family.tiles,
        chat=ChatSpec(*family.chat, add_special_tokens=True),
        quantization=schemes,
        files=file_specs(folder),
        parity=checked,
        suite=SuiteRef("suite", job.suite.digest) if job.suite else None,
        seed=job.seed,
        config=dict(job.config),
        versions={name: version(name) for name in _RECORDED},
        created=datetime.date.today().isoformat(),
    )


def _write_checked(job: Job, parts: dict[str, Exported], vision: str, text: str, work: Path) -> None:
    """The float bundle checked against transformers, then the quantized one against the float one."""
    write(job, work / "float", parts, {"vision": "fp32", "text": "fp32"}, {})
    rows = probes(job)
    with step("parity of the float graphs with transformers, every exit"):
        session = parity.open_session(work / "float")
        checked = parity.check_float(job.family, session, rows)
        want = parity.answers(session, rows, ANSWER_TOKENS, "float answers")
    tried: dict[str, Any] = {}
    why: dict[str, str] = {}
    for scheme in AUTO if text == "auto" else (text,):
        schemes = {"vision": vision, "text": scheme}
        with step(f"quantize: vision {vision}, text {scheme}"):
            shutil.rmtree(work / "bundle", ignore_errors=True)
            quantized = {path: (quantize(m, _scheme(path, vision, scheme)), spec) for path, (m, spec) in parts.items()}
            write(job, work / "bundle", quantized, schemes, {})
            got = parity.answers(parity.open_session(work / "bundle"), rows, ANSWER_TOKENS, "quantized answers")
        share = parity.agreement(want, got)
        tried[scheme] = {str(d): round(v, 4) for d, v in share.items()}
        why[scheme] = parity.disagrees(share) or "taken"
        if why[scheme] == "taken":
            shutil.rmtree(work / "bundle")
            found = {"answer_agreement": tried[scheme], "answers": len(rows), "schemes_tried": tried, "schemes_why": why}
            write(job, work / "bundle", quantized, schemes, {**checked, **found})
            return
    raise _changed_answers(vision, text, why)


def _changed_answers(vision: str, text: str, why: dict[str, str]) -> ParityError:
    milder = "--text-scheme auto (takes finer blocks where these fail)" if text.startswith("int4") else "--text-scheme fp32"
    return ParityError(
        "quantization changes the answers: " + "; ".join(f"{scheme}: {reason}" for scheme, reason in why.items()),
        where=f"vision {vision}, text {text}",
        expected="the float graphs' answers, but for a few",
        todo=f"use a milder scheme: {milder}, or --vision-scheme fp32; or compare on the model's own kind of pictures: --suite",
    )


def _scheme(path: str, vision: str, text: str) -> str:
    """A graph's scheme. The embedding is looked up, not multiplied: where text is quantized its table takes int8 rows."""
    if path == graph_io.EMBED_PATH:
        return "fp32" if text == "fp32" else EMBED_SCHEME
    return vision if path.startswith("vision/") else text
