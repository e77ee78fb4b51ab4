"""What the frozen parts give, once: exit states of the tower, and the untouched model's answers at its reference depth.

Which rows meet which exits is known before a run starts (`train.draw_update`), so the tower and the teacher see each row once,
in an order that does not depend on where an interrupted run resumes. P patches, W tower width, A answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgesafe.align.data import Example, collate
from edgesafe.checkpoint.exit_model import (
    ExitModel,
    answer_logits,
    autocast,
    exit_state,
    exit_states,
    open_images,
    pixel_values,
)
from edgesafe.format.exits import Exit

CHUNK, CHUNK_BYTES = 64, 2**30  # rows that the tower sees at once, and what their states may take
Need = Mapping[int, frozenset[Exit]]  # row number -> exits at which it is wanted; a teacher adds the reference


@dataclass(frozen=True)
class Features:
    """states: {(row, exit): [P, W]}. teacher: {row: [A, V] log-probabilities}, empty without a teacher. float16."""

    states: Mapping[tuple[int, Exit], Tensor]
    teacher: Mapping[int, Tensor]

    def stack_teacher(self, rows: Sequence[int]) -> Tensor | None:
        """The teacher's log-probabilities, float32 [B, A, V] padded with zeros; None without a teacher."""
        if not self.teacher:
            return None
        return torch.nn.utils.rnn.pad_sequence([self.teacher[row].float() for row in rows], batch_first=True)


def merge_needs(updates: Iterable[tuple[Exit, Sequence[int]]]) -> dict[int, frozenset[Exit]]:
    """Exits by row from (exit, rows) of each update.

    >>> merge_needs([(Exit(3), [0, 1]), (Exit(5), [1])])[1] == {Exit(3), Exit(5)}
    True
    """
    need: dict[int, set[Exit]] = {}
    for exit, rows in updates:
        for row in rows:
            need.setdefault(row, set()).add(exit)
    return {row: frozenset(exits) for row, exits in need.items()}


def size_gib(llava: ExitModel, examples: Sequence[Example], need: Need, *, teacher: bool) -> float:
    """Memory that `compute` will hold, in GiB."""
    config = llava.model.config
    state: int = llava.geometry.states * llava.geometry.vision_width
    values = sum(len(exits) * state for exits in need.values())
    if teacher:
        values += sum(len(examples[row].answer) * config.text_config.vocab_size for row in need)
    return 2 * values / 2**30


def chunk_rows(blocks: int, patches: int, width: int) -> int:
    """Rows that the tower sees at once: `CHUNK`, or fewer of a large one, as all blocks' states of a chunk are held together.

    >>> chunk_rows(13, 36, 192), chunk_rows(24, 576, 1024)  # the reference model's, CLIP ViT-L/14's on 336 px
    (64, 18)
    """
    return max(1, min(CHUNK, CHUNK_BYTES // (4 * (blocks + 1) * (patches + 1) * width)))


def chunk_of(llava: ExitModel) -> int:
    """`chunk_rows` of a loaded checkpoint."""
    geometry = llava.geometry
    return chunk_rows(geometry.n_blocks, geometry.states, geometry.vision_width)


@torch.no_grad()
def compute(
    llava: ExitModel,
    examples: Sequence[Example],
    need: Need,
    *,
    teacher: bool,
    precision: str,
    chunks: Iterable[Sequence[int]] | None = None,
) -> Features:
    """Run the tower, and the teacher if wanted, once over the needed rows.

    Args:
        llava: the untouched model (the caller turns an adapter off).
        examples: all rows.
        need: which of them, at which exits.
        teacher: also the log-probabilities of the wanted answers at the reference.
        precision: of the matrix products.
        chunks: the rows by chunk, e.g. behind a progress bar; by default `plan(need, examples, chunk_of(llava))`.
    """
    states: dict[tuple[int, Exit], Tensor] = {}
    teachers: dict[int, Tensor] = {}
    for rows in plan(need, examples, chunk_of(llava)) if chunks is None else chunks:
        part = [examples[row] for row in rows]
        deepest = max(llava.reference.depth if teacher else 0, *(max(need[row]).depth for row in rows))
        with autocast(precision, llava.device.type):
            tower = exit_states(llava, pixel_values(llava, open_images([e.image for e in part])), deepest)
            for i, row in enumerate(rows):
                for exit in need[row]:
                    states[row, exit] = _half(exit_state(llava, tower, exit)[i]).cpu()
            if teacher:
                batch = collate(part, llava.pad_id).to(llava.device)
                logits = answer_logits(llava, batch.ids, batch.where, exit_state(llava, tower, llava.reference))
                logp = torch.log_softmax(logits.float(), -1)
                teachers.update({row: logp[i, : len(examples[row].answer)].half().cpu() for i, row in enumerate(rows)})
    return Features(states, teachers)


def plan(need: Need, examples: Sequence[Example], size: int) -> list[list[int]]:
    """The needed rows in chunks of `size`: of like depth, so that the tower stops early, then of like length."""
    order = sorted(need, key=lambda row: (max(need[row]), len(examples[row].prompt) + len(examples[row].answer), row))
    return [order[i : i + size] for i in range(0, len(order), size)]


def _half(state: Tensor) -> Tensor:
    """float16 in memory of its own, or float32 where a tower's values don't fit."""
    half = state.half()
    return half if bool(torch.isfinite(half).all()) else state.float().clone()
