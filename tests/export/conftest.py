"""One traced checkpoint that the export tests share; a test that changes a part makes its own dictionary of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgesafe.format.exits import Exit, parse_exits


@pytest.fixture(scope="package", autouse=True)
def traced_once():
    """Exports of equal configs share their traced pieces: they hold no weights, and tracing is most of these tests' time."""
    from edgesafe_export import export

    real, kept = export.trace_pieces, {}

    def trace_pieces(sketch, ladder, layout, *, text=True):
        config = {k: v for k, v in sketch.family.model.config.to_dict().items() if k != "_name_or_path"}
        maps = {n: w.shape for n, w in sketch.family.model.named_parameters() if n.startswith("exit_maps.")}
        after_norm = sketch.family.recipe.map_after_norm
        parts = [config, maps, after_norm, sketch.layers, list(map(str, ladder)), layout, text]
        key = json.dumps(parts, sort_keys=True, default=str)
        if key not in kept:
            kept[key] = real(sketch, ladder, layout, text=text)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "trace_pieces", trace_pieces)
        yield


@pytest.fixture(scope="package")
def job(tiny_llava: Path):
    """The plan of an export of the tiny checkpoint: exits 1 to 3 of 4 blocks, no suite."""
    from edgesafe.device import load_device
    from edgesafe_export.export import Job
    from edgesafe_export.family import load_family

    ladder = parse_exits("1-3", 4)
    return Job(load_family(tiny_llava), tiny_llava, "tiny", "0" * 64, load_device("host"), "chain", ladder, None, {}, 0)


@pytest.fixture(scope="package")
def parts(job):
    """Its float graphs."""
    from edgesafe_export.export import trace

    return trace(job)


@pytest.fixture(scope="package")
def cases(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest):
    """A `Case` of a family by its name, each made once: exits 1 to 3."""
    from edgesafe.device import load_device
    from edgesafe_export.export import Job, trace
    from edgesafe_export.family import load_family
    from tiny_families import BLOCKS, Case, make_tiny

    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made and name == "llava":
            made[name] = Case(request.getfixturevalue("job"), request.getfixturevalue("parts"))
        elif name not in made:
            folder = make_tiny(name, tmp_path_factory.mktemp("tiny") / name.replace(" ", "-"))
            ladder = parse_exits("all", BLOCKS)
            job = Job(load_family(folder), folder, name, "0" * 64, load_device("host"), "chain", ladder, None, {}, 0)
            made[name] = Case(job, trace(job))
        return made[name]

    return case


@pytest.fixture(scope="package")
def standalone_parts(job):
    """The same exits as one whole graph each."""
    from dataclasses import replace

    from edgesafe_export.export import trace

    return trace(replace(job, layout="standalone"))


@pytest.fixture(scope="package")
def trained_job(tmp_path_factory: pytest.TempPathFactory):
    """The plan of an export of the reference model: the reference and half its depth, probed with pictures of its own world.

    Random weights sit near ties, and so does a trained model on pictures that it knows nothing of.
    """
    import edgesafe
    from edgesafe.device import load_device
    from edgesafe.format.suite import read_suite
    from edgesafe.reference.data import write_split
    from edgesafe_export.export import Job
    from edgesafe_export.family import load_family

    folder = Path(edgesafe.__file__).parent / "reference" / "weights"
    write_split(suite := tmp_path_factory.mktemp("trained") / "suite", "val", scale=0.03)
    family = load_family(folder)
    ladder = (Exit(family.geometry.reference_depth // 2), family.geometry.reference)
    return Job(family, folder, "reference", "0" * 64, load_device("host"), "chain", ladder, read_suite(suite), {}, 0)


@pytest.fixture(scope="package")
def trained_parts(trained_job):
    """Its float graphs."""
    from edgesafe_export.export import trace

    return trace(trained_job)


@pytest.fixture(scope="package")
def tiny_pieces(tiny_llava: Path):
    """The pieces of an export of the tiny checkpoint, exits 1 to 3, for tests that need no trace of their own."""
    from edgesafe_export.skeleton import open_sketch
    from edgesafe_export.stream import trace_pieces

    return trace_pieces(open_sketch(tiny_llava), parse_exits("1-3", 4), "chain")


@pytest.fixture(scope="package")
def deep(tmp_path_factory) -> Path:
    """A tiny checkpoint of five decoder layers, in bfloat16, in one file."""
    from tiny import make_tiny_llava

    return make_tiny_llava(tmp_path_factory.mktemp("deep") / "llava", layers=5, dtype="bfloat16")


@pytest.fixture(scope="package")
def sharded(deep, tmp_path_factory) -> Path:
    """The same weights in many shards."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = tmp_path_factory.mktemp("sharded") / "llava"
    model = LlavaForConditionalGeneration.from_pretrained(deep, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="150KB")
    AutoProcessor.from_pretrained(deep).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 5
    return folder
