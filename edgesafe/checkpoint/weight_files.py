"""Which files of a checkpoint folder are its weights: transformers' rule, once, for align, evaluate and export (tier 0).

1. the file that config.json names as `transformers_weights`;
2. model.safetensors;
3. the shards of model.safetensors.index.json.

Source: transformers 5.23, `modeling_utils._get_resolved_checkpoint_files` and `utils.hub.get_checkpoint_shard_files`.
Differs: what transformers would merge, unpickle or dequantize on the way is refused, and the error says what to do instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgesafe.errors import InputError
from edgesafe.format.targets import check_name

CONFIG, ADAPTER = "config.json", "adapter_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Of a checkpoint's files those that end so belong to it beside its weights: config, tokenizer, processor, chat template.
BESIDE = (".json", ".jinja", ".model", ".txt")
MAPS = "exit_maps.safetensors"  # edgesafe's own, beside the weights
DAMAGED = "use an intact Hugging Face checkpoint folder: download it again"
_WHOLE = "config.json and model.safetensors, or its shards with model.safetensors.index.json"
_LOAD, _PROCESSOR = "AutoModelForImageTextToText.from_pretrained(BASE)", "AutoProcessor"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# What save_pretrained writes of a model that is spread over processes; transformers takes it before all others.
_SPREAD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def read_raw_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json as it lies on disk, of a folder that holds whole weights.

    Raises:
        InputError: no such folder or one that is not spelled in UTF-8, no config.json or a damaged one, or weights that are an
            adapter's or quantized.
    """
    check_name(folder)  # tokenizers takes UTF-8 alone
    if not folder.is_dir():
        raise _no_folder(folder)
    refuse_adapter(folder)
    path = folder / CONFIG
    if not path.is_file():
        if names := _with_suffix(folder, (".gguf",)):
            raise _gguf(folder / names[0])
        what = "a link that leads nowhere" if path.is_symlink() else "missing"
        raise InputError(
            f"no checkpoint here: {CONFIG} is {what}", where=str(folder), expected=f"a folder with {_WHOLE}", todo=DAMAGED
        )
    config = read_object(path)
    if not isinstance(config.get("model_type"), str):
        raise InputError("config.json names no model_type", where=str(path), expected='a family, such as "llava"', todo=DAMAGED)
    _refuse_quantized(path, config)
    return config


def weight_files(folder: Path, has: Callable[[Path], bool] = Path.is_file) -> tuple[Path, ...]:
    """The files that hold a checkpoint's weights, in the order in which transformers reads them.

    Of an index only the files' names count: which tensors they hold, they say themselves.

    Args:
        folder: the checkpoint.
        has: whether there is such a file.

    Raises:
        InputError: no weights that can be read, an index that can't be used, or weights that are an adapter's or quantized.
    """
    if not folder.is_dir():
        raise _no_folder(folder)
    refuse_adapter(folder)
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    _refuse_quantized(folder / CONFIG, config)
    if any(_SPREAD.fullmatch(path.name) for path in folder.iterdir()):
        raise InputError(
            "the weights are spread over processes",
            where=str(folder),
            expected=_WHOLE,
            todo="load it where it was trained and save it from one process: model.save_pretrained(OUT)",
        )
    named = config.get("transformers_weights")
    if named is not None:
        _check_name(named, folder / CONFIG)
        if not named.endswith((".safetensors", ".safetensors.index.json")):
            raise _bad_index(folder / CONFIG, f"transformers_weights names {named!r}")
        return _shards(folder, named) if named.endswith(".json") else (folder / named,)
    if has(folder / SINGLE):
        return (folder / SINGLE,)
    if has(folder / INDEX):
        return _shards(folder, INDEX)
    raise _no_weights(folder, has)


def refuse_adapter(folder: Path, load: str = _LOAD, processor: str = _PROCESSOR) -> None:
    """Refuse a folder with an adapter: transformers would put it into the weights beside it, or into its base model's.

    Args:
        folder: the checkpoint.
        load: how transformers loads the base model BASE, for the error.
        processor: transformers' class of what goes with it.

    Raises:
        InputError: the folder has an adapter_config.json.
    """
    path = folder / ADAPTER
    if not path.is_file():
        return
    merge = f"PeftModel.from_pretrained({load}, ADAPTER).merge_and_unload().save_pretrained(OUT)"
    whole = any((folder / name).is_file() for name in (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"))
    if whole and (folder / CONFIG).is_file():
        raise InputError(
            "an adapter lies beside the weights, and transformers would apply it to them",
            where=str(path),
            expected="weights with nothing to add to them",
            todo=f"merge it first: move adapter_config.json and adapter_model.* to a folder ADAPTER, then {merge} with this "
            f"folder as BASE, and {_saved(processor)}; or delete them if the weights are merged already",
        )
    base = read_object(path).get("base_model_name_or_path")
    raise InputError(
        f"this is an adapter for {base or 'a base model that it does not name'}, not a whole checkpoint",
        where=str(path),
        expected=f"a folder with {_WHOLE}",
        todo=f"merge it first: {merge} with {base or 'its base model'} as BASE and this folder as ADAPTER, "
        f"and {_saved(processor)} of the base model",
    )


def _saved(processor: str) -> str:
    return f"{processor}.from_pretrained(DIR).save_pretrained(OUT)"


def _refuse_quantized(path: Path, config: Mapping[str, Any]) -> None:
    parts = [config, *(config.get(key) for key in ("text_config", "vision_config"))]
    found = [
        part["quantization_config"] for part in parts if isinstance(part, dict) and part.get("quantization_config") is not None
    ]
    if found:
        method = found[0].get("quant_method") if isinstance(found[0], dict) else None
        raise quantized(path, str(method or "by an unnamed method"))


def quantized(where: Path, how: str) -> InputError:
    """The error of a checkpoint whose weights are packed in fewer bits."""
    return InputError(
        f"the checkpoint is quantized ({how})",
        where=str(where),
        expected="weights in float32, float16 or bfloat16",
        todo="use the checkpoint that it was quantized from; `edgesafe export` quantizes for the device by itself",
    )


def _shards(folder: Path, index: str) -> tuple[Path, ...]:
    """The shards of an index in the order of their names."""
    path = folder / index
    whole = read_object(path)
    where = whole.get("weight_map")
    if not isinstance(where, dict) or not where:
        raise _bad_index(path, "the index of the shards has no weight_map")
    if not isinstance(whole.get("metadata"), dict):  # transformers fails over it
        raise _bad_index(path, "the index of the shards has no metadata")
    for name in where.values():
        _check_name(name, path)
    return tuple(folder / name for name in sorted(set(where.values())))


def _check_name(name: object, where: Path) -> None:
    """A plain name stays inside the folder; what it names may be a link, as in the hub's cache."""
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name or "\\" in name or Path(name).name != name:
        raise _bad_index(where, f"it names the file of weights {name!r}")


def _bad_index(path: Path, what: str) -> InputError:
    return InputError(what, where=str(path), expected="names of safetensors files in this folder", todo=DAMAGED)


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
        InputError: it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the file is not JSON: {error}", where=str(path), expected="a JSON object", todo=DAMAGED) from error
    if not isinstance(found, dict):
        raise InputError(f"the file holds a {type(found).__name__}", where=str(path), expected="a JSON object", todo=DAMAGED)
    return found


def _no_folder(folder: Path) -> InputError:
    if folder.suffix == ".gguf":
        return _gguf(folder)
    if folder.is_file():
        return InputError(
            "this is a file", where=str(folder), expected="a checkpoint's folder", todo="name the folder that it lies in"
        )
    return InputError(
        "no checkpoint here: there is no such folder",
        where=str(folder),
        expected=f"a folder with {_WHOLE}",
        todo="check the name; a model on the Hugging Face hub comes by `hf download ORG/NAME --local-dir DIR`",
    )


def _gguf(path: Path) -> InputError:
    return InputError(
        "a GGUF file holds quantized weights for llama.cpp",
        where=str(path),
        expected=f"a folder with {_WHOLE}",
        todo="use the Hugging Face checkpoint that it was made from",
    )


def _no_weights(folder: Path, has: Callable[[Path], bool]) -> InputError:
    """Why a folder without weights that can be read has none."""
    if names := [n for n in _with_suffix(folder, (".safetensors", *_PICKLES)) if n.startswith("adapter_model.")]:
        return InputError(
            f"these are an adapter's weights, without its {ADAPTER}",
            where=str(folder / names[0]),
            expected=f"a folder with {_WHOLE}",
            todo=f"put {ADAPTER} beside them and merge them into their base model",
        )
    names = _with_suffix(folder, _PICKLES)
    pickles = [n for n in ("pytorch_model.bin", "pytorch_model.bin.index.json") if has(folder / n)] + names
    if pickles:
        return InputError(
            "the weights are pickled, and reading them could run code",
            where=str(folder / pickles[0]),
            expected="safetensors",
            todo="if you trust where they come from, convert them: AutoModelForImageTextToText.from_pretrained(DIR)"
            f".save_pretrained(OUT), and {_saved(_PROCESSOR)}",
        )
    if names := _with_suffix(folder, (".gguf",)):
        return _gguf(folder / names[0])
    names = _with_suffix(folder, (".safetensors",))
    found = f"; {names[0]} is not named by an index" if names else ""
    if any((folder / name).is_symlink() for name in (SINGLE, INDEX)):
        found = "; a link to them leads nowhere"
    return InputError("no weights here" + found, where=str(folder), expected=f"{SINGLE}, or shards with {INDEX}", todo=DAMAGED)


def _with_suffix(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    names = (path.name for path in folder.iterdir())
    # A trainer's own state is a pickle too, and no weights.
    return sorted(n for n in names if n.endswith(suffixes) and not n.startswith(("training_args", "optimizer")))
