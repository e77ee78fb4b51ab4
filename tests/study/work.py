"""One run of the study in this process: train where the plan says so, ask, and write the raw answers."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from edgesafe.format.exits import Exit, parse_exits, reference_depth
from edgesafe.format.files import digest_folder, sha256_file, write_atomically
from edgesafe.format.pictures import open_picture
from edgesafe.format.suite import Suite, read_suite
from edgesafe.machine import machine_name
from study.code import code_digest, digest
from study.plan import (
    BUNDLE,
    CONTROL_NAMES,
    CONTROLS,
    DEVICE,
    FOLDERS,
    KINDS,
    NOISE,
    NOISE_PICTURES,
    Run,
    control_file,
    files_of,
)
from study.raw import Raw, Said, raw_path, write_raw

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgesafe.checkpoint.exit_model import ExitModel

CONFIGS = Path(__file__).resolve().parent / "configs"
_TRAINING, _JUDGING = ("edgesafe.align.train",), ("edgesafe.evaluate.evaluate",)
_ASKING = ("edgesafe.evaluate.answers:answer_suite", "edgesafe.checkpoint.exit_model")
_MAPPING = ("edgesafe.maps.fit",)
_CONTROLS = ("edgesafe.evaluate.controls",)
_KINDS = ("tests.study.other_maps", "edgesafe.maps.gather", "edgesafe.maps.moments", "edgesafe.maps.solve")
_REDUCING = ("tests.study.fewer",)
_BUNDLING = ("edgesafe_export.export", "edgesafe.certify.ask:ask_all", "edgesafe.runtime.session")
_TIMES = "trained.json"

Answered = Mapping[Exit | None, Mapping[str, str]]


@dataclass(frozen=True)
class Setup:
    """Where a study runs and on what; the digests are of the folders beside them.

    out: the folder of the raw answers. build: checkpoints, bundles and logs. trial: every training takes so many updates
    instead of the planned ones (0 = the plan's); its raw answers are not the study's. plan: which one of `PLANS`. folders:
    where the pictures of `FOLDERS` are.
    """

    out: Path
    build: Path
    model: Path
    model_digest: str
    data: Path
    data_digest: str
    suite: Path
    suite_digest: str
    threads: int = 1
    trial: int = 0
    plan: str = "objectives"
    folders: Mapping[str, Path] = field(default_factory=dict)


def make_setup(
    out: Path,
    build: Path,
    model: Path,
    data: Path,
    suite: Path,
    *,
    threads: int = 1,
    trial: int = 0,
    plan: str = "objectives",
    folders: Mapping[str, Path] | None = None,
) -> Setup:
    """A setup with its digests taken."""
    digests = [digest_folder(folder) for folder in (model, data)]
    asked = read_suite(suite, False).digest
    return Setup(out, build, model, digests[0], data, digests[1], suite, asked, threads, trial, plan, folders or {})


def has_own(run: Run) -> bool:
    """Whether a run makes a checkpoint of its own."""
    return bool(run.config or run.pictures) and run.how not in KINDS


def settings(setup: Setup, run: Run) -> Any:
    """The run's resolved AlignConfig; None where nothing is trained."""
    if not run.config:
        return None
    from edgesafe.align.config import read_config

    path = CONFIGS / f"{run.config}.toml"
    steps = setup.trial or run.steps
    config = read_config(path, data=str(setup.data), seed=run.seed, steps=steps, exits=run.exits or None)
    return replace(config, exit_map="linear") if run.pictures else config


def shown_settings(config: Any) -> dict[str, Any]:
    """The settings as JSON values, folders by their names: a record must not depend on where a machine keeps them."""
    if config is None:
        return {}
    from edgesafe.align.config import recorded

    shown: dict[str, Any] = json.loads(json.dumps(recorded(config)))
    return shown


def train_key(setup: Setup, run: Run) -> str:
    """Digest of all that a run's checkpoint depends on."""
    config = shown_settings(settings(setup, run))
    if not has_own(run):
        return setup.model_digest
    if run.pictures in FOLDERS:
        return digest([setup.model_digest, digest_folder(setup.folders[run.pictures]), code_digest(_MAPPING)])
    if not config:
        return digest([run.pictures, setup.model_digest, setup.data_digest, code_digest(_MAPPING)])
    trained = {k: v for k, v in config.items() if k not in ("data", "checkpoint_every")}
    code = [code_digest(_TRAINING, _JUDGING), *_reduction(run)]
    return digest([trained, setup.model_digest, setup.data_digest, *code])


def _reduction(run: Run) -> list[str]:
    """What a run's key has of its reduction; nothing where it takes the product's."""
    return [run.reduction, code_digest(_REDUCING)] if run.reduction else []


def run_key(setup: Setup, run: Run, plan: Mapping[str, Run]) -> str:
    """Digest of all that a run's raw answers depend on."""
    parent = plan[run.of] if run.of else run
    roots = _ASKING + {CONTROLS: _CONTROLS, BUNDLE: _BUNDLING, **dict.fromkeys(KINDS, _KINDS)}.get(run.how, ())
    stop = _JUDGING if run.how == CONTROLS else ()
    more = ([setup.data_digest, run.pictures] if run.how in KINDS else []) + ([run.asked] if run.asked else [])
    more += [*_reduction(run), *filter(None, [run.scheme])]
    return digest([run.name, train_key(setup, parent), run.how, setup.suite_digest, code_digest(roots, stop), *more])


def do(setup: Setup, run: Run, plan: Mapping[str, Run]) -> list[Path]:
    """Do one run; a checkpoint or an answer that is there with the same key is not made again. Returns its raw files' paths."""
    key = run_key(setup, run, plan)
    model, times = checkpoint(setup, plan[run.of] if run.of else run)
    if is_done(setup, run, key):
        return [raw_path(setup.out, name) for name in files_of(run)]
    suite = read_suite(setup.suite, verify=False)
    with _reduced(run):
        config, asked, views = _ask(setup, run, model, suite)
    shown = config or shown_settings(settings(setup, run))
    own = {} if run.of else times  # asking another run's model took no training
    shared: dict[str, Any] = {
        "key": key,
        "config": shown | ({"reduction": run.reduction} if run.reduction else {}),
        "model": asked,
        "suite": suite.digest,
        "reference": _reference(model),
        **{name: own.get(name) for name in ("seconds", "setup_seconds", "cpu_seconds", "tokens")},
        "machine": _machine(setup.threads),
    }
    raws = [Raw(run=name, said=_in_order(suite, said), **shared) for name, said in views.items()]
    return [write_raw(setup.out, raw) for raw in raws]


def _reduced(run: Run) -> AbstractContextManager[None]:
    """The run's reduction in the place of the product's, until the block ends."""
    if not run.reduction:
        return nullcontext()
    from study.fewer import reduced

    return reduced(run.reduction)


def is_done(setup: Setup, run: Run, key: str) -> bool:
    """Whether the run's raw answers are there with this key."""
    try:
        files = [json.loads(raw_path(setup.out, name).read_text(encoding="utf-8")) for name in files_of(run)]
        return all(file["key"] == key for file in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def has_checkpoint(setup: Setup, run: Run) -> bool:
    """Whether the run's checkpoint is there with the key that it must have now."""
    if not has_own(run):
        return True
    return (setup.build / run.name / "aligned").is_dir() and _times(setup, run).get("key") == train_key(setup, run)


def _times(setup: Setup, run: Run) -> dict[str, Any]:
    path = setup.build / run.name / _TIMES
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def checkpoint(setup: Setup, run: Run) -> tuple[Path, dict[str, Any]]:
    """The run's checkpoint folder and its times, trained now where it is not there; an interrupted training resumes.

    Raises:
        AlignError: the training failed.
    """
    if not has_own(run):
        return setup.model, {}
    folder, key, home = setup.build / run.name / "aligned", train_key(setup, run), setup.build / run.name
    if has_checkpoint(setup, run):
        return folder, _times(setup, run)
    partial, started = folder.with_name("aligned.partial"), home / "started"
    home.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    if not started.is_file() or started.read_text(encoding="utf-8") != key:
        shutil.rmtree(partial, ignore_errors=True)
    started.write_text(key, encoding="utf-8")
    times = {"key": key, **(_train(setup, run, folder, partial) if run.config else _map(setup, run, folder))}
    write_atomically(home / _TIMES, json.dumps(times).encode())
    return folder, times


def _map(setup: Setup, run: Run, folder: Path) -> dict[str, Any]:
    """Fit exit maps to the run's pictures and time it; nothing is trained."""
    from edgesafe.maps.fit import write_mapped

    pictures, limit = setup.data / "images", NOISE_PICTURES
    if run.pictures == NOISE:
        pictures = write_noise(setup.build / run.name / "pictures", NOISE_PICTURES)
    elif run.pictures in FOLDERS:
        pictures = cut_pictures(setup.folders[run.pictures], setup.build / run.name / "pictures", NOISE_PICTURES)
    else:
        limit = int(run.pictures)
    began, cpu = time.perf_counter(), time.process_time()
    write_mapped(setup.model, pictures, folder, limit=limit)
    wall, spent = time.perf_counter() - began, time.process_time() - cpu
    return {"seconds": 0.0, "setup_seconds": round(wall, 1), "cpu_seconds": round(spent, 1), "tokens": 0}


def write_noise(folder: Path, count: int) -> Path:
    """Pictures of uniform noise."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(folder / f"{i:04d}.png")
    return folder


def cut_pictures(folder: Path, to: Path, count: int) -> Path:
    """Squares cut out of a folder's pictures, so many whatever it holds, each between half and all of the short side."""
    from edgesafe.maps.gather import find_pictures

    to.mkdir(parents=True, exist_ok=True)
    files = find_pictures(folder, count)
    for i in range(count):
        rng, image = np.random.default_rng(i), open_picture(files[i % len(files)])
        side = round(min(image.size) * rng.uniform(0.5, 1.0))
        left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
        image.resize((96, 96), box=(left, top, left + side, top + side)).save(to / f"{i:04d}.png")
    return to


def _train(setup: Setup, run: Run, folder: Path, partial: Path) -> dict[str, Any]:
    """Train and time it. A resumed run's processor time is not known, its other times are put together from both parts."""
    from edgesafe.align.files import CHECKPOINT, METRICS, RECORD, done_updates
    from edgesafe.align.train import align

    resume = (partial / CHECKPOINT).is_file()
    start = done_updates(partial) if resume else 0
    began, cpu = time.perf_counter(), time.process_time()
    with _reduced(run):
        align(setup.model, settings(setup, run), folder, resume=resume)
    wall, spent = time.perf_counter() - began, time.process_time() - cpu
    lines = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    seconds = [float(line["seconds"]) for line in lines]
    return {
        "seconds": round(sum(seconds), 1),
        "setup_seconds": round(max(0.0, wall - sum(seconds[start:])), 1),
        "cpu_seconds": None if resume else round(spent, 1),
        "tokens": json.loads((folder / RECORD).read_text(encoding="utf-8")).get("tokens"),
    }


def weights_digest(model: Path) -> str:
    """Digest of a checkpoint's weights alone: its record and metrics say when it was trained, too."""
    return digest([[f.name, sha256_file(f)] for f in sorted(model.glob("*.safetensors"))])


def _ask(setup: Setup, run: Run, model: Path, suite: Suite) -> tuple[dict[str, Any], str, dict[str, Answered]]:
    """What was asked beyond the run's settings, the digest of what was asked, and the answers of each raw file."""
    if run.how == BUNDLE:
        config, asked, said = _through_bundle(setup, run, model, suite)
        return config, asked, {run.name: said}
    from edgesafe.checkpoint.exit_model import load
    from edgesafe.evaluate.answers import answer_suite

    llava = load(model)
    views: dict[str, Answered]
    exits = parse_exits(run.asked or "all", llava.n_blocks)
    if run.how in KINDS:
        return _through_maps(setup, run, llava, suite, exits)
    if run.how != CONTROLS:
        return {}, weights_digest(model), {run.name: answer_suite(llava, suite, exits)}
    from edgesafe.evaluate.controls import control_answers

    found = control_answers(llava, suite, exits)
    views = {control_file(run.name, c): {_exit(text): said for text, said in found[c].items()} for c in CONTROL_NAMES}
    return {"of": weights_digest(model)}, weights_digest(model), views


def fit_maps(setup: Setup, run: Run, llava: ExitModel, depths: Sequence[int]) -> dict[int, nn.Module]:
    """Maps of the run's kind, by depth, from the training rows' pictures."""
    from edgesafe.maps.gather import by_content, find_pictures
    from study.other_maps import fit_kind, picture_states

    files = by_content(find_pictures(setup.data / "images", int(run.pictures)))
    return fit_kind(run.how, picture_states(llava, list(files.values())), llava.reference.depth, depths)


def _through_maps(
    setup: Setup, run: Run, llava: ExitModel, suite: Suite, exits: Sequence[Exit]
) -> tuple[dict[str, Any], str, dict[str, Answered]]:
    """The untouched model's answers through maps of another kind, and the processor's time that fitting them took."""
    from edgesafe.evaluate.answers import answer_suite

    cpu = time.process_time()
    maps = fit_maps(setup, run, llava, [exit.depth for exit in exits])
    config = {"map": run.how, "fit_cpu_seconds": round(time.process_time() - cpu, 1)}

    def change(exit: Exit, states: Tensor) -> Tensor:
        mapped: Tensor = maps[exit.depth](states) if exit.depth in maps else states
        return mapped

    return config, weights_digest(setup.model), {run.name: answer_suite(llava, suite, exits, change=change)}


def _exit(text: str) -> Exit | None:
    """A control's exit; None for "any", where no exit takes part."""
    return None if text == "any" else Exit.parse(text)


def _in_order(suite: Suite, said: Answered) -> Said:
    return {exit: tuple(texts[row.id] for row in suite.rows) for exit, texts in said.items()}


def _through_bundle(setup: Setup, run: Run, model: Path, suite: Suite) -> tuple[dict[str, Any], str, Answered]:
    from edgesafe.certify.ask import ask_all
    from edgesafe.device import load_device
    from edgesafe.runtime.session import Session
    from edgesafe_export import export_bundle

    out = setup.build / run.name / "bundle"
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    named: dict[str, Any] = {"text_scheme": run.scheme, "accept_damage": True} if run.scheme else {}
    bundle = export_bundle(model, out, load_device(DEVICE), exits=run.asked or None, suite_dir=setup.suite, **named)
    session = Session.open(out, threads=setup.threads, allow_uncertified=True)
    config = {"of": weights_digest(model), "device": DEVICE, "quantization": dict(bundle.manifest.quantization)}
    return config, bundle.digest, ask_all(session, suite, suite.rows, bundle.manifest.ladder, "ask the bundle")


def _reference(model: Path) -> Exit:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return Exit(reference_depth(config["vision_config"]["num_hidden_layers"], config["vision_feature_layer"]))


def _machine(threads: int) -> dict[str, Any]:
    return {
        "cpu": machine_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "onnxruntime")},
    }
