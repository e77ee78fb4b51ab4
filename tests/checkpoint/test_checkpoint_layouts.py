"""Folders of every layout: align's loader and export's load what transformers loads, or both refuse with the same error.

The oracle is transformers' own from_pretrained over the same folder. Where files compete, they hold other weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from edgesafe.align.memory import read_headers
from edgesafe.checkpoint.exit_model import stored_dtype
from edgesafe.checkpoint.load import read_checkpoint
from edgesafe.checkpoint.recipe import load_recipes
from edgesafe.errors import EdgesafeError, InputError
from edgesafe_export import export as export_module
from edgesafe_export import export_bundle
from edgesafe_export.skeleton import open_sketch
from tiny import make_tiny_llava
from tiny_families import NAMES, make_tiny

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Names on disk, as transformers writes them; the model has its own.
UP = "language_model.model.layers.1.mlp.up_proj.weight"
EMBED, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
IN_MODEL = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.", "": "model."}


def _in_model(name: str) -> str:
    start = next(old for old in IN_MODEL if name.startswith(old))
    return IN_MODEL[start] + name.removeprefix(start)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights of the same shapes and names on disk, other numbers."""
    return load_file(make_tiny_llava(tmp_path_factory.mktemp("other") / "llava", seed=1) / SINGLE)


@pytest.fixture
def folder(tiny_llava, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_llava, tmp_path / "model"))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / SINGLE)


def _save(weights: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path, metadata={"format": "pt"})


def _set(folder: Path, **entries: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def _shard(folder: Path, weights: dict[str, torch.Tensor], index: str = INDEX) -> dict[str, str]:
    """Two shards, every other weight in the second; returns the index' weight_map."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {tensor: names[i % 2] for i, tensor in enumerate(sorted(weights))}
    for name in names:
        _save({t: weights[t] for t in where if where[t] == name}, folder / name)
    _write_index(folder, where, index)
    return where


def _write_index(folder: Path, where: object, name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def _only_shards(folder: Path) -> dict[str, str]:
    where = _shard(folder, _weights(folder))
    (folder / SINGLE).unlink()
    return where


# Layouts that transformers loads, and we do.


def whole(folder, other):
    pass


def sharded(folder, other):
    _only_shards(folder)


def one_file_and_shards(folder, other):
    _shard(folder, other)


def one_file_and_a_stale_index(folder, other):
    _write_index(folder, {EMBED: "model-00001-of-00007.safetensors"})


def one_file_and_an_index_that_is_none(folder, other):
    (folder / INDEX).write_text("[")


def one_file_and_pickles(folder, other):
    torch.save(other, folder / "pytorch_model.bin")


def shards_and_pickles(folder, other):
    _only_shards(folder)
    torch.save(other, folder / "pytorch_model.bin")


def other_files_beside(folder, other):
    _save(other, folder / "adapter_model.safetensors")  # without its config nobody reads it
    _save(other, folder / "a.safetensors")
    _save(other, folder / "model.fp16.safetensors")
    (folder / "training_args.bin").write_bytes(b"\x80")
    (folder / "model.gguf").write_bytes(b"GGUF")
    (folder / "checkpoint-5").mkdir()
    _save(other, folder / "checkpoint-5" / SINGLE)


def tensors_beside(folder, other):
    extra = {"some.other.weight": torch.ones(3, dtype=torch.int64), "lm_head.bias": torch.ones(288)}
    _save({**_weights(folder), **extra}, folder / SINGLE)


def named_by_the_config(folder, other):
    (folder / SINGLE).rename(folder / "mine.safetensors")
    _save(other, folder / SINGLE)
    _set(folder, transformers_weights="mine.safetensors")


def shards_named_by_the_config(folder, other):
    _shard(folder, _weights(folder), "mine.safetensors.index.json")
    _save(other, folder / SINGLE)
    _set(folder, transformers_weights="mine.safetensors.index.json")


def an_index_that_leaves_tensors_out(folder, other):
    where = _only_shards(folder)
    where.pop(UP)
    _write_index(folder, where)


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
    _only_shards(folder)
    _cached(folder)


def _as(dtype: torch.dtype) -> Callable:
    def change(folder, other):
        _save({n: w.to(dtype) for n, w in _weights(folder).items()}, folder / SINGLE)

    return change


def mixed_kinds(folder, other):
    _save({n: w.half() if "layers.0" in n else w.bfloat16() for n, w in _weights(folder).items()}, folder / SINGLE)


def names_of_the_model(folder, other):
    _save({_in_model(n): w for n, w in _weights(folder).items()}, folder / SINGLE)


LOADED = {f.__name__: f for f in (
    whole, sharded, one_file_and_shards, one_file_and_a_stale_index, one_file_and_an_index_that_is_none, one_file_and_pickles,
    shards_and_pickles, other_files_beside, tensors_beside, named_by_the_config, shards_named_by_the_config,
    an_index_that_leaves_tensors_out, a_snapshot_of_links, a_snapshot_of_linked_shards, mixed_kinds, names_of_the_model,
)} | {str(d): _as(d) for d in (torch.float16, torch.bfloat16, torch.float64)}  # fmt: skip


def _transformers(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return dict(model.named_parameters())


def _align(folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(folder, tuple(load_recipes()))[1].named_parameters())


def _export(folder: Path) -> dict[str, torch.Tensor]:
    sketch = open_sketch(folder)
    return {name: torch.from_numpy(w) for name, w in sketch.load(list(sketch.stored)).items()}


def _agree(folder: Path) -> None:
    want = _transformers(folder)
    for load in (_align, _export):
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
    weights = _weights(folder)
    tied = weights.pop(EMBED)
    _save({**weights, **{name: tied.clone() for name in stored}}, folder / SINGLE)
    _agree(folder)


def test_other_weights_that_compete_are_other_weights(tiny_llava, other):
    assert not torch.equal(_weights(tiny_llava)[UP], other[UP])


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
        _save({"x": torch.ones(10**6, dtype=torch.float64)}, folder / name)
    _save({n: w.bfloat16() for n, w in other.items()}, folder / "model-00001-of-00001.safetensors")
    _write_index(folder, dict.fromkeys(other, "model-00001-of-00001.safetensors"))
    assert stored_dtype(folder) == torch.float32
    shapes, size = read_headers(folder)
    assert shapes.keys() == other.keys() and size == (folder / SINGLE).stat().st_size


def test_a_first_tensor_that_holds_no_numbers_gives_no_dtype(folder):
    ids = {"a.position_ids": torch.arange(5)}  # as CLIP's checkpoints of old have it
    _save({**ids, **{n: w.half() for n, w in _weights(folder).items()}}, folder / SINGLE)
    assert stored_dtype(folder) == torch.float16


# Layouts that both refuse.


def adapter_beside(folder, other):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))
    _save({"x": torch.ones(1)}, folder / "adapter_model.safetensors")


def adapter_alone(folder, other):
    adapter_beside(folder, other)
    (folder / SINGLE).unlink()
    (folder / "config.json").unlink()


def adapter_with_a_config(folder, other):
    adapter_beside(folder, other)
    (folder / SINGLE).unlink()


def pickled(folder, other):
    torch.save(other, folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


def pickled_shards(folder, other):
    (folder / SINGLE).unlink()
    torch.save(other, folder / "pytorch_model-00001-of-00001.bin")
    _write_index(folder, dict.fromkeys(other, "pytorch_model-00001-of-00001.bin"), "pytorch_model.bin.index.json")


def _quantized(method: str, part: str = "") -> Callable:
    def change(folder, other):
        entry = {"quantization_config": {"quant_method": method, "bits": 4}}
        config = json.loads((folder / "config.json").read_text())
        _set(folder, **({part: {**config[part], **entry}} if part else entry))

    return change


def gguf(folder, other):
    (folder / SINGLE).rename(folder / "llava-Q4_K_M.gguf")


def gguf_alone(folder, other):
    gguf(folder, other)
    (folder / "config.json").unlink()


def _index_of(where: object) -> Callable:
    def change(folder, other):
        names = _only_shards(folder)
        _write_index(folder, where if not isinstance(where, str) else {**names, UP: where})

    return change


def outside_by_the_config(folder, other):
    (folder / SINGLE).rename(folder.parent / "x.safetensors")
    _set(folder, transformers_weights="../x.safetensors")


def an_index_without_metadata(folder, other):
    (folder / INDEX).write_text(json.dumps({"weight_map": _only_shards(folder)}))


def an_index_that_is_no_json(folder, other):
    _only_shards(folder)
    (folder / INDEX).write_text("{")


def a_missing_shard(folder, other):
    (folder / _only_shards(folder)[UP]).unlink()


def a_tensor_in_the_wrong_shard(folder, other):
    where = _only_shards(folder)
    where[UP] = next(name for name in where.values() if name != where[UP])
    _write_index(folder, where)


def a_tensor_in_two_shards(folder, other):
    where = _only_shards(folder)
    path = folder / next(name for name in where.values() if name != where[UP])
    _save({**load_file(path), UP: other[UP]}, path)


def two_names_of_a_weight(folder, other):
    _save({**_weights(folder), _in_model(UP): other[UP]}, folder / SINGLE)


def _with(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable:
    def changed(folder, other):
        weights = _weights(folder)
        weights[UP] = change(weights[UP])
        _save({n: w for n, w in weights.items() if w is not None}, folder / SINGLE)

    return changed


def not_finite(folder, other):
    weights = _weights(folder)
    weights[UP][3, 2:4] = float("nan")
    _save(weights, folder / SINGLE)


def links_that_lead_nowhere(folder, other):
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("../blobs/gone")


def shards_that_are_links_to_nowhere(folder, other):
    path = folder / _only_shards(folder)[UP]
    path.unlink()
    path.symlink_to("../blobs/gone")


def a_pointer_of_git_lfs(folder, other):
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def cut_short(folder, other):
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-9])


def shards_without_an_index(folder, other):
    _only_shards(folder)
    (folder / INDEX).unlink()


def spread_over_processes(folder, other):
    _save(other, folder / "shard-00000-model-00001-of-00001.safetensors")


def no_weights(folder, other):
    (folder / SINGLE).unlink()


REFUSED = {
    adapter_beside: "adapter lies beside the weights.*merge it first.*merge_and_unload",
    adapter_alone: "adapter for a/b, not a whole checkpoint.*merge it first.*a/b as BASE",
    adapter_with_a_config: "adapter for a/b, not a whole checkpoint",
    pickled: "pickled.*pytorch_model.bin.*convert them",
    pickled_shards: "pickled.*pytorch_model.bin.index.json.*convert them",
    gguf: "GGUF.*llava-Q4_K_M.gguf.*the Hugging Face checkpoint that it was made from",
    gguf_alone: "GGUF.*llava-Q4_K_M.gguf",
    outside_by_the_config: "config.json|names the file of weights '../x.safetensors'",
    an_index_without_metadata: "no metadata.*index.json",
    an_index_that_is_no_json: "no JSON.*index.json",
    a_missing_shard: "a file of weights is missing.*model-0000",
    a_tensor_in_the_wrong_shard: f"the shard lacks the tensor {UP}.*model-0000",
    a_tensor_in_two_shards: f"the tensor {UP} is stored twice.*00001-of.*00002-of",
    two_names_of_a_weight: f"weight {_in_model(UP)} is stored twice, under an old name",
    not_finite: f"weight {_in_model(UP)} is not finite: 2 of its \\d+ numbers",
    links_that_lead_nowhere: "a link to them leads nowhere",
    shards_that_are_links_to_nowhere: "is a link that leads nowhere.*model-0000",
    a_pointer_of_git_lfs: "Git LFS.*git lfs pull",
    cut_short: "9 bytes before",
    shards_without_an_index: "no weights here; model-00001-of-00002.safetensors is not named by an index",
    spread_over_processes: "spread over processes",
    no_weights: "no weights here .*model.safetensors",
}
REFUSED = {change.__name__: (change, match) for change, match in REFUSED.items()} | {
    **{m: (_quantized(m), rf"quantized \({m}\).*that it was quantized from") for m in ("awq", "gptq", "bitsandbytes", "fp8")},
    "a part is quantized": (_quantized("awq", "text_config"), r"quantized \(awq\)"),
    **{
        f"index: {name}": (_index_of(name), "names the file of weights")
        for name in ("../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..", "", ".", "a\\b.safetensors")
    },
    "index of numbers": (_index_of({UP: 3}), "names the file of weights 3"),
    "index of nothing": (_index_of({}), "no weight_map"),
    "index of a list": (_index_of([1]), "no weight_map"),
    "a weight: int8": (_with(lambda w: w.to(torch.int8)), f"weight {_in_model(UP)} is of type I8.*before it was quantized"),
    "a weight: fp8": (_with(lambda w: w.to(torch.float8_e4m3fn)), f"weight {_in_model(UP)} is of type F8_E4M3"),
    "a weight: complex": (_with(lambda w: w.to(torch.complex64)), f"weight {_in_model(UP)} is of type C64"),
    "a weight: missing": (_with(lambda w: None), f"1 weights are missing, e.g. {_in_model(UP)}"),
    "a weight: another shape": (_with(lambda w: w[:5]), "config.json contradicts the weights.*stored as"),
}


def _refusal(load: Callable[[], object]) -> EdgesafeError:
    with pytest.raises(EdgesafeError) as caught:
        load()
    return caught.value


@pytest.mark.parametrize("layout", REFUSED)
def test_what_is_refused_is_refused_alike(folder, other, tmp_path, monkeypatch, layout):
    change, match = REFUSED[layout]
    monkeypatch.setattr(export_module, "trace_pieces", None)  # whatever is refused is refused before anything is traced
    change(folder, other)
    before = sorted(folder.iterdir())
    errors = [_refusal(lambda: _align(folder)), _refusal(lambda: export_bundle(folder, tmp_path / "out", _host(), exits="2"))]
    assert str(errors[0]) == str(errors[1]) and type(errors[0]) is type(errors[1]) is InputError
    assert errors[0].where and errors[0].expected and errors[0].todo
    with pytest.raises(InputError, match=match):
        raise errors[0]
    assert sorted(folder.iterdir()) == before and not (tmp_path / "out").exists()


def _host():
    from edgesafe.device import load_device

    return load_device("host")


def test_tied_weights_that_differ_are_refused_alike(tmp_path):
    # transformers leaves these apart, with a warning: an export that ties them would ship another head.
    folder = make_tiny("llava_onevision", tmp_path / "m", tied=True)
    weights = _weights(folder)
    _save({**weights, HEAD: weights[EMBED] + 1}, folder / SINGLE)
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)
    errors = [_refusal(lambda: _align(folder)), _refusal(lambda: open_sketch(folder))]
    assert str(errors[0]) == str(errors[1]) and "stored numbers differ" in str(errors[0]) and "false" in errors[0].todo
