"""A checkpoint seen through its family's recipe: its pieces, its sizes, its chat text, and transformers as the oracle.

T vision tokens with CLS, N image tokens of a picture or tile, W tower width, D text width, S prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from edgesafe.checkpoint.load import first_blocks, read_checkpoint, read_config
from edgesafe.checkpoint.recipe import Recipe, load_recipes, refused_families
from edgesafe.checkpoint.weight_files import read_raw_config
from edgesafe.errors import ExportError, InputError, UnsupportedModelError
from edgesafe.format.exits import hidden_states_index, reference_depth
from edgesafe_export.modules import Head, MaskedEmbeddings, Segment
from edgesafe_export.preprocessing import picture_specs

# What a processor makes of the text.
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


class Family:
    """A loaded checkpoint and its recipe. What can't be exported is refused here, before any graph is traced."""

    def __init__(self, model: Any, processor: Any, recipe: Recipe) -> None:
        self.model, self.processor, self.recipe = model, processor, recipe
        config = model.config
        vision = config.vision_config
        _check_config(config, recipe)
        self.name = recipe.model_type
        self.n_blocks = int(vision.num_hidden_layers)
        self.reference_depth = reference_depth(self.n_blocks, recipe.reference_layer(config))
        self.image_size = int(vision.image_size)
        self.vision_width = int(vision.hidden_size)
        self.patch = int(vision.patch_size)
        self.tokens = (self.image_size // self.patch) ** 2 + recipe.extra_tokens
        default = getattr(config, "vision_feature_select_strategy", "full") == "default"
        self.drop = recipe.extra_tokens if default else 0
        self.image_tokens = (self.tokens - self.drop) // recipe.patches_a_token(config)
        self.head_rows = self.image_tokens + bool(recipe.newline)  # the newline's own comes last
        self.image_token_id = int(config.image_token_id)
        self.text_config = text = config.text_config
        self.head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        self.image_spec, self.tiles = picture_specs(processor, config, recipe)
        self.chat = _chat(processor)
        _check_pictures(processor, self.chat)
        self.eos_token_ids = _eos(model, processor)

    def segment(self, start: int, end: int) -> Segment:
        """Blocks start..end of the tower, with the picture's embedding where start is 0."""
        recipe, tower = self.recipe, self.model.get_submodule(self.recipe.tower)
        blocks = list(tower.get_submodule(recipe.blocks))[start:end]
        if start > 0:
            return Segment(blocks, None).eval()
        embeddings = tower.get_submodule(recipe.embeddings)
        if recipe.patch_mask:
            embeddings = MaskedEmbeddings(embeddings, self.image_size, self.patch)
        norm = tower.get_submodule(recipe.norm_before_blocks) if recipe.norm_before_blocks else None
        return Segment(blocks, embeddings, norm).eval()

    def head(self) -> Head:
        """What follows an exit."""
        recipe, tower = self.recipe, self.model.get_submodule(self.recipe.tower)
        norm = tower.get_submodule(recipe.norm_after_blocks) if recipe.norm_after_blocks else None
        newline = self.model.get_parameter(recipe.newline) if recipe.newline else None
        return Head(self.model.get_submodule(recipe.projector), self.drop, norm, newline).eval()

    def embed_tokens(self) -> nn.Module:
        """The token embedding."""
        return self.model.get_input_embeddings()

    def decoder(self) -> Any:
        """The language model with its head, as transformers' own causal model over the same weights."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            causal = AutoModelForCausalLM.from_config(self.text_config)
        causal.model = self.model.get_submodule(self.recipe.decoder)
        causal.lm_head = self.model.get_submodule(self.recipe.lm_head)
        return causal.eval()

    @torch.no_grad()
    def oracle(self, inputs: Mapping[str, Any], depth: int) -> Tensor:
        """transformers' own image features at an exit depth, [its number of tokens, D].

        Args:
            inputs: what the checkpoint's processor makes of one picture.
            depth: the exit depth.
        """
        with self._selected(depth) as layer:
            out = self.model.model.get_image_features(**_of_pictures(inputs), **layer)
        out = getattr(out, "pooler_output", out)
        return out[0] if isinstance(out, list | tuple) or out.dim() == 3 else out

    @torch.no_grad()
    def oracle_logits(self, ids: Tensor, inputs: Mapping[str, Any], depth: int) -> Tensor:
        """transformers' own logits at an exit depth, [S, V]: the whole model, no cache."""
        with self._selected(depth) as layer:
            out = self.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **_of_pictures(inputs), **layer
            )
        return out.logits[0]

    @contextmanager
    def _selected(self, depth: int) -> Iterator[dict[str, int]]:
        """transformers' own way to read the state after `depth` blocks: its argument on the untruncated model, or else its own
        forward over a tower that has no more blocks."""
        if self.recipe.reference:
            yield {self.recipe.reference: hidden_states_index(depth)}
            return
        with first_blocks(self.model, self.recipe, hidden_states_index(depth)):
            yield {}


def load_family(folder: Path) -> Family:
    """Load a checkpoint folder by its family's recipe.

    Raises:
        InputError: not a whole checkpoint folder.
        UnsupportedModelError: a family without a recipe, or a member of one that can't be cut.
    """
    recipes = load_recipes()
    _check_model_type(folder, recipes)
    name, model, processor = read_checkpoint(folder, tuple(recipes))
    _check_tokenizer(folder)
    return Family(model, processor, recipes[name])


def open_family(folder: Path, build: Callable[[Path, Any], tuple[Any, int]]) -> tuple[Family, int]:
    """A checkpoint's family over a model that `build` makes of its config, and the number that `build` gives with it.

    Raises:
        InputError, UnsupportedModelError: as `load_family`, but for the weights.
    """
    recipes = load_recipes()
    _check_model_type(folder, recipes)
    config, processor = read_config(folder, tuple(recipes))
    _check_config(config, recipes[config.model_type])
    _check_tokenizer(folder)
    model, number = build(folder, config)
    return Family(model, processor, recipes[config.model_type]), number


def _check_tokenizer(folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            "the checkpoint has no tokenizer.json",
            where=str(folder),
            expected="a fast tokenizer: the device reads this file and nothing else",
            todo="convert it: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )


def _of_pictures(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key not in _TEXT_INPUTS}


def _check_model_type(folder: Path, recipes: dict[str, Recipe]) -> None:
    """Refuse another family before its weights are read, also one that transformers itself doesn't know."""
    named = read_raw_config(folder)["model_type"]
    if named not in recipes:
        why = refused_families().get(named)
        raise _unsupported(f"model family {named!r}", recipes.values(), str(folder), why)


def _check_config(config: Any, recipe: Recipe) -> None:
    layer = recipe.reference_layer(config)
    strategy = getattr(config, "vision_feature_select_strategy", None)
    window = getattr(config.text_config, "sliding_window", None)
    problem = ""
    if config.vision_config.model_type not in recipe.vision_types:
        problem = f"a {config.vision_config.model_type!r} tower"
    elif config.text_config.model_type not in recipe.text_types:
        problem = f"a {config.text_config.model_type!r} language model"
    elif isinstance(layer, bool) or not isinstance(layer, int):
        problem = f"a projector that reads several vision layers ({layer})"
    elif strategy not in (recipe.select_strategies or (None,)):
        problem = f"the select strategy {strategy!r}"
    elif window is not None and window < config.text_config.max_position_embeddings:
        problem = f"a decoder that sees no more than the last {window} tokens"
    if problem:
        raise _unsupported(problem, [recipe], "config.json")


def _unsupported(what: str, recipes: Any, where: str, why: str | None = None) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what} can't be exported" + (f": {why}" if why else ""),
        where=where,
        expected="; ".join(recipe.describe() for recipe in recipes),
        todo="use a supported checkpoint",
    )


def _check_pictures(processor: Any, chat: tuple[str, str]) -> None:
    """Refuse a processor that can't read a picture: some files leave out what others name, such as `num_image_tokens`."""
    try:
        processor(images=[Image.new("RGB", (8, 8))], text="".join(chat), return_tensors="pt")
    except Exception as error:  # each family's processor fails in its own way
        raise InputError(
            f"the checkpoint's processor can't read a picture: {type(error).__name__}: {error}",
            where="processor_config.json and preprocessor_config.json",
            expected="what this family's published checkpoints say there",
            todo="use the processor files that belong to this checkpoint",
        ) from error


def _chat(processor: Any) -> tuple[str, str]:
    """Text before and after the user's own, rendered from the checkpoint's chat template.

    Two unlike texts are put in: a template that edits, repeats or looks at what the user says is refused.
    """
    parts = []
    for mark in ("@@first mark@@", "Other  Mark\n<3 {{x}}"):
        content = [{"type": "image"}, {"type": "text", "text": mark}]
        try:
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        except Exception as error:  # jinja and transformers raise a dozen kinds here
            raise InputError(
                f"the chat template can't be rendered: {error}",
                where="chat_template",
                expected="a template that takes one picture and one text",
                todo="use the processor files that belong to this checkpoint",
            ) from error
        parts.append(text.split(mark))
    if any(len(p) != 2 for p in parts) or parts[0] != parts[1]:
        raise ExportError(
            "the chat template changes the user's text",
            where="chat_template",
            expected="text inserted once, as it is",
            todo="use a template that does not edit what the user says",
        )
    prefix, suffix = parts[0]
    if prefix.count(processor.image_token) != 1 or processor.image_token in suffix:
        raise ExportError(
            "the chat template does not put the picture before the text",
            where="chat_template",
            expected=f"{processor.image_token!r} once, before the user's text",
            todo="use a template that puts the picture first",
        )
    return prefix, suffix


def _eos(model: Any, processor: Any) -> tuple[int, ...]:
    eos = model.generation_config.eos_token_id
    eos = processor.tokenizer.eos_token_id if eos is None else eos
    if eos is None:
        raise InputError(
            "neither generation_config.json nor the tokenizer names an end token",
            where="eos_token_id",
            expected="a token that ends an answer",
            todo="set eos_token_id in generation_config.json",
        )
    return tuple(eos) if isinstance(eos, list) else (int(eos),)
