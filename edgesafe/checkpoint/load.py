"""Read a Hugging Face checkpoint folder whole, or say what is wrong with it. Shared by align and export (tier 2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgesafe.checkpoint.exit_maps import attach_empty, attach_stored
from edgesafe.checkpoint.geometry import Geometry, picture_side, read_geometry
from edgesafe.checkpoint.processor import read_processor
from edgesafe.checkpoint.recipe import Recipe, check_family, load_recipes, refused_families
from edgesafe.checkpoint.relatives import native_type
from edgesafe.checkpoint.shards import (
    ON_DISK,
    WITHOUT_MAPS,
    Reader,
    Stored,
    check_kind,
    not_finite,
    read_headers,
    read_tensor,
    same_numbers,
)
from edgesafe.checkpoint.weight_files import quantized, read_object, read_raw_config
from edgesafe.errors import InputError, UnsupportedModelError

GENERATION = "generation_config.json"
# How quantizers name a packed weight: GPTQ and AWQ, compressed-tensors, HQQ. Older ones left config.json as it was.
_PACKED = (".qweight", ".weight_packed", ".W_q")
INTACT = "use an intact Hugging Face checkpoint folder"


def bf16_is_fast() -> bool:
    """Whether this CPU has tiles for bfloat16 matrices (AMX).

    Without them float32 is faster, AVX-512's bfloat16 included: 200 against 144 GFLOP/s measured on 2 such cores.
    """
    import torch

    return bool(torch.cpu._is_amx_tile_supported())


def read_checkpoint(folder: Path, supported: tuple[str, ...]) -> tuple[str, Any, Any]:
    """Load a vision-language checkpoint in float32.

    Args:
        folder: config.json, safetensors, tokenizer and processor files.
        supported: families (`model_type`) that the caller can handle.

    Returns:
        The family, the model in eval mode, and its processor.

    Raises:
        InputError: no such folder, files missing or damaged, weights missing or not finite.
        UnsupportedModelError: another family.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    config, processor = read_config(folder, supported)
    # Headers first: whatever is refused is refused as an export does it, before gigabytes are read.
    stored = match_weights(empty_model(folder, config), read_headers(folder))
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        model, info = loaded  # a pair, because of output_loading_info
    except Exception as error:  # transformers, safetensors and torch share no base class
        raise unreadable(folder, error) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        names = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise InputError(
            f"{len(names)} weights are missing or of another shape, e.g. {names[0]}", where=str(folder), todo=INTACT
        )
    attach_stored(model, folder, read_geometry(config, load_recipes()[config.model_type].of(config)))
    for name, weight in model.named_parameters():
        if bad := int((~torch.isfinite(weight)).sum()):
            raise not_finite(name, stored[name], bad)
    return config.model_type, model.eval(), processor


def read_config(folder: Path, supported: tuple[str, ...]) -> tuple[Any, Any]:
    """A checkpoint's config and processor; its weights are not read.

    Raises:
        InputError: no such folder, or files missing or damaged, or weights that are an adapter's or quantized.
        UnsupportedModelError: another family.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    # Its warnings name packages that this path does not need; failures raise below.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # untyped there
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped there
    raw = read_raw_config(folder)
    if raw["model_type"] not in supported:
        why = refused_families().get(raw["model_type"])
        raise UnsupportedModelError(
            f"model family {raw['model_type']!r}" + (f": {why}" if why else ""),
            where=str(folder),
            expected="one of " + ", ".join(supported),
            todo="use a supported family",
        )
    for part in ("text_config", "vision_config"):  # transformers would put in a default of its own
        if not isinstance(raw.get(part), dict) or not isinstance(raw[part].get("model_type", ""), str):
            where = str(folder / "config.json")
            raise InputError(
                f"config.json has no usable {part}", where=where, expected="that part's type and sizes", todo=INTACT
            )
    if (folder / GENERATION).is_file():  # a damaged one would be left out in silence
        read_object(folder / GENERATION)
    try:
        config = AutoConfig.from_pretrained(folder)
        return config, read_processor(folder, native_type(config))
    except Exception as error:  # a damaged file surfaces as whatever the code that trips over it raises
        raise unreadable(folder, error) from error


def open_geometry(folder: Path) -> tuple[Any, Geometry]:
    """A checkpoint's config and its sizes; no weights are read, nor its tokenizer.

    Raises:
        InputError: no such folder, or a damaged config.json.
        UnsupportedModelError: a family without a recipe, or a member of one that can't be cut.
    """
    from transformers import AutoConfig

    recipes = load_recipes()
    check_family(folder, recipes)
    try:
        config = AutoConfig.from_pretrained(folder)
        recipe = recipes[config.model_type].of(config)
        # The others' towers take pictures of one size, which config.json has.
        images = _image_processor(folder) if recipe.positions else None
    except Exception as error:  # a damaged file surfaces as whatever the code that trips over it raises
        raise unreadable(folder, error) from error
    return config, read_geometry(config, recipe, picture_side(config, recipe, images))


def _image_processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]  # untyped there


def empty_model(folder: Path, config: Any, reader: Reader = ON_DISK) -> Any:
    """The config's model and the folder's exit maps in eval mode, its tied weights tied, without memory for weights.

    Args:
        folder: the checkpoint.
        config: its config.
        reader: looks at its file of exit maps.

    Raises:
        InputError: the config describes a model that can't be built, or the maps are of another model.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    try:
        with _weights_on_meta():
            model = AutoModelForImageTextToText.from_config(  # type: ignore[no-untyped-call]  # untyped there
                config, dtype=torch.float32
            )
    except Exception as error:  # sizes that contradict each other fail wherever a module notices
        raise InputError(
            f"config.json describes a model that can't be built: {type(error).__name__}: {error}",
            where=str(folder / "config.json"),
            expected="the config that belongs to the weights",
            todo=INTACT,
        ) from error
    model.tie_weights()
    attach_empty(model, folder, read_geometry(config, load_recipes()[config.model_type].of(config)), reader)
    return model.eval()


def read_part(model: Any, part: str, folder: Path) -> None:
    """Put a folder's weights into one part of a model that was built without memory.

    Args:
        model: what `empty_model` built of the folder, without its exit maps.
        part: its path.
        folder: the checkpoint.

    Raises:
        InputError: as `match_weights`, or a weight of the part is not finite.
    """
    import torch
    from torch import nn

    stored = match_weights(model, read_headers(folder, WITHOUT_MAPS))
    for name in [name for name, _ in model.get_submodule(part).named_parameters()]:
        owner, _, attribute = f"{part}.{name}".rpartition(".")
        weight = torch.from_numpy(read_tensor(stored[f"{part}.{name}"], f"{part}.{name}"))
        setattr(model.get_submodule(owner), attribute, nn.Parameter(weight, requires_grad=False))


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without memory; buffers such as rotary frequencies are computed as usual."""
    from torch import nn

    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, weight: nn.Parameter | None) -> None:
        # One that has no memory already is kept: two modules may share it.
        if weight is not None and not weight.is_meta:
            weight = nn.Parameter(weight.to("meta"), requires_grad=False)
        register(module, name, weight)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]  # for a while
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]  # as it was


Shapes = Mapping[str, tuple[int, ...]]


def match_weights(model: Any, found: Mapping[str, Stored], more: Shapes | None = None) -> dict[str, Stored]:
    """The stored tensors by the names of a model's weights; what is stored and not used is left alone, as transformers does.

    Args:
        model: transformers' model; its weights' numbers are not checked.
        found: tensors by their names on disk.
        more: shapes of weights that belong to the checkpoint and not to this model, by name.

    Returns:
        Where each weight lies. A weight that modules share has its first name in the model.

    Raises:
        InputError: a weight is missing, stored twice, of another shape than config.json says or of a kind that can't be read.
        UnsupportedModelError: a weight needs converting.
    """
    names: dict[int, str] = {}
    first = {n: names.setdefault(id(w), n) for n, w in model.named_parameters(remove_duplicate=False)}
    shapes = {**{n: tuple(w.shape) for n, w in model.named_parameters()}, **(more or {})}
    stored: dict[str, tuple[str, Stored]] = {}
    for key, name in _renamed(model, found, first.keys() | shapes.keys()):
        kept = first.get(name, name)
        if kept in stored:
            _check_twice(kept, stored[kept], (name, found[key]))
        else:
            stored[kept] = (name, found[key])
    weights = {name: one for name, (_, one) in stored.items()}
    _check_shapes(weights, shapes, found)
    return weights


def _renamed(model: Any, found: Mapping[str, Stored], known: set[str]) -> Iterator[tuple[str, str]]:
    """Names on disk and in the model, of the tensors that the model has a place for.

    Source: transformers 5.23, `core_model_loading.convert_and_load_state_dict_in_model`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    changes = get_model_conversion_mapping(model)
    renamings = [c for c in changes if isinstance(c, WeightRenaming)]
    converters = [c for c in changes if isinstance(c, WeightConverter)]
    places = dict.fromkeys(known, True)
    for key in sorted(found, key=dot_natural_key):
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, places)
        if name not in known and key in known:
            name, converter = rename_source_key(key, [], [], model.base_model_prefix, places)
        if name not in known:
            continue
        if converter is not None:
            raise UnsupportedModelError(
                f"the weight {key} has to be converted",
                where=str(found[key].file),
                expected="weights as transformers' model has them",
                todo="load the checkpoint with transformers and save it again",
            )
        yield key, name


def _check_twice(weight: str, one: tuple[str, Stored], other: tuple[str, Stored]) -> None:
    """Refuse two stored tensors for one weight, but for a tied weight's equal copies: of others transformers unties them."""
    if one[0] == other[0]:
        raise InputError(
            f"weight {weight} is stored twice, under an old name and a new one",
            where=str(other[1].file),
            expected="one tensor of each weight",
            todo="load the checkpoint with transformers and save it again",
        )
    if not same_numbers(one[1], other[1]):
        raise InputError(
            f"config.json ties {one[0]} to {other[0]}, but their stored numbers differ",
            where=str(other[1].file),
            expected="equal numbers, or weights that are not tied",
            todo='set "tie_word_embeddings" to false in config.json and in its text_config',
        )


def _check_shapes(stored: Mapping[str, Stored], shapes: Shapes, found: Mapping[str, Stored]) -> None:
    where = str(next(iter(found.values())).file.parent) if found else ""
    missing = sorted(shapes.keys() - stored.keys())
    if missing and (packed := next((n for n in found if n.endswith(_PACKED)), None)):
        raise quantized(found[packed].file, f"it holds {packed} and no {missing[0]}")
    if missing:
        raise InputError(
            f"{len(missing)} weights are missing, e.g. {missing[0]}",
            where=where,
            expected="every weight of the model",
            todo=INTACT,
        )
    for name, shape in shapes.items():
        check_kind(stored[name], name)
        if stored[name].shape != shape:
            raise InputError(
                f"config.json contradicts the weights: {name} is stored as {list(stored[name].shape)}",
                where=str(stored[name].file),
                expected=f"{list(shape)}, by config.json",
                todo="use the config.json that belongs to these weights",
            )


def unreadable(folder: Path, error: Exception) -> InputError:
    """The error of a checkpoint that transformers can't read."""
    return InputError(
        f"the checkpoint can't be read: {' '.join(str(error).split()) or type(error).__name__}",
        where=str(folder),
        expected="a whole checkpoint",
        todo=INTACT,
    )


@contextmanager
def first_blocks(model: Any, recipe: Recipe, depth: int | None) -> Iterator[None]:
    """The model with the first `depth` blocks of its tower alone (None: all), for as long as the block lasts.

    transformers hangs the hooks that collect hidden states on a tower's blocks once, when it is first asked for them: it
    is made to do so before any block is away.
    """
    from transformers import PreTrainedModel
    from transformers.utils.output_capturing import maybe_install_capturing_hooks

    tower = model.get_submodule(recipe.tower)
    parent, _, name = recipe.blocks.rpartition(".")
    stack = tower.get_submodule(parent)
    blocks = getattr(stack, name)
    # The part that collects: its mark says that the hooks are there, while a tower around it would hang them a second time.
    maybe_install_capturing_hooks(stack if isinstance(stack, PreTrainedModel) else tower)
    setattr(stack, name, blocks[:depth])
    try:
        yield
    finally:
        setattr(stack, name, blocks)
