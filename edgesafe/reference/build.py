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
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgesafe.checkpoint.load import bf16_is_fast
from edgesafe.format.targets import check_target, work_folder
from edgesafe.reference.draw import COLOURS, SIZE
from edgesafe.reference.kinds import BY_NAME
from edgesafe.reference.tokenizer import PATCH, write_processor
from edgesafe.reference.world import ACT, SAFE, WORDS, Sample, sample, stream

GRID = SIZE // PATCH
LABELS = ("none", *BY_NAME, *(f"word:{w}" for w in (*WORDS, *ACT, *SAFE)))
_KIND = {name: i for i, name in enumerate(LABELS)}
_COLOUR = {name: i for i, name in enumerate(("none", *COLOURS))}


@dataclass(frozen=True)
class Recipe:
    """Sizes, steps and seeds of the reference model."""

    seed: int = 7
    blocks: int = 13
    vision_width: int = 192
    vision_heads: int = 6
    text_layers: int = 4
    text_width: int = 192
    text_heads: int = 6
    pictures: int = 80_000
    tower_steps: int = 1600
    tower_batch: int = 128
    tower_lr: float = 1.4e-3
    tower_falloff: float = 0.85  # learning rate of a block over that of the block before
    tower_start: float = 0.15  # first scale of the patches' layer norm: a small stream lets the first blocks do more
    language_steps: int = 200
    projector_steps: int = 100
    instruct_steps: int = 1400
    instruct_harm: float = 0.6  # share of the harmful rows that this stage reads: most requests that people make are harmless
    text_batch: int = 64
    text_lr: float = 1.5e-3


def make_config(recipe: Recipe, tokenizer):  # type: ignore[no-untyped-def]
    """transformers' LlavaConfig of a recipe."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=recipe.vision_width,
        intermediate_size=4 * recipe.vision_width,
        image_size=SIZE,
        patch_size=PATCH,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.vision_heads,
        projection_dim=recipe.vision_width,
    )
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<s>", "</s>", "<pad>", "<image>")}
    text = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 32) * 32,
        hidden_size=recipe.text_width,
        intermediate_size=512,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.text_heads,
        num_key_value_heads=recipe.text_heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        image_token_id=ids["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        pad_token_id=ids["<pad>"],
    )


# ---- 1. pictures ---------------------------------------------------------------------------------------------------


@dataclass
class Pictures:
    """images uint8 [N, S, S, 3]; kinds, colours int64 [N, patches]; counts int64 [N]; samples without their images."""

    images: np.ndarray
    kinds: np.ndarray
    colours: np.ndarray
    counts: np.ndarray
    samples: list[Sample]


def _labels(s: Sample) -> tuple[np.ndarray, np.ndarray]:
    """What stands at each patch of the picture: kind (or word) and colour, [patches]; 0 is nothing."""
    kinds, colours = np.zeros((GRID, GRID), np.int64), np.zeros((GRID, GRID), np.int64)
    middle = (np.arange(GRID) + 0.5) * PATCH
    for place in s.placed:
        near = max(place.half, 0.6 * PATCH) if s.scene.text else 0.85 * place.half
        rows = np.abs(middle - place.y) < near
        cols = np.abs(middle - place.x) < (SIZE if s.scene.text else near)
        box = np.ix_(rows, cols)
        if s.scene.text:
            kinds[box] = _KIND["word:" + s.scene.text.split("\n")[place.index]]
        else:
            item = s.scene.items[place.index]
            kinds[box], colours[box] = _KIND[item.kind], _COLOUR[item.colour]
    return kinds.ravel(), colours.ravel()


def _draw_chunk(job: tuple[int, int, int]) -> Pictures:
    seed, start, count = job
    images, kinds, colours, counts, samples = [], [], [], [], []
    for s in stream("train", count, seed=seed * 100_003 + start):
        k, c = _labels(s)
        images.append(np.asarray(s.image))
        kinds.append(k)
        colours.append(c)
        counts.append(len(s.scene.items))
        samples.append(Sample(s.family, s.template, s.scene, s.prompt, s.target, s.key, None, ()))  # type: ignore[arg-type]
    return Pictures(np.stack(images), np.stack(kinds), np.stack(colours), np.asarray(counts), samples)


def draw_pictures(seed: int, count: int, workers: int = 2, chunk: int = 1000) -> Pictures:
    """Training samples of the world, drawn in parallel; the result does not depend on `workers`."""
    jobs = [(seed, start, min(chunk, count - start)) for start in range(0, count, chunk)]
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(_draw_chunk, jobs))
    return Pictures(
        np.concatenate([p.images for p in parts]),
        np.concatenate([p.kinds for p in parts]),
        np.concatenate([p.colours for p in parts]),
        np.concatenate([p.counts for p in parts]),
        [s for p in parts for s in p.samples],
    )


# ---- training helpers ----------------------------------------------------------------------------------------------


def autocast() -> Any:
    """Matrix products in bfloat16 where the CPU has tiles for them (AMX); elsewhere float32 is the faster of the two."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16_is_fast())


def normalise(images: np.ndarray) -> Tensor:
    """CLIP's normalisation of uint8 [B, S, S, 3] -> float32 [B, 3, S, S] (what `CLIPImageProcessor` does at this size)."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    x = torch.from_numpy(images).float().div_(255.0)
    return ((x - torch.tensor(OPENAI_CLIP_MEAN)) / torch.tensor(OPENAI_CLIP_STD)).permute(0, 3, 1, 2).contiguous()


LOG = "training.jsonl"


class Log:
    """Training log: one JSON line an entry, to a file and (short) to a callback."""

    def __init__(self, path: Path, say: Callable[[str], None], keep: bool = False) -> None:
        self.path, self.say, self.start = path, say, time.time()
        if not keep:
            path.write_text("")

    def __call__(self, stage: str, **figures: float | int | str) -> None:
        entry = {"stage": stage, "seconds": round(time.time() - self.start, 1), **figures}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self.say(" ".join(f"{k}={v}" for k, v in entry.items()))


class Optimizer:
    """Muon for the matrices of the blocks, AdamW for the rest, both on one one-cycle schedule.

    Muon (torch.optim.Muon) brings a transformer of this size to the same loss in about half of AdamW's steps. The
    learning rate of Muon falls by `falloff` from each block to the next.
    """

    def __init__(self, modules: list[nn.Module], lr: float, steps: int, falloff: float = 1.0) -> None:
        blocks: dict[int, list[nn.Parameter]] = {}
        rest = []
        for name, p in (named for module in modules for named in module.named_parameters()):
            block = re.search(r"\blayers\.(\d+)\.", name)
            if block and p.ndim == 2:
                blocks.setdefault(int(block[1]), []).append(p)
            else:
                rest.append(p)
        self.params = [*rest, *(p for matrices in blocks.values() for p in matrices)]
        adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
        self.parts: list[Any] = [adamw, _one_cycle(adamw, [lr], steps)]
        if blocks:
            groups = [{"params": matrices} for matrices in blocks.values()]
            muon = torch.optim.Muon(groups, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
            self.parts += [muon, _one_cycle(muon, [lr * falloff**i for i in blocks], steps)]

    def step(self, loss: Tensor) -> None:
        """One update along the gradient of `loss`."""
        for p in self.params:
            p.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for part in self.parts:
            part.step()


def _one_cycle(optimizer: torch.optim.Optimizer, lr: list[float], steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.08, cycle_momentum=False)


# ---- 2. tower ------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Throw-away heads over the last block: patch tokens say kind and colour, the CLS token says how many."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.kind = nn.Linear(width, len(LABELS))
        self.colour = nn.Linear(width, len(_COLOUR))
        self.count = nn.Linear(width, 5)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # states [B, 1 + patches, width]
        x = self.norm(states)
        return self.kind(x[:, 1:]), self.colour(x[:, 1:]), self.count(x[:, 0])


def _start(tower: nn.Module, scale: float) -> None:
    """Position embeddings start from 2-D sines and cosines, [1 + patches, width], as ViTs commonly do; the stream, small."""
    vision = getattr(tower, "vision_model", tower)
    weight = vision.embeddings.position_embedding.weight
    angles = torch.arange(GRID)[:, None] * (math.pi / 2 ** torch.linspace(0, 4, weight.shape[1] // 4))
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # [grid, width / 2]
    both = torch.cat([waves[:, None].expand(-1, GRID, -1), waves[None].expand(GRID, -1, -1)], 2)  # [row, column, width]
    with torch.no_grad():
        weight.zero_()
        weight[1:] = 0.3 * both.flatten(0, 1)
        vision.pre_layrnorm.weight.fill_(scale)


def _tower_loss(tower: nn.Module, heads: Heads, pictures: Pictures, pick: np.ndarray) -> tuple[Tensor, float]:
    """Loss of the pictures `pick`, and how many of the patches that show something name it rightly."""
    with autocast():
        states = tower(normalise(pictures.images[pick]), output_hidden_states=True).hidden_states[-1]
        kind, colour, count = heads(states.float())
    kinds, colours = torch.from_numpy(pictures.kinds[pick]), torch.from_numpy(pictures.colours[pick])
    weight = torch.ones(len(LABELS))
    weight[0] = 0.1  # most patches show nothing
    loss = F.cross_entropy(kind.float().flatten(0, 1), kinds.flatten(), weight)
    loss = loss + 0.5 * F.cross_entropy(colour.float().flatten(0, 1), colours.flatten())
    loss = loss + 0.2 * F.cross_entropy(count.float(), torch.from_numpy(pictures.counts[pick]))
    there = kinds > 0
    return loss, (kind.argmax(-1) == kinds)[there].float().mean().item()


def train_tower(tower: nn.Module, pictures: Pictures, recipe: Recipe, log: Log) -> None:
    """Train the vision tower on the drawn pictures; the heads are thrown away."""
    _start(tower, recipe.tower_start)
    heads = Heads(recipe.vision_width)
    optimizer = Optimizer([tower, heads], recipe.tower_lr, recipe.tower_steps, recipe.tower_falloff)
    rng = np.random.default_rng([recipe.seed, 2])
    order = np.empty(0, np.int64)
    for number in range(recipe.tower_steps + 1):
        if len(order) < recipe.tower_batch:
            order = rng.permutation(len(pictures.images))
        pick, order = order[: recipe.tower_batch], order[recipe.tower_batch :]
        loss, right = _tower_loss(tower, heads, pictures, pick)
        optimizer.step(loss)
        if number % 100 == 0:
            log("tower", step=number, loss=round(loss.item(), 4), kind_accuracy=round(right, 4))


# ---- 3-5. language, projector, instruct ----------------------------------------------------------------------------


@torch.no_grad()
def features(model, images: np.ndarray, depth: int, batch: int = 256) -> Tensor:  # type: ignore[no-untyped-def]
    """Exit states without CLS, float16 [N, patches, width], after `depth` blocks."""
    out = []
    for start in range(0, len(images), batch):
        with autocast():
            states = model.model.vision_tower(normalise(images[start : start + batch]), output_hidden_states=True)
        out.append(states.hidden_states[depth][:, 1:].to(torch.float16))
    return torch.cat(out)


def encode(processor, prompt: str, target: str, picture: bool, patches: int) -> tuple[list[int], int]:  # type: ignore[no-untyped-def]
    """Token ids of a whole exchange, and the position where the answer starts."""
    content = ([{"type": "image"}] if picture else []) + [{"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = processor.tokenizer(text.replace("<image>", "<image>" * patches))["input_ids"]
    # The tokenizer itself prepends the one space that the chat layout wants before the answer.
    answer = processor.tokenizer(target, add_special_tokens=False)["input_ids"]
    return [*ids, *answer, processor.tokenizer.eos_token_id], len(ids)


def _batches(rows: list[tuple[list[int], int]], size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless seeded batches; rows of like length go together so that little is padded."""
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, len(order), size * 16):
            block = sorted(order[start : start + size * 16].tolist(), key=lambda i: len(rows[i][0]))
            groups = [np.asarray(block[i : i + size]) for i in range(0, len(block), size)]
            for g in rng.permutation(len(groups)):
                yield groups[g]


def answer_loss(model, rows: list[tuple[list[int], int]], exits: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
    """Cross-entropy on the answers. rows: (ids, answer start); exits: [B, patches, width] or None for text alone."""
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


def train_text(model, modules, rows, states, steps, recipe: Recipe, log: Log, stage: str) -> None:  # type: ignore[no-untyped-def]
    """One stage of training on answers; only `modules` move."""
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


def _text_rows(processor, recipe: Recipe) -> list[tuple[list[int], int]]:  # type: ignore[no-untyped-def]
    """Text-only exchanges: text-borne requests, harmful and not."""
    rows = []
    for i in range(4000):
        family = "text-harm" if i % 2 else "text-lookalike"
        s = sample(family, "train", i, seed=recipe.seed + 1)
        rows.append(encode(processor, s.prompt, s.target, picture=False, patches=0))
    return rows


def build(out: Path, recipe: Recipe, say: Callable[[str], None] = print) -> None:
    """Build the reference model into the new folder `out` (safetensors in float16, processor files, training log).

    A build that was cut off after the tower's stage goes on from there, if it is called with the same recipe.
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
    model = LlavaForConditionalGeneration(make_config(recipe, processor.tokenizer))
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


def train_language_side(model, processor, recipe: Recipe, log: Log) -> None:  # type: ignore[no-untyped-def]
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
