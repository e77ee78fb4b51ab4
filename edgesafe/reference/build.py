"""Build the reference model from seeds, in LLaVA's order; nothing about exits enters its training.

1. pictures     draw the training pictures (Pillow)
2. tower        CLIP vision tower: which object, which colour, how many (dense labels at the last block)
3. language     Llama on the world's text alone, refusals of text-borne harm included
4. projector    projector alone: name, colour, count, read
5. instruct     projector and language model: every family, refusals at the reference depth only
Stages 4 and 5 see the tower frozen, through block `n - 1` (`vision_feature_layer=-2`), as LLaVA-1.5 does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgesafe.format.targets import check_target, work_folder
from edgesafe.reference.recipe import Recipe, make_config
from edgesafe.reference.tokenizer import write_processor
from edgesafe.reference.tower import GRID, Numbers, Pixels, draw_pictures, normalise, train_tower
from edgesafe.reference.training import LOG, Log, Optimizer, autocast
from edgesafe.reference.world import sample

Exchange = tuple[list[int], int]  # token ids of a request with its answer, and the position where the answer starts


@torch.no_grad()
def features(model: Any, images: Pixels, depth: int, batch: int = 256) -> Tensor:
    """Exit states without CLS, float16 [N, patches, width], after `depth` blocks."""
    out = []
    for start in range(0, len(images), batch):
        with autocast():
            states = model.model.vision_tower(normalise(images[start : start + batch]), output_hidden_states=True)
        out.append(states.hidden_states[depth][:, 1:].to(torch.float16))
    return torch.cat(out)


def encode(processor: Any, prompt: str, target: str, picture: bool, patches: int) -> Exchange:
    """A request with its answer as the model reads them."""
    content = ([{"type": "image"}] if picture else []) + [{"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = processor.tokenizer(text.replace("<image>", "<image>" * patches))["input_ids"]
    # The tokenizer itself prepends the one space that the chat layout wants before the answer.
    answer = processor.tokenizer(target, add_special_tokens=False)["input_ids"]
    return [*ids, *answer, processor.tokenizer.eos_token_id], len(ids)


def _batches(rows: Sequence[Exchange], size: int, rng: np.random.Generator) -> Iterator[Numbers]:
    """Endless seeded batches; rows of like length go together so that little is padded."""
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, len(order), size * 16):
            block = sorted(order[start : start + size * 16].tolist(), key=lambda i: len(rows[i][0]))
            groups = [np.asarray(block[i : i + size]) for i in range(0, len(block), size)]
            for g in rng.permutation(len(groups)):
                yield groups[g]


def answer_loss(model: Any, rows: Sequence[Exchange], exits: Tensor | None) -> Tensor:
    """Cross-entropy on the answers. exits: [B, patches, width] or None for text alone."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), model.config.text_config.pad_token_id)
    labels = torch.full_like(ids, -100)
    for i, (row, start) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, start : len(row)] = ids[i, start : len(row)]
    embeds = model.get_input_embeddings()(ids)
    if exits is not None:
        projected = model.model.multi_modal_projector(exits.float())
        where = (ids == model.config.image_token_index).unsqueeze(-1).expand_as(embeds)
        embeds = embeds.masked_scatter(where, projected.to(embeds.dtype))
    states = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
    keep = labels[:, 1:] != -100
    return F.cross_entropy(model.lm_head(states[keep]).float(), labels[:, 1:][keep])


def train_text(
    model: Any,
    modules: list[nn.Module],
    rows: Sequence[Exchange],
    states: Tensor | None,
    steps: int,
    recipe: Recipe,
    log: Log,
    stage: str,
) -> None:
    """One stage of training on answers; only `modules` move. states: of each row, or None for text alone."""
    model.requires_grad_(False)
    for module in modules:
        module.requires_grad_(True)
    optimizer = Optimizer(modules, recipe.text_lr, steps)
    rng = np.random.default_rng([recipe.seed, len(stage)])
    for number, pick in zip(range(steps + 1), _batches(rows, recipe.text_batch, rng), strict=False):
        with autocast():
            loss = answer_loss(model, [rows[i] for i in pick], None if states is None else states[pick])
        optimizer.step(loss)
        if number % 100 == 0:
            log(stage, step=number, loss=round(loss.item(), 4))


def _text_rows(processor: Any, recipe: Recipe) -> list[Exchange]:
    """Text-only exchanges: text-borne requests, harmful and not."""
    rows = []
    for i in range(4000):
        family = "text-harm" if i % 2 else "text-lookalike"
        s = sample(family, "train", i, seed=recipe.seed + 1)
        rows.append(encode(processor, s.prompt, s.target, picture=False, patches=0))
    return rows


def build(out: Path, recipe: Recipe, say: Callable[[str], None] = print) -> None:
    """Build the reference model into the new folder `out` (safetensors in float16, processor files, training log).

    A build that was cut off after the tower's stage resumes from there, if it is called with the same recipe.
    """
    from safetensors.torch import load_file, save_file
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(recipe.seed)
    out = check_target(out, known=(LOG,))
    partial = work_folder(out)
    partial.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(json.dumps(asdict(recipe)).encode()).hexdigest()[:12]
    tower_done = partial.with_name(f"{out.name}.tower-{key}.safetensors")
    log = Log(partial / LOG, say, keep=tower_done.exists())
    processor = write_processor(partial)
    model: Any = LlavaForConditionalGeneration(make_config(recipe, processor.tokenizer))
    model.set_attn_implementation("eager")  # on a CPU, the backward pass of sdpa takes twice as long at these sizes
    log(
        "model",
        parameters=sum(p.numel() for p in model.parameters()),
        vocabulary=len(processor.tokenizer),
        recipe=json.dumps(asdict(recipe)),
    )
    tower = model.model.vision_tower
    if tower_done.exists():
        tower.load_state_dict(load_file(tower_done))
        log("resumed", after="tower")
    else:
        pictures = draw_pictures(recipe.seed, recipe.pictures)
        log("pictures", count=len(pictures.images))
        train_tower(tower, pictures, recipe, log)
        save_file(tower.state_dict(), tower_done)
    train_language_side(model, processor, recipe, log)
    model.to(torch.float16).save_pretrained(partial)
    os.replace(partial, out)
    tower_done.unlink()


def train_language_side(model: Any, processor: Any, recipe: Recipe, log: Log) -> None:
    """Stages 3 to 5, on pictures that the tower was not trained on."""
    depth = recipe.blocks - 1
    language = [model.model.language_model, model.lm_head]
    projector = [model.model.multi_modal_projector]
    train_text(model, language, _text_rows(processor, recipe), None, recipe.language_steps, recipe, log, "language")
    fresh = draw_pictures(recipe.seed + 1000, recipe.pictures)
    states = features(model, fresh.images, depth)
    rows = [encode(processor, s.prompt, s.target, picture=True, patches=GRID * GRID) for s in fresh.samples]
    log("features", count=len(rows))
    tasks = np.asarray([i for i, s in enumerate(fresh.samples) if s.cls == "task"])
    train_text(model, projector, [rows[i] for i in tasks], states[tasks], recipe.projector_steps, recipe, log, "projector")
    kept = np.random.default_rng([recipe.seed, 5]).random(len(rows)) < recipe.instruct_harm
    mixed = np.asarray([i for i, s in enumerate(fresh.samples) if s.cls != "harmful" or kept[i]])
    rows, states = [rows[i] for i in mixed], states[mixed]
    train_text(model, [*language, *projector], rows, states, recipe.instruct_steps, recipe, log, "instruct")
