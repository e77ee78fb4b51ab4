"""The sizes that a memory plan is made of, read from config.json, the safetensors headers and the rows' lengths.

No weight is loaded.

B rows, S tokens of request and answer, A answer tokens, P patches, W tower width, D text width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgesafe.align.features import chunk_rows
from edgesafe.align.settings import LORA, AlignConfig
from edgesafe.checkpoint import shards
from edgesafe.checkpoint.load import open_geometry
from edgesafe.errors import ConfigError, EdgesafeError

Shapes = Mapping[str, tuple[int, ...]]

# Float32 arrays [B, A, V] that are alive at once: logits, scaled logits, log-softmax and two gradients.
LOGITS = 5
# Tokens that a chat layout puts around a request, and the lengths of a row whose data or tokenizer can't be read here.
_LAYOUT, _PROMPT, _ANSWER = 16, 48, 24


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest request with its picture, of the longest wanted answer, and the number of rows."""

    request: int
    answer: int
    rows: int


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

    @property
    def plain(self) -> int:
        """Values that a token takes in one block without a backward pass."""
        return self.layer + 4 * self.width


@dataclass(frozen=True)
class Footprint:
    """What an objective's update holds, as far as objectives differ.

    answer: tokens of the longest answer in an update. answers: for each row; a pair has two. parts: backward passes into which
    an update's rows are dealt. arrays: float32 arrays [B, A, V] beside those of a cross-entropy. phases: what else comes and
    goes before or within an update, in float32 values by name.
    """

    answer: int
    answers: int = 1
    parts: int = 1
    arrays: int = 0
    phases: Mapping[str, float] = field(default_factory=dict)


def wanted_answers(config: AlignConfig, s: Sizes, lengths: Lengths, rows: int) -> Footprint:
    """The footprint of one pass over rows with their wanted answers."""
    return Footprint(lengths.answer)


def read_headers(folder: Path, reader: shards.Reader = shards.ON_DISK) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes by name of all weights of a checkpoint folder, and its files' bytes; no weight is read.

    Args:
        folder: the checkpoint.
        reader: looks at its files of weights.

    Raises:
        InputError: a file of weights is missing or damaged.
    """
    headers = shards.read_headers(folder, reader)
    files = {stored.file for stored in headers.values() if stored.file.is_file()}  # one on the hub has no bytes here yet
    return {name: stored.shape for name, stored in headers.items()}, sum(file.stat().st_size for file in files)


def _unreadable(path: Path, expected: str) -> ConfigError:
    return ConfigError(
        "the checkpoint's sizes can't be read",
        where=str(path),
        expected=expected,
        todo="use an intact Hugging Face checkpoint folder",
    )


def read_sizes(model_dir: Path, shapes: Shapes, config: AlignConfig) -> Sizes:
    """Sizes of the model's parts.

    A block of the language model keeps for each token: both norms' inputs and outputs (4 D), queries, keys and values and what
    attention gives (2 Dq + 2 Dkv), four arrays of the gated MLP's width, an adapter's inner values; eager attention keeps its
    weights twice; full tuning the norms' inner values (2 D). The tower keeps one state per block and works with a few more.

    Raises:
        ConfigError: no config.json, or one of another family.
    """
    try:
        whole, geometry = open_geometry(model_dir)
        vocabulary, width = next(shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight"))
    except (StopIteration, ValueError, EdgesafeError) as error:
        raise _unreadable(model_dir / "config.json", "config.json of a vision-language checkpoint") from error
    wide, blocks = geometry.vision_width, geometry.n_blocks
    queries, keys, gated = (_rows(shapes, name) for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"))
    layer = 4 * width + 2 * queries + 2 * keys + 4 * gated
    layer += config.lora.r * len(config.lora.targets) if config.tune == LORA else 2 * width
    layers = int(whole.text_config.num_hidden_layers)
    at_work = (6 * wide + 2 * geometry.vision_inner) * geometry.tokens + 3 * geometry.image_size**2
    tower = (blocks + 1) * geometry.tokens * wide + at_work
    chunk = chunk_rows(blocks, geometry.states, wide)
    state = geometry.states * wide
    return Sizes(layer, 2 * keys * layers, tower, layers, width, vocabulary, geometry.rows, state, blocks, chunk)


def _rows(shapes: Shapes, layer: str) -> int:
    """Outputs of a linear layer of the language model's first block."""
    return next((s[0] for name, s in shapes.items() if name.endswith(f"{layer}.weight") and "vision" not in name), 0)


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
    return Lengths(image_tokens + prompt + _LAYOUT, answer, len(rows))


def language_width(language: Shapes) -> int:
    """D, from the embedding."""
    return next((shape[1] for name, shape in language.items() if name.endswith("embed_tokens.weight")), 0)
