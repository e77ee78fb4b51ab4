"""Folders of every layout that transformers loads: align's loader and export's hold the same weights.

The oracle is transformers' own from_pretrained over the same folder. Where files compete, they hold other weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from checkpoint_layouts import (
    EMBED,
    HEAD,
    INDEX,
    SINGLE,
    UP,
    as_aligned,
    as_exported,
    in_model,
    only_shards,
    save,
    set_config,
    shard,
    weights_of,
    write_index,
)
from edgesafe.align.memory import read_headers
from edgesafe.checkpoint.exit_model import stored_dtype
from edgesafe_export import export as export_module
from edgesafe_export import export_bundle
from tiny_families import NAMES, make_tiny

# Layouts that transformers loads, and we do.


def whole(folder, other):
    pass


def sharded(folder, other):
    only_shards(folder)


def one_file_and_shards(folder, other):
    shard(folder, other)


def one_file_and_a_stale_index(folder, other):
    write_index(folder, {EMBED: "model-00001-of-00007.safetensors"})


def one_file_and_an_index_that_is_none(folder, other):
    (folder / INDEX).write_text("[")


def one_file_and_pickles(folder, other):
    torch.save(other, folder / "pytorch_model.bin")


def shards_and_pickles(folder, other):
    only_shards(folder)
    torch.save(other, folder / "pytorch_model.bin")


def other_files_beside(folder, other):
    save(other, folder / "adapter_model.safetensors")  # without its config nobody reads it
    save(other, folder / "a.safetensors")
    save(other, folder / "model.fp16.safetensors")
    (folder / "training_args.bin").write_bytes(b"\x80")
    (folder / "model.gguf").write_bytes(b"GGUF")
    (folder / "checkpoint-5").mkdir()
    save(other, folder / "checkpoint-5" / SINGLE)


def tensors_beside(folder, other):
    extra = {"some.other.weight": torch.ones(3, dtype=torch.int64), "lm_head.bias": torch.ones(288)}
    save({**weights_of(folder), **extra}, folder / SINGLE)


def named_by_the_config(folder, other):
    (folder / SINGLE).rename(folder / "mine.safetensors")
    save(other, folder / SINGLE)
    set_config(folder, transformers_weights="mine.safetensors")


def shards_named_by_the_config(folder, other):
    shard(folder, weights_of(folder), "mine.safetensors.index.json")
    save(other, folder / SINGLE)
    set_config(folder, transformers_weights="mine.safetensors.index.json")


def an_index_that_leaves_tensors_out(folder, other):
    where = only_shards(folder)
    where.pop(UP)
    write_index(folder, where)


def an_index_that_names_the_wrong_shard(folder, other):
    where = only_shards(folder)
    where[UP] = next(name for name in where.values() if name != where[UP])
    write_index(folder, where)


def an_index_with_a_tensor_that_is_gone(folder, other):
    where = only_shards(folder)
    write_index(folder, {**where, UP.replace("layers.1", "layers.7"): where[UP]})


def _cached(folder: Path) -> None:
    """As the hub's cache has it: a snapshot of links into a folder of blobs."""
    blobs = folder.with_name("blobs")
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{i:040d}")
        path.symlink_to(Path("..") / "blobs" / f"{i:040d}")


def a_snapshot_of_links(folder, other):
    _cached(folder)


def a_snapshot_of_linked_shards(folder, other):
    only_shards(folder)
    _cached(folder)


def _as(dtype: torch.dtype) -> Callable:
    def change(folder, other):
        save({n: w.to(dtype) for n, w in weights_of(folder).items()}, folder / SINGLE)

    return change


def mixed_kinds(folder, other):
    save({n: w.half() if "layers.0" in n else w.bfloat16() for n, w in weights_of(folder).items()}, folder / SINGLE)


def names_of_the_model(folder, other):
    save({in_model(n): w for n, w in weights_of(folder).items()}, folder / SINGLE)


LOADED = {f.__name__: f for f in (
    whole, sharded, one_file_and_shards, one_file_and_a_stale_index, one_file_and_an_index_that_is_none, one_file_and_pickles,
    shards_and_pickles, other_files_beside, tensors_beside, named_by_the_config, shards_named_by_the_config,
    an_index_that_leaves_tensors_out,
    an_index_that_names_the_wrong_shard, an_index_with_a_tensor_that_is_gone,
    a_snapshot_of_links, a_snapshot_of_linked_shards, mixed_kinds, names_of_the_model,
)} | {str(d): _as(d) for d in (torch.float16, torch.bfloat16, torch.float64)}  # fmt: skip


def _transformers(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return dict(model.named_parameters())


def _agree(folder: Path) -> None:
    want = _transformers(folder)
    for load in (as_aligned, as_exported):
        got = load(folder)
        assert got.keys() == want.keys()
        wrong = [name for name in want if not torch.equal(got[name], want[name])]
        assert not wrong, (load.__name__, wrong)


@pytest.mark.parametrize("layout", LOADED)
def test_what_transformers_loads_is_what_is_aligned_and_exported(folder, other, layout):
    LOADED[layout](folder, other)
    _agree(folder)


@pytest.mark.parametrize("name", NAMES)
def test_every_family(tmp_path, name):
    _agree(make_tiny(name, tmp_path / "m"))


@pytest.mark.parametrize("stored", [(EMBED,), (HEAD,), (EMBED, HEAD)], ids=["first", "second", "both"])
def test_tied_weights_by_either_name_or_both(tmp_path, stored):
    folder = make_tiny("llava_onevision", tmp_path / "m", tied=True)
    weights = weights_of(folder)
    tied = weights.pop(EMBED)
    save({**weights, **{name: tied.clone() for name in stored}}, folder / SINGLE)
    _agree(folder)


def test_other_weights_that_compete_are_other_weights(tiny_llava, other):
    assert not torch.equal(weights_of(tiny_llava)[UP], other[UP])


def test_a_large_export_ships_the_weights_that_transformers_loads(folder, other, tiny_llava, tmp_path, monkeypatch):
    from edgesafe.device import load_device

    monkeypatch.setattr(export_module, "WHOLE_WEIGHTS", 0)
    one_file_and_shards(folder, other)
    options = {"exits": "2", "vision_scheme": "fp32", "text_scheme": "fp32"}
    made = [export_bundle(f, tmp_path / f"out-{i}", load_device("host"), **options) for i, f in enumerate((tiny_llava, folder))]
    graphs = [{path: spec.sha256 for path, spec in b.manifest.files.items() if "onnx" in path} for b in made]
    assert graphs[0] == graphs[1] and graphs[0]


# The same files, seen by what else reads them.


def test_memory_and_the_stored_dtype_are_of_the_weights_alone(folder, other):
    for name in ("a.safetensors", "adapter_model.safetensors"):
        save({"x": torch.ones(10**6, dtype=torch.float64)}, folder / name)
    save({n: w.bfloat16() for n, w in other.items()}, folder / "model-00001-of-00001.safetensors")
    write_index(folder, dict.fromkeys(other, "model-00001-of-00001.safetensors"))
    assert stored_dtype(folder) == torch.float32
    shapes, size = read_headers(folder)
    assert shapes.keys() == other.keys() and size == (folder / SINGLE).stat().st_size


def test_a_first_tensor_that_holds_no_numbers_gives_no_dtype(folder):
    ids = {"a.position_ids": torch.arange(5)}  # as CLIP's checkpoints of old have it
    save({**ids, **{n: w.half() for n, w in weights_of(folder).items()}}, folder / SINGLE)
    assert stored_dtype(folder) == torch.float16
