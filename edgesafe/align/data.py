"""Training rows of a data folder (the suite format of `edgesafe.format.suite`), as batches of token ids.

B rows, S tokens of request and answer, A answer tokens, P patches, W tower width, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgesafe.checkpoint.exit_model import ExitModel, answer_ids, prompt_ids
from edgesafe.errors import ConfigError, InputError
from edgesafe.format.suite import Row, read_suite


@dataclass(frozen=True)
class Example:
    """One row: its picture file, request ids, wanted answer ids, whether helping would do harm, and the row as it was read."""

    image: Path
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    harmful: bool
    row: Row | None = None


@dataclass(frozen=True)
class Batch:
    """Requests with their wanted answers, padded on the right.

    ids: int64 [B, S], the answer's last token left out, as nothing is predicted from it.
    where: int64 [B, A], the position that predicts each answer token.
    targets: int64 [B, A], the answer tokens.
    mask: bool [B, A], True where there is an answer token.
    harmful: bool [B].
    """

    ids: Tensor
    where: Tensor
    targets: Tensor
    mask: Tensor
    harmful: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))

    def __getitem__(self, rows: Tensor) -> Batch:
        """Some of its rows."""
        return Batch(*(tensor[rows] for tensor in vars(self).values()))


def read_examples(folder: Path, llava: ExitModel) -> list[Example]:
    """Read and tokenize a data folder.

    Raises:
        ConfigError: the folder is a certification or test suite; those are never trained on.
        InputError: a row without a picture, with an empty answer or too long for the model.
    """
    suite = read_suite(folder)
    if suite.split != "train":
        raise ConfigError(
            f"split {suite.split!r} is not for training",
            where=str(folder),
            expected="a folder of split 'train'",
            todo="write one with `edgesafe reference data --split train`",
        )
    out = []
    for row in suite.rows:
        where = f"{folder}: row {row.id}"
        if not row.target.strip():
            raise InputError("empty answer", where=where, expected="the wanted answer", todo="add the answer or remove the row")
        prompt, answer = prompt_ids(llava, row.prompt), answer_ids(llava, row.target)
        if len(prompt) + len(answer) > llava.context_length:
            raise InputError(
                f"{len(prompt) + len(answer)} tokens",
                where=where,
                expected=f"at most {llava.context_length}",
                todo="shorten the row",
            )
        out.append(Example(suite.image_path(row), tuple(prompt), tuple(answer), row.cls == "harmful", row))
    return out


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """Pad examples into a batch.

    >>> b = collate([Example(Path(), (7, 8), (4, 2), False), Example(Path(), (9,), (2,), True)], pad=0)
    >>> b.ids.tolist(), b.where.tolist(), b.mask.tolist()
    ([[7, 8, 4], [9, 0, 0]], [[1, 2], [0, 0]], [[True, True], [True, False]])
    """
    rows, answers = len(examples), max(len(e.answer) for e in examples)
    ids = torch.full((rows, max(len(e.prompt) + len(e.answer) for e in examples) - 1), pad)
    where, targets = torch.zeros(rows, answers, dtype=torch.int64), torch.full((rows, answers), pad)
    mask = torch.zeros(rows, answers, dtype=torch.bool)
    for i, e in enumerate(examples):
        whole = torch.tensor([*e.prompt, *e.answer])
        ids[i, : len(whole) - 1] = whole[:-1]
        where[i, : len(e.answer)] = torch.arange(len(e.prompt) - 1, len(whole) - 1)
        targets[i, : len(e.answer)] = whole[len(e.prompt) :]
        mask[i, : len(e.answer)] = True
    return Batch(ids, where, targets, mask, torch.tensor([e.harmful for e in examples]))
