"""Folders that align's loader and export's both refuse: with the same error, before a weight is read or a graph traced."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from checkpoint_layouts import (
    EMBED,
    HEAD,
    INDEX,
    SINGLE,
    UP,
    as_aligned,
    in_model,
    only_shards,
    save,
    set_config,
    weights_of,
    write_index,
)
from edgesafe.errors import EdgesafeError, InputError
from edgesafe_export import export as export_module
from edgesafe_export import export_bundle
from edgesafe_export.skeleton import open_sketch
from tiny_families import make_tiny


def adapter_beside(folder, other):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))
    save({"x": torch.ones(1)}, folder / "adapter_model.safetensors")


def adapter_alone(folder, other):
    adapter_beside(folder, other)
    (folder / SINGLE).unlink()
    (folder / "config.json").unlink()


def adapter_with_a_config(folder, other):
    adapter_beside(folder, other)
    (folder / SINGLE).unlink()


def an_adapter_s_weights_alone(folder, other):
    (folder / SINGLE).rename(folder / "adapter_model.safetensors")


def an_adapter_s_pickle_alone(folder, other):
    (folder / SINGLE).unlink()
    torch.save(other, folder / "adapter_model.bin")


def _packed(end: str) -> Callable:
    """As quantizers older than transformers' `quantization_config` left it: config.json says nothing."""

    def change(folder, other):
        weights = weights_of(folder)
        del weights[UP]
        save({**weights, UP.removesuffix(".weight") + end: torch.zeros(4, 4, dtype=torch.int32)}, folder / SINGLE)

    return change


def pickled(folder, other):
    torch.save(other, folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


def pickled_shards(folder, other):
    (folder / SINGLE).unlink()
    torch.save(other, folder / "pytorch_model-00001-of-00001.bin")
    write_index(folder, dict.fromkeys(other, "pytorch_model-00001-of-00001.bin"), "pytorch_model.bin.index.json")


def _quantized(method: str, part: str = "") -> Callable:
    def change(folder, other):
        entry = {"quantization_config": {"quant_method": method, "bits": 4}}
        config = json.loads((folder / "config.json").read_text())
        set_config(folder, **({part: {**config[part], **entry}} if part else entry))

    return change


def gguf(folder, other):
    (folder / SINGLE).rename(folder / "llava-Q4_K_M.gguf")


def gguf_alone(folder, other):
    gguf(folder, other)
    (folder / "config.json").unlink()


def _index_of(where: object) -> Callable:
    def change(folder, other):
        names = only_shards(folder)
        write_index(folder, where if not isinstance(where, str) else {**names, UP: where})

    return change


def outside_by_the_config(folder, other):
    (folder / SINGLE).rename(folder.parent / "x.safetensors")
    set_config(folder, transformers_weights="../x.safetensors")


def an_index_without_metadata(folder, other):
    (folder / INDEX).write_text(json.dumps({"weight_map": only_shards(folder)}))


def an_index_that_is_no_json(folder, other):
    only_shards(folder)
    (folder / INDEX).write_text("{")


def a_missing_shard(folder, other):
    (folder / only_shards(folder)[UP]).unlink()


def a_tensor_that_the_index_alone_has(folder, other):
    path = folder / only_shards(folder)[UP]
    save({name: weight for name, weight in load_file(path).items() if name != UP}, path)


def a_tensor_in_two_shards(folder, other):
    where = only_shards(folder)
    path = folder / next(name for name in where.values() if name != where[UP])
    save({**load_file(path), UP: other[UP]}, path)


def two_names_of_a_weight(folder, other):
    save({**weights_of(folder), in_model(UP): other[UP]}, folder / SINGLE)


def _with(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable:
    def changed(folder, other):
        weights = weights_of(folder)
        weights[UP] = change(weights[UP])
        save({n: w for n, w in weights.items() if w is not None}, folder / SINGLE)

    return changed


def not_finite(folder, other):
    weights = weights_of(folder)
    weights[UP][3, 2:4] = float("nan")
    save(weights, folder / SINGLE)


def links_that_lead_nowhere(folder, other):
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("../blobs/gone")


def shards_that_are_links_to_nowhere(folder, other):
    path = folder / only_shards(folder)[UP]
    path.unlink()
    path.symlink_to("../blobs/gone")


def a_pointer_of_git_lfs(folder, other):
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def cut_short(folder, other):
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-9])


def shards_without_an_index(folder, other):
    only_shards(folder)
    (folder / INDEX).unlink()


def spread_over_processes(folder, other):
    save(other, folder / "shard-00000-model-00001-of-00001.safetensors")


def no_weights(folder, other):
    (folder / SINGLE).unlink()


REFUSED = {
    adapter_beside: "adapter lies beside the weights.*merge it first.*merge_and_unload",
    adapter_alone: "adapter for a/b, not a whole checkpoint.*merge it first.*a/b as BASE",
    adapter_with_a_config: "adapter for a/b, not a whole checkpoint",
    an_adapter_s_weights_alone: "adapter's weights, without its adapter_config.json.*adapter_model.safetensors.*base model",
    an_adapter_s_pickle_alone: "adapter's weights, without its adapter_config.json.*adapter_model.bin",
    pickled: "pickled.*pytorch_model.bin.*convert them",
    pickled_shards: "pickled.*pytorch_model.bin.index.json.*convert them",
    gguf: "GGUF.*llava-Q4_K_M.gguf.*the Hugging Face checkpoint that it was made from",
    gguf_alone: "GGUF.*llava-Q4_K_M.gguf",
    outside_by_the_config: "config.json|names the file of weights '../x.safetensors'",
    an_index_without_metadata: "no metadata.*index.json",
    an_index_that_is_no_json: "not JSON.*index.json",
    a_missing_shard: "a file of weights is missing.*model-0000",
    a_tensor_that_the_index_alone_has: f"1 weights are missing, e.g. {in_model(UP)}",
    a_tensor_in_two_shards: f"the tensor {UP} is stored twice.*00001-of.*00002-of",
    two_names_of_a_weight: f"weight {in_model(UP)} is stored twice, under an old name",
    not_finite: f"weight {in_model(UP)} is not finite: 2 of its \\d+ numbers",
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
    **{
        f"packed as{end}": (_packed(end), rf"quantized \(it holds .*{end} and no .*that it was quantized from")
        for end in (".qweight", ".weight_packed", ".W_q")
    },
    "a part is quantized": (_quantized("awq", "text_config"), r"quantized \(awq\)"),
    **{
        f"index: {name}": (_index_of(name), "names the file of weights")
        for name in ("../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..", "", ".", "a\\b.safetensors")
    },
    "index of numbers": (_index_of({UP: 3}), "names the file of weights 3"),
    "index of nothing": (_index_of({}), "no weight_map"),
    "index of a list": (_index_of([1]), "no weight_map"),
    "a weight: int8": (_with(lambda w: w.to(torch.int8)), f"weight {in_model(UP)} is of type I8.*before it was quantized"),
    "a weight: fp8": (_with(lambda w: w.to(torch.float8_e4m3fn)), f"weight {in_model(UP)} is of type F8_E4M3"),
    "a weight: complex": (_with(lambda w: w.to(torch.complex64)), f"weight {in_model(UP)} is of type C64"),
    "a weight: missing": (_with(lambda w: None), f"1 weights are missing, e.g. {in_model(UP)}"),
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
    errors = [
        _refusal(lambda: as_aligned(folder)),
        _refusal(lambda: export_bundle(folder, tmp_path / "out", _host(), exits="2")),
    ]
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
    weights = weights_of(folder)
    save({**weights, HEAD: weights[EMBED] + 1}, folder / SINGLE)
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)
    errors = [_refusal(lambda: as_aligned(folder)), _refusal(lambda: open_sketch(folder))]
    assert str(errors[0]) == str(errors[1]) and "stored numbers differ" in str(errors[0]) and "false" in errors[0].todo
