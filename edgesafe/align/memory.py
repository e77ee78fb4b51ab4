"""What memory a run needs, told before anything is loaded: from config.json, the safetensors headers and the rows' lengths.

MiB everywhere. B rows, S tokens of request and answer, A answer tokens, P patches, W tower width, D text width, V vocabulary.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgesafe import machine
from edgesafe.align.config import HARM, L_DPO, L_PPO, LORA, MUON, SELF_DISTILL, AlignConfig, with_tune
from edgesafe.align.features import chunk_rows
from edgesafe.align.rollout import LOGIT_BYTES
from edgesafe.checkpoint import shards
from edgesafe.errors import ConfigError, EdgesafeError
from edgesafe.format.exits import parse_exits
from edgesafe.progress import speaks

Shapes = Mapping[str, tuple[int, ...]]

FLOAT = 4  # bytes
# Resident after torch, transformers, peft and accelerate have been imported and have run once: 418 seen.
LIBRARIES_MIB = 450.0
# What the allocator holds for the backward pass, over what is alive: freed tensors of a few MiB leave holes that the next ones
# don't fit (glibc 2.36). 2.8 seen at half a billion weights and rows of 230 tokens, 1.5 on the reference model; 1.0, and slower
# updates, with MALLOC_MMAP_THRESHOLD_=1048576 in the environment.
FRAGMENTED = 2.2
# Answers of `l-dpo` are sampled up to this many tokens (`l_dpo.find_pairs`).
_DPO_TOKENS = 32
# Tokens that a chat layout puts around a request, and the lengths of a row whose data or tokenizer can't be read here.
_LAYOUT, _PROMPT, _ANSWER = 16, 48, 24
# Float32 arrays [B, A, V] that are alive at once: logits, scaled logits, log-softmax and two gradients; what a teacher adds.
_LOGITS, _TAUGHT = 5, 3


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest request with its picture, of the longest wanted answer, and the number of rows."""

    request: int
    answer: int
    rows: int


@dataclass(frozen=True)
class Memory:
    """MiB of one process by part; `total` is the peak.

    weights: float32, the reward model's too. frozen: the reference policy's copy, for full tuning. trained: an adapter, the
        gradients, the optimizer's state and the best look's copy. cache: tower states and teacher answers that are kept.
    working: what comes and goes, at its largest, which `phase` names. loading: beside the weights while they are read, before
        there is anything else.
    """

    weights: float
    frozen: float
    trained: float
    cache: float
    working: float
    phase: str
    loading: float
    libraries: float = LIBRARIES_MIB

    @property
    def total(self) -> float:
        return self.libraries + self.weights + max(self.loading, self.frozen + self.trained + self.cache + self.working)

    def line(self) -> str:
        """One line for people.

        >>> Memory(2048, 0, 512, 0, 1024, "an update", 100, libraries=0).line()
        'needs about 3.5 GiB: weights 2.0, adapter and optimizer 0.5, an update 1.0'
        """
        parts = {
            "weights": self.weights,
            "frozen copy": self.frozen,
            "adapter and optimizer" if not self.frozen else "gradients and optimizer": self.trained,
            "kept features": self.cache,
            self.phase: self.working,
            "libraries": self.libraries,
        }
        shown = [f"{name} {mib / 1024:.1f}" for name, mib in parts.items() if mib >= 51.2]
        return f"needs about {self.total / 1024:.1f} GiB: {', '.join(shown)}"


@dataclass(frozen=True)
class Sizes:
    """What the phases are computed from, in numbers of float32 values unless they say otherwise.

    layer: kept for the backward pass for each token and block. kv: keys and values of a token in all blocks. tower: kept and at
        work for each picture in the tower. blocks: of the language model. image_tokens: P. states: P x W of one exit.
        chunk: pictures that the tower sees at once.
    """

    layer: int
    kv: int
    tower: int
    blocks: int
    width: int
    vocabulary: int
    image_tokens: int
    states: int
    tower_blocks: int
    chunk: int


def estimate(model_dir: Path, config: AlignConfig, *, processes: int = 1) -> Memory:
    """Memory that `align` needs, from headers alone.

    Args:
        model_dir: checkpoint folder.
        config: settings; `config.data` is read for the rows' lengths where it is there.
        processes: among which an update's rows are dealt out.

    Returns:
        MiB of one process.

    Raises:
        ConfigError: no config.json that can be read, or exits that the model does not have.
        InputError: a file of weights is missing or damaged.

    Differs: from the peak RSS measured here (float32, one thread, glibc 2.36): reference model +19 % for self-distill (1110 for
        935 MiB) and +11 % for l-ppo (1058 for 956), -13 % for l-ppo on half a billion weights (5755 for 6649; `make fullsize`).
        Full tuning by Muon is guessed too high, +48 % (1579 for 1065): its backward pass leaves fewer holes than an adapter's.
    """
    shapes, stored = read_headers(model_dir)
    language = {name: shape for name, shape in shapes.items() if "vision" not in name and "projector" not in name}
    whole = sum(map(math.prod, language.values()))
    config = with_tune(config, whole)
    s = sizes(model_dir, shapes, config)
    lengths = read_lengths(model_dir, config, s.image_tokens)
    trained = trained_values(language, config)
    full = 0 if config.tune == LORA else whole
    states = 1 if config.optimizer == MUON else 2
    copies = 1 + states + (config.tune == LORA) + config.eval.choose  # gradient, optimizer, the adapter itself, the best look's
    phases = working(s, config, lengths, processes)
    phases["writing a checkpoint"] = 2 * (1 + states) * trained * FLOAT
    phase = max(phases, key=lambda name: phases[name])
    parts = (
        FLOAT * (sum(map(math.prod, shapes.values())) + _reward_values(config)),
        FLOAT * full,
        FLOAT * trained * copies,
        cache_bytes(model_dir, s, config, lengths),
        phases[phase],
    )
    weights, frozen, moving, cache, work = (part / 2**20 for part in parts)
    return Memory(weights, frozen, moving, cache, work, phase, stored / 2**20)


def _reward_values(config: AlignConfig) -> int:
    """Weights of the reward model, where it is a folder; one of the hub has no headers here."""
    judged = config.method in (L_PPO, L_DPO) and config.reward.model and Path(config.reward.model).is_dir()
    return sum(map(math.prod, read_headers(Path(config.reward.model))[0].values())) if judged else 0


def read_headers(folder: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes by name of all weights of a checkpoint folder, and its files' bytes; no weight is read.

    Raises:
        InputError: a file of weights is missing or damaged.
    """
    found = shards.read_headers(folder)
    files = {stored.file for stored in found.values()}
    return {name: stored.shape for name, stored in found.items()}, sum(file.stat().st_size for file in files)


def _unreadable(path: Path, expected: str) -> ConfigError:
    return ConfigError(
        "the checkpoint's sizes can't be read",
        where=str(path),
        expected=expected,
        todo="use an intact Hugging Face checkpoint folder",
    )


def sizes(model_dir: Path, shapes: Shapes, config: AlignConfig) -> Sizes:
    """Sizes of the model's parts.

    A block of the language model keeps for each token: both norms' inputs and outputs (4 D), queries, keys and values and what
    attention gives (2 Dq + 2 Dkv), four arrays of the gated MLP's width, an adapter's inner values; eager attention keeps its
    weights twice; full tuning the norms' inner values (2 D). The tower keeps a state a block and works with a few more.

    Raises:
        ConfigError: no config.json, or one of another family.
    """
    try:
        whole = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        text, vision = whole["text_config"], whole["vision_config"]
        side, patch = int(vision.get("image_size", 224)), int(vision.get("patch_size", 32))
        wide, blocks = int(vision["hidden_size"]), int(vision.get("num_hidden_layers", _blocks(shapes, "vision")))
        patches = (side // patch) ** 2
        tokens = patches // int(whole.get("scale_factor", 1)) ** 2
        vocabulary, width = next(shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight"))
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, StopIteration) as error:
        raise _unreadable(model_dir / "config.json", "config.json of a vision-language checkpoint") from error
    queries, keys, gated = (_rows(shapes, name) for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"))
    layer = 4 * width + 2 * queries + 2 * keys + 4 * gated
    layer += config.lora.r * len(config.lora.targets) if config.tune == LORA else 2 * width
    layers = int(text.get("num_hidden_layers", _blocks(shapes)))
    at_work = (6 * wide + 2 * int(vision.get("intermediate_size", 4 * wide))) * (patches + 1) + 3 * side * side
    tower = (blocks + 1) * (patches + 1) * wide + at_work
    chunk = chunk_rows(blocks, patches, wide)
    return Sizes(layer, 2 * keys * layers, tower, layers, width, vocabulary, tokens, patches * wide, blocks, chunk)


def _rows(shapes: Shapes, layer: str) -> int:
    """Outputs of a linear layer of the language model's first block."""
    return next((s[0] for name, s in shapes.items() if name.endswith(f"{layer}.weight") and "vision" not in name), 0)


def _blocks(shapes: Shapes, part: str = "") -> int:
    """Blocks of the language model, or of the tower."""
    return sum(name.endswith("self_attn.q_proj.weight") and ("vision" in name) == bool(part) for name in shapes)


def read_lengths(model_dir: Path, config: AlignConfig, image_tokens: int) -> Lengths:
    """The longest request and answer of the data folder, in tokens; stated assumptions where they can't be read."""
    try:
        from tokenizers import Tokenizer

        from edgesafe.format.suite import read_suite

        rows = read_suite(Path(config.data), verify=False).rows
        tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        prompts, answers = (
            [len(e.ids) for e in tokenizer.encode_batch([getattr(r, k) for r in rows])] for k in ("prompt", "target")
        )
        prompt, answer = max(prompts), max(answers)
    except Exception:  # a folder that can't be read is for `align` to complain about; tokenizers raises bare Exceptions
        rows, prompt, answer = (), _PROMPT, _ANSWER
    if config.method == L_PPO:
        answer = config.ppo.max_new_tokens
    elif config.method == L_DPO:
        answer = max(answer, _DPO_TOKENS)
    return Lengths(image_tokens + prompt + _LAYOUT, answer, len(rows))


def trained_values(language: Shapes, config: AlignConfig) -> int:
    """Numbers that training moves: the language model, of it the blocks' matrices for muon, or the adapter's factors; the value
    head of `l-ppo`.

    >>> c = AlignConfig(tune="lora")
    >>> trained_values({"layers.0.q_proj.weight": (8, 4), "norm.weight": (4,)}, c) == c.lora.r * (8 + 4)
    True
    """
    if config.tune == LORA:
        chosen = (s for name, s in language.items() if name.split(".")[-2] in config.lora.targets and len(s) == 2)
        count = sum(config.lora.r * sum(shape) for shape in chosen)
    else:
        count = sum(math.prod(s) for name, s in language.items() if config.optimizer != MUON or _in_block(name, s))
    return count + (language_width(language) + 1 if config.method == L_PPO else 0)


def _in_block(name: str, shape: tuple[int, ...]) -> bool:
    return ".layers." in name and len(shape) == 2


def language_width(language: Shapes) -> int:
    """D, from the embedding."""
    return next((shape[1] for name, shape in language.items() if name.endswith("embed_tokens.weight")), 0)


def working(s: Sizes, config: AlignConfig, lengths: Lengths, processes: int) -> dict[str, float]:
    """Bytes by phase that come and go while the run is under way."""
    tokens = lengths.request + lengths.answer
    update = -(-(config.batch_size + config.reference_rows) // processes)
    chunk = min(s.chunk, lengths.rows or s.chunk)
    if config.cache_gib == 0 or config.sampler == HARM:
        chunk = min(chunk, config.batch_size)
    logits = lengths.answer * s.vocabulary
    plain = s.layer + 4 * s.width  # of one block, without a backward pass
    tower = chunk * s.tower
    if config.method == SELF_DISTILL:
        tower += chunk * (tokens * plain + 3 * logits)
    backward = 1 if config.method != L_PPO else config.ppo.minibatches
    rows = -(-update // backward) * (2 if config.method == L_DPO else 1)
    kept = s.blocks * s.width + s.layer if config.gradient_checkpointing else s.blocks * s.layer
    taught = _TAUGHT if config.method == SELF_DISTILL else 2 if config.method == L_DPO else 0
    step = FRAGMENTED * rows * tokens * (kept + s.layer) + rows * (_LOGITS + taught) * logits
    phases = {"the tower": tower, "an update": step}
    if config.method == L_PPO:
        seen = min(update * logits, LOGIT_BYTES / FLOAT + logits)
        phases["sampling"] = update * tokens * (2 * s.kv + plain) + (_LOGITS + 1) * seen
    if config.method == L_DPO:
        phases["finding pairs"] = min(s.chunk, config.dpo.rows) * (s.tower + tokens * (2 * s.kv + plain))
    return {name: values * FLOAT for name, values in phases.items()}


def cache_bytes(model_dir: Path, s: Sizes, config: AlignConfig, lengths: Lengths) -> float:
    """Bytes of the features that are kept, float16: those of the whole run, or of one update where they exceed `cache_gib`."""
    exits = len(parse_exits(config.exits, s.tower_blocks)) + 1
    teacher = lengths.answer * s.vocabulary if config.method == SELF_DISTILL else 0

    def size(draws: int) -> float:
        rows = min(lengths.rows or draws, draws)
        again = min(rows, draws * config.reference_rows // config.batch_size)
        return 2.0 * (min(rows * exits, again + draws) * s.states + rows * teacher)

    whole = size(config.steps * config.batch_size)
    fits = whole <= config.cache_gib * 2**30 and config.sampler != HARM
    return whole if fits else size(config.batch_size)


def free_mib() -> float | None:
    """Memory that a process could still get here: the GPU's where there is one, else what Linux and its cgroup leave."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0]) / 2**20
    return machine.free_mib()


def say_need(model_dir: Path, config: AlignConfig) -> None:
    """Print what a run needs, and whether this machine has it, on stderr; a need that can't be told is left to the run."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        need = estimate(model_dir, config, processes=processes)
    except EdgesafeError:
        return  # loading says what is wrong with the checkpoint
    if not speaks():
        return
    print(f"  {describe(need, free_mib(), int(os.environ.get('LOCAL_WORLD_SIZE', '1')))}", file=sys.stderr, flush=True)


def describe(need: Memory, free: float | None, processes: int = 1) -> str:
    """The need beside what is free; `processes` share the machine.

    >>> describe(Memory(2048, 0, 0, 0, 0, "an update", 0, libraries=0), 1024.0)
    'needs about 2.0 GiB: weights 2.0; MORE than the 1.0 GiB that are free: lower batch_size, or set gradient_checkpointing'
    """
    each = f" in each of {processes} processes" if processes > 1 else ""
    if free is None:
        return need.line() + each
    short = need.total * processes > free
    more = f"MORE than the {free / 1024:.1f} GiB that are free: lower batch_size, or set gradient_checkpointing"
    return f"{need.line()}{each}; {more if short else f'{free / 1024:.1f} GiB are free'}"
