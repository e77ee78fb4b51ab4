"""What the steps of `ship` compute and move, counted from a checkpoint's headers, and how fast this machine does either.

Operations are multiply-adds times two of matrix products, attention's among them. Bytes are those that plain operations write
and read between the products, and the weights that each token of an answer reads. No weight is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgesafe.align.settings import LORA, MUON, AlignConfig
from edgesafe.format import graph_io

if TYPE_CHECKING:
    import torch

    from edgesafe.align.sizes import Sizes
    from edgesafe.format.specs import GraphSpec
    from edgesafe_export.skeleton import Sketch

FLOAT = 4  # bytes
# Newton and Schulz's steps of an update by Muon (torch.optim.Muon).
_MUON_STEPS = 5
# An optimizer reads and writes each number that it moves, its gradient and its state.
_MOVES = 8
# Seconds that onnxruntime takes for a token of an answer however small the decoder, and by how much its int8 products are
# faster than float32 ones: RESULTS, "Published shapes", and the certificate of the reference model.
_TOKEN_S, _INT8 = 0.0004, 2.0


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second: operations of matrix products, and bytes that plain operations write and read."""

    operations: float
    moved: float

    def seconds(self, operations: float, moved: float = 0.0) -> float:
        """Time of some work; products and plain operations take turns."""
        return operations / self.operations + moved / self.moved


def measure_rates(width: int, inner: int, dtype: torch.dtype, seconds: float = 0.4) -> Rates:
    """Time products of a decoder's shape and plain sums, `seconds` each, as a calm machine does them.

    The products run on one thread and count for each of torch's: on a busy machine several threads wait for each other so
    long that not one run in a second is undisturbed, and one thread has such runs.

    Args:
        width: columns of the left matrix; an MLP's width.
        inner: columns of the right one; the width inside it.
        dtype: of the products.
        seconds: of each of the two; the fastest run counts.
    """
    import torch

    # Small enough to end before the system takes the core away, large enough for the rate of any larger one.
    left = torch.ones(256, min(width, 768), dtype=dtype)
    right = torch.ones(left.shape[1], min(inner, 768), dtype=dtype)
    plain = torch.ones(2**24)  # 64 MiB: larger than most caches
    total = _fastest(lambda: torch.add(plain, plain, out=plain), seconds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        product = _fastest(lambda: left @ right, seconds) / threads
    finally:
        torch.set_num_threads(threads)
    return Rates(2 * left.numel() * right.shape[1] / product, 2 * FLOAT * plain.numel() / total)


def _fastest(run: Callable[[], object], seconds: float) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


@dataclass(frozen=True)
class Text:
    """Tokens of a request with its picture, and of an answer; means."""

    request: float
    answer: float


@dataclass(frozen=True)
class Costs:
    """A checkpoint's parts.

    first, block, head: operations of the picture's embedding with the first block, of any later one, and of the projector, for
        a picture or tile. layers, lm_head: of one token. attention: of one token that looks at one other, in all layers.
    values: float32 numbers that the layers write for a token, without a backward pass. weights: of the decoder and its head.
    reference, blocks: depths. matrices: shapes of the decoder's blocks', for Muon. output: the output layer's beside them,
        unless it is the embedding.
    """

    first: int
    block: int
    head: int
    layers: int
    lm_head: int
    attention: int
    values: int
    weights: int
    vocabulary: int
    reference: int
    blocks: int
    matrices: tuple[tuple[int, int], ...]
    output: tuple[tuple[int, int], ...]

    def tower(self, depth: int) -> int:
        """Operations of a picture or tile through so many blocks."""
        return self.first + (depth - 1) * self.block

    def reading(self, tokens: float, answered: float) -> float:
        """Operations of one row through the decoder: all its tokens, and logits at so many of them."""
        return tokens * self.layers + tokens**2 * self.attention + answered * self.lm_head

    def moved(self, tokens: float, answered: float) -> float:
        """Bytes that plain operations write and read for it."""
        return 2.0 * FLOAT * (tokens * self.values + answered * self.vocabulary)

    def answering(self, rates: Rates, rows: float, tokens: float, answer: float, longest: int, batch: int) -> float:
        """Seconds of greedy answers in batches: the requests are read, then each token reads the weights once a batch."""
        made = rows * answer * (self.layers + self.lm_head + (tokens + answer / 2) * self.attention)
        read = rates.seconds(rows * (self.head + self.reading(tokens, 1)), rows * self.moved(tokens, 1))
        return read + rates.seconds(made, -(-rows // batch) * longest * FLOAT * self.weights)


def count(sketch: Sketch, sizes: Sizes) -> Costs:
    """The costs of a checkpoint's parts.

    Args:
        sketch: the checkpoint without its weights.
        sizes: as `edgesafe.align.sizes.read_sizes` gives them.
    """
    from torch import nn

    from edgesafe_export.graphs import layer_operations, operations

    family, geometry = sketch.family, sketch.family.geometry
    picture, state = (1, 3, geometry.image_size, geometry.image_size), (1, geometry.tokens, geometry.vision_width)
    causal, config = family.decoder(), family.text_config
    layer = causal.model.layers[0]
    matrices = [(m.out_features, m.in_features) for m in layer.modules() if isinstance(m, nn.Linear)]
    weights = sketch.layers * sum(rows * columns for rows, columns in matrices) + causal.lm_head.weight.numel()
    return Costs(
        first=operations(family.segment(0, 1), *picture),
        block=operations(family.segment(1, 2), *state) if geometry.n_blocks > 1 else 0,
        head=operations(family.head(), *state),
        layers=sketch.layers * layer_operations(layer),
        lm_head=layer_operations(nn.ModuleList([causal.lm_head])),
        attention=sketch.layers * 2 * 2 * config.num_attention_heads * geometry.head_dim,
        values=sketch.layers * sizes.layer,
        weights=weights,
        vocabulary=sizes.vocabulary,
        reference=geometry.reference_depth,
        blocks=geometry.n_blocks,
        matrices=tuple(matrices) * sketch.layers,
        output=() if family.tied else ((causal.lm_head.out_features, causal.lm_head.in_features),),
    )


def update_seconds(costs: Costs, rates: Rates, config: AlignConfig, tokens: float, answer: float, trained: int) -> float:
    """One update of `l-sft` or `self-distill`: forward and backward pass over all rows, and the optimizer.

    Args:
        costs: of the checkpoint.
        rates: of this machine.
        config: settings, `tune` decided.
        tokens: of a row as it is padded, its answer included.
        answer: tokens of its answer as it is padded.
        trained: numbers that training moves.
    """
    rows, adapter = config.batch_size + config.reference_rows, config.tune == LORA
    # Backwards, products give the gradient of the states, and where weights learn theirs too.
    passes = 1 + (1 if adapter else 2) + config.gradient_checkpointing
    forward = costs.reading(tokens, answer)
    work = rows * (costs.head + passes * forward)
    if config.optimizer == MUON:
        rank = config.lora.r
        shapes = [(rank, n) for shape in costs.matrices for n in shape] if adapter else costs.matrices + costs.output
        work += sum(_muon(min(shape), max(shape)) for shape in shapes)
    return rates.seconds(work, rows * 3 * costs.moved(tokens, answer) + _MOVES * FLOAT * trained)


def _muon(short: int, long: int) -> int:
    """Operations of Newton and Schulz's iteration on a matrix: twice a product with its transpose's size, once a square."""
    return _MUON_STEPS * (4 * short**2 * long + 2 * short**3)


def certify_seconds(
    specs: dict[str, GraphSpec],
    chains: Iterable[Iterable[str]],
    costs: Costs,
    rates: Rates,
    rows: int,
    tiles: int,
    text: Text,
    sessions: int = 1,
) -> float:
    """A suite through a bundle's graphs: for each row the shared vision graphs once, then each exit's answer.

    Args:
        specs: the bundle's graphs.
        chains: each exit's vision graphs.
        costs: of the checkpoint.
        rates: of this machine.
        rows: of the suite.
        tiles: how often the tower runs for a picture.
        text: tokens of a request and of an answer.
        sessions: that answer side by side. The rates are all cores' already; what a token takes beside its products is shared.
    """
    chains = [tuple(chain) for chain in chains]
    fast = Rates(rates.operations * _INT8, rates.moved)
    vision = tiles * sum(specs[path].flops or 0 for path in {path for chain in chains for path in chain})
    token = fast.seconds(costs.layers + costs.lm_head, specs[graph_io.DECODER_PATH].weight_bytes) + _TOKEN_S / sessions
    answer = fast.seconds(costs.reading(text.request, 1)) + text.answer * token
    return rows * (fast.seconds(vision) + len(chains) * answer)
