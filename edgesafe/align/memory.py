"""What memory a run needs, before anything is loaded: from config.json, the safetensors headers and the rows' lengths.

MiB everywhere. B rows, S tokens of request and answer, A answer tokens, P patches, W tower width, D text width, V vocabulary.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from edgesafe import machine
from edgesafe.align.objectives.table import find_objective
from edgesafe.align.settings import HARM, LORA, MUON, AlignConfig, with_tune
from edgesafe.align.sizes import LOGITS, Lengths, Shapes, Sizes, language_width, read_headers, read_lengths, read_sizes
from edgesafe.checkpoint.shards import ON_DISK, Reader
from edgesafe.errors import EdgesafeError
from edgesafe.format.exits import parse_exits
from edgesafe.progress import speaks

FLOAT = 4  # bytes
# Resident after torch, transformers, peft and accelerate have been imported and have run once: 418 measured.
LIBRARIES_MIB = 450.0
# What the allocator holds for the backward pass, over what is alive: freed tensors of a few MiB leave holes that the next ones
# don't fit (glibc 2.36). Measured: 2.8 at half a billion weights and rows of 230 tokens, 1.5 on the reference model; 1.0, and
# slower updates, with MALLOC_MMAP_THRESHOLD_=1048576 in the environment.
FRAGMENTED = 2.2


@dataclass(frozen=True)
class Memory:
    """MiB of one process by part; `total` is the peak.

    weights: float32, the reward model's too. frozen: the reference policy's copy, for full tuning. trained: an adapter, the
        gradients, the optimizer's state and a copy of the best weights. cache: tower states and teacher answers that are kept.
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
        """The peak, MiB."""
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
        named = [f"{name} {mib / 1024:.1f}" for name, mib in parts.items() if mib >= 51.2]
        return f"needs about {self.total / 1024:.1f} GiB: {', '.join(named)}"


def estimate(
    model_dir: Path, config: AlignConfig, *, processes: int = 1, lengths: Lengths | None = None, reader: Reader = ON_DISK
) -> Memory:
    """Memory that `align` needs, from headers alone.

    Args:
        model_dir: checkpoint folder.
        config: settings; `config.data` is read for the rows' lengths where it is there.
        processes: among which an update's rows are dealt out.
        lengths: of the rows, where they are not in a folder yet.
        reader: looks at the files of weights.

    Returns:
        MiB of one process.

    Raises:
        ConfigError: no config.json that can be read, or exits that the model does not have.
        InputError: a file of weights is missing or damaged.

    Differs: from the peak RSS measured here (float32, one thread, glibc 2.36): reference model +19 % for self-distill (1110 for
        935 MiB) and +11 % for l-ppo (1058 for 956), -13 % for l-ppo on half a billion weights (5755 for 6649; `make fullsize`).
        Full tuning by Muon is guessed too high, +48 % (1579 for 1065): its backward pass leaves fewer holes than an adapter's.
        Holes are not the same from run to run: one update of a small model took between 780 and 1360 MiB, estimated at 1328.
    """
    shapes, stored = read_headers(model_dir, reader)
    language = language_of(shapes)
    whole = sum(map(math.prod, language.values()))
    config = with_tune(config, whole)
    s = read_sizes(model_dir, shapes, config)
    lengths = lengths or read_lengths(model_dir, config, s.image_tokens)
    trained = trained_values(language, config)
    full = 0 if config.tune == LORA else whole
    states = 1 if config.optimizer == MUON else 2
    copies = (
        1 + states + (config.tune == LORA) + config.eval.choose
    )  # gradient, optimizer, the adapter itself, the best weights
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
    folder = Path(config.reward.model)
    if not (find_objective(config.method).needs_reward and config.reward.model and folder.is_dir()):
        return 0
    return sum(map(math.prod, read_headers(folder)[0].values()))


def language_of(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The weights of the language model, its head included."""
    return {name: shape for name, shape in shapes.items() if "vision" not in name and "projector" not in name}


def trained_values(language: Shapes, config: AlignConfig) -> int:
    """How many numbers training moves.

    Those of the language model, of its blocks' matrices and the output layer for muon, or of the adapter's factors; and of a
    value head where the objective has one.

    >>> c = AlignConfig(tune="lora")
    >>> trained_values({"layers.0.q_proj.weight": (8, 4), "norm.weight": (4,)}, c) == c.lora.r * (8 + 4)
    True
    """
    if config.tune == LORA:
        chosen = (s for name, s in language.items() if name.split(".")[-2] in config.lora.targets and len(s) == 2)
        count = sum(config.lora.r * sum(shape) for shape in chosen)
    else:
        count = sum(math.prod(s) for name, s in language.items() if config.optimizer != MUON or _by_muon(name, s))
    return count + (language_width(language) + 1 if find_objective(config.method).has_value_head else 0)


def _by_muon(name: str, shape: tuple[int, ...]) -> bool:
    """Whether Muon trains a weight: a matrix of a block or the output layer, which has no name where it is the embedding."""
    return (".layers." in name or name.endswith("lm_head.weight")) and len(shape) == 2


def working(s: Sizes, config: AlignConfig, lengths: Lengths, processes: int) -> dict[str, float]:
    """Bytes by phase that come and go while the run is under way."""
    objective = find_objective(config.method)
    update = -(-(config.batch_size + config.reference_rows) // processes)
    held = objective.memory(config, s, lengths, update)
    tokens, logits = lengths.request + held.answer, held.answer * s.vocabulary
    chunk = min(s.chunk, lengths.rows or s.chunk)
    if config.cache_gib == 0 or config.sampler == HARM:
        chunk = min(chunk, config.batch_size)
    tower = chunk * s.tower
    if objective.needs_teacher:
        tower += chunk * (tokens * s.plain + 3 * logits)
    rows = -(-update // held.parts) * held.answers
    kept = s.blocks * s.width + s.layer if config.gradient_checkpointing else s.blocks * s.layer
    step = FRAGMENTED * rows * tokens * (kept + s.layer) + rows * (LOGITS + held.arrays) * logits
    phases = {"the tower": tower, "an update": step, **held.phases}
    return {name: values * FLOAT for name, values in phases.items()}


def cache_bytes(model_dir: Path, s: Sizes, config: AlignConfig, lengths: Lengths) -> float:
    """Bytes of the features that are kept, float16: those of the whole run, or of one update where they exceed `cache_gib`."""
    exits = len(parse_exits(config.exits, s.tower_blocks, None)) + 1
    teacher = lengths.answer * s.vocabulary if find_objective(config.method).needs_teacher else 0

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
    """Print what a run needs, and whether this machine has it, on stderr; an unreadable checkpoint is left to loading."""
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
