"""The export step: checkpoint in, bundle out, or an error and nothing."""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Mapping
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
    ImageSpec,
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
from edgesafe_export.family import Llava, load_family
from edgesafe_export.graphs import Exported
from edgesafe_export.quantize import check_schemes, quantize, weight_bytes
from edgesafe_export.tolerances import PARITY_ROWS

_TEXT_FALLBACK = ("int4-block32", "int8-block32")
_ANSWER_TOKENS = 20


def export_bundle(
    model_dir: Path,
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
        model_dir: checkpoint folder of a supported family.
        out: the bundle's folder; an older bundle there is replaced only when the new one is whole.
        device: profile that gives the schemes unless they are named here.
        layout: "chain" (segments and one head) or "standalone" (one graph an exit over one shared weight file).
        vision_scheme, text_scheme: see `edgesafe_export.quantize`; text "auto" takes int4, or int8 where int4 changes answers.
        exits: ladder, as `edgesafe.exits.parse_exits` reads it.
        suite_dir: certification suite to ship inside the bundle.
        seed: recorded.

    Raises:
        UnsupportedModelError, InputError, ConfigError: what was asked for can't be done.
        ParityError: a graph does not compute what transformers computes; nothing is written.
    """
    vision, text = vision_scheme or device.vision_scheme, text_scheme or device.text_scheme
    check_schemes(vision, text)
    if layout not in ("chain", "standalone"):
        raise InputError(f"unknown layout {layout!r}", where="--layout", expected="chain or standalone", todo="choose one")
    suite = read_suite(suite_dir) if suite_dir else None
    family = load_family(Path(model_dir))
    ladder = _ladder(family, exits)
    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        job = _Job(family, Path(model_dir), device, layout, ladder, suite, seed)
        with step(f"trace {len(ladder)} exits and the text graphs"):
            parts = job.trace()
        _write_checked(job, parts, vision, text, work)
        _swap(work / "bundle", out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Bundle.open(out)


def _ladder(family: Llava, exits: str | None) -> tuple[int, ...]:
    """The exits to export; the reference depth is always one of them."""
    if exits is None:
        return default_ladder(family.n_blocks, family.reference_depth)
    return tuple(sorted({*parse_exits(exits, family.n_blocks), family.reference_depth}))


class _Job:
    """What stays the same between the float and the quantized bundle of one export."""

    def __init__(
        self,
        family: Llava,
        model_dir: Path,
        device: DeviceProfile,
        layout: str,
        ladder: tuple[int, ...],
        suite: Suite | None,
        seed: int,
    ) -> None:
        self.family, self.model_dir, self.device, self.layout = family, model_dir, device, layout
        self.ladder, self.suite, self.seed = ladder, suite, seed
        self.parent = digest_folder(model_dir)

    def trace(self) -> dict[str, Exported]:
        """All float graphs by their path in the bundle."""
        parts: dict[str, Exported] = {}
        if self.layout == "chain":
            for start, end in zip((0, *self.ladder), self.ladder, strict=False):
                parts[graph_io.segment_path(start, end)] = graphs.segment(self.family, start, end)
            parts[graph_io.HEAD_PATH] = graphs.head(self.family)
        else:
            for depth in self.ladder:
                parts[graph_io.standalone_path(depth)] = graphs.standalone(self.family, depth)
        parts[graph_io.EMBED_PATH] = graphs.embed_tokens(self.family)
        parts[graph_io.DECODER_PATH] = graphs.decoder(self.family)
        return parts

    def exit_specs(self) -> tuple[ExitSpec, ...]:
        """Which graphs each exit runs, in order."""
        if self.layout == "standalone":
            return tuple(ExitSpec(d, (graph_io.standalone_path(d),)) for d in self.ladder)
        chain = [graph_io.segment_path(a, b) for a, b in zip((0, *self.ladder), self.ladder, strict=False)]
        return tuple(ExitSpec(d, (*chain[: i + 1], graph_io.HEAD_PATH)) for i, d in enumerate(self.ladder))

    def probes(self) -> list[parity.Probe]:
        """Pictures and requests for the parity checks."""
        rows: list[parity.Probe] = []
        for row in self.suite.rows if self.suite else ():
            if row.image is not None:
                rows.append((self.suite.root / row.image, row.prompt))  # type: ignore[union-attr, arg-type]
        picked = parity.probes(rows, PARITY_ROWS, self.family.image_size)
        return [(Image.open(i).convert("RGB") if isinstance(i, Path) else i, p) for i, p in picked]

    def write(self, folder: Path, parts: Mapping[str, Exported], schemes: dict[str, str], checked: dict[str, Any]) -> None:
        """Write a whole bundle folder."""
        folder.mkdir(parents=True)
        specs: dict[str, GraphSpec] = {}
        shared = _SharedWeights(folder / "vision" / "weights.bin") if self.layout == "standalone" else None
        for path, (proto, spec) in parts.items():
            size = weight_bytes(proto)
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if shared is not None and path.startswith("vision/"):
                proto = shared.move(proto)
            onnx.save(proto, target)
            specs[path] = GraphSpec(spec.inputs, spec.outputs, spec.flops, size)
        if shared is not None:
            shared.close()
        shutil.copy2(self.model_dir / "tokenizer.json", folder / "tokenizer.json")
        if self.suite:
            shutil.copytree(self.suite.root, folder / "suite")
        write_manifest(folder, self._manifest(folder, specs, schemes, checked))

    def _manifest(
        self, folder: Path, specs: dict[str, GraphSpec], schemes: dict[str, str], checked: dict[str, Any]
    ) -> Manifest:
        family, text = self.family, self.family.text_config
        prefix, suffix = family.chat()
        tokenizer = family.processor.tokenizer
        eos = family.model.generation_config.eos_token_id
        eos = tokenizer.eos_token_id if eos is None else eos
        return Manifest(
            name=self.model_dir.name,
            family=family.name,
            device=self.device.name,
            layout=self.layout,
            parent=ParentSpec("checkpoint", self.model_dir.name, self.parent),
            n_blocks=family.n_blocks,
            reference_depth=family.reference_depth,
            exits=self.exit_specs(),
            text=TextSpec(
                graph_io.EMBED_PATH,
                graph_io.DECODER_PATH,
                text.num_hidden_layers,
                text.num_key_value_heads,
                getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
                text.hidden_size,
                text.vocab_size,
                text.max_position_embeddings,
                tuple(eos) if isinstance(eos, list) else (eos,),
            ),
            graphs=specs,
            image=ImageSpec.from_hf(family.processor.image_processor.to_dict()),
            image_token=family.processor.image_token,
            image_token_id=family.image_token_id,
            image_tokens=family.image_tokens,
            chat=ChatSpec(prefix, suffix, add_special_tokens=True),
            quantization=schemes,
            files=file_specs(folder),
            parity=checked,
            suite=SuiteRef("suite", self.suite.digest) if self.suite else None,
            seed=self.seed,
            versions={n: version(n) for n in ("torch", "transformers", "onnx", "onnxruntime", "onnxscript")},
            created=datetime.date.today().isoformat(),
        )


def _write_checked(job: _Job, parts: dict[str, Exported], vision: str, text: str, work: Path) -> None:
    """The float bundle checked against transformers, then the quantized one against the float one."""
    job.write(work / "float", parts, {"vision": "fp32", "text": "fp32"}, {})
    probes = job.probes()
    checked: dict[str, Any] = {}
    with step("parity of the float graphs with transformers, every exit"):
        session = parity.open_session(work / "float")
        features = parity.check_features(job.family, session, probes)
        checked["float_relative"] = {str(d): float(f"{v:.3e}") for d, v in features.items()}
        checked["text_answers_equal"] = parity.check_text(job.family, session, probes)
        want = parity.answers(session, probes, _ANSWER_TOKENS, "float answers")
    tried: dict[str, Any] = {}
    for scheme in _TEXT_FALLBACK if text == "auto" else (text,):
        with step(f"quantize: vision {vision}, text {scheme}"):
            shutil.rmtree(work / "bundle", ignore_errors=True)
            quantized = {p: (quantize(m, _scheme(p, vision, scheme)), s) for p, (m, s) in parts.items()}
            job.write(work / "bundle", quantized, {"vision": vision, "text": scheme}, {})
            got = parity.answers(parity.open_session(work / "bundle"), probes, _ANSWER_TOKENS, "quantized answers")
        share = parity.agreement(want, got)
        tried[scheme] = {str(d): round(v, 4) for d, v in share.items()}
        if parity.agrees(share):
            checked["answer_agreement"], checked["schemes_tried"] = tried[scheme], tried
            shutil.rmtree(work / "bundle")
            job.write(work / "bundle", quantized, {"vision": vision, "text": scheme}, checked)
            return
    raise ParityError(
        f"quantization changes the answers; share of equal ones by exit: {tried}",
        where=f"{vision} / {text}",
        expected="at least 90 % equal over all exits and 75 % at each",
        todo="use a milder scheme, or fp32",
    )


def _scheme(path: str, vision: str, text: str) -> str:
    """The embedding stays float: it is a table that is looked up, not multiplied."""
    if path == graph_io.EMBED_PATH:
        return "fp32"
    return vision if path.startswith("vision/") else text


class _SharedWeights:
    """One file that holds each distinct weight of the standalone graphs once."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.file = path, path.open("wb")
        self.places: dict[bytes, tuple[int, int]] = {}

    def move(self, proto: onnx.ModelProto) -> onnx.ModelProto:
        """The graph with its larger weights pointing into the shared file."""
        moved = onnx.ModelProto()
        moved.CopyFrom(proto)
        for tensor in moved.graph.initializer:
            data = onnx.numpy_helper.to_array(tensor).tobytes()
            if len(data) < 1024:
                continue
            if data not in self.places:
                self.places[data] = (self.file.tell(), len(data))
                self.file.write(data)
                self.file.write(b"\0" * (-self.file.tell() % 64))
            start, size = self.places[data]
            tensor.ClearField("raw_data")
            for old in ("float_data", "int32_data", "int64_data"):
                tensor.ClearField(old)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            del tensor.external_data[:]
            for key, value in (("location", self.path.name), ("offset", str(start)), ("length", str(size))):
                tensor.external_data.add(key=key, value=value)
        return moved

    def close(self) -> None:
        self.file.close()


def _swap(new: Path, out: Path) -> None:
    """Put the new bundle in place of an older one; whatever happens, one of the two stands there whole."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(new, out)
    except BaseException:
        if old.exists():
            os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
