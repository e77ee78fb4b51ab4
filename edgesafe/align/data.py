"""Training rows of a data folder (the suite format of `edgesafe.certify.suite`), as batches of token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from edgesafe.align.model import Llava, answer_ids, pixel_values, prompt_ids
from edgesafe.certify.suite import read_suite
from edgesafe.errors import ConfigError, InputError


@dataclass(frozen=True)
class Example:
    """One row: its picture file, request ids, wanted answer ids, and whether helping would do harm."""

    image: Path
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    harmful: bool


@dataclass(frozen=True)
class Batch:
    """pixels [B, 3, H, W]; ids, targets [B, S]; mask bool [B, S], True where `targets` is an answer token; harmful bool [B]."""

    pixels: Tensor
    ids: Tensor
    targets: Tensor
    mask: Tensor
    harmful: Tensor


def read_examples(folder: Path, llava: Llava) -> list[Example]:
    """Read and tokenize a data folder.

    Raises:
        ConfigError: the folder is a certification or test suite; those are never trained on.
        InputError: no rows, a row without a picture or with an empty answer.
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
        if not row.target.strip():
            raise InputError("empty answer", where=f"{folder}: row {row.id}", expected="the wanted answer", todo="mend the row")
        if row.image is None:
            raise InputError(
                "row without a picture", where=f"{folder}: row {row.id}", expected="a picture", todo="mend the row"
            )
        out.append(
            Example(
                folder / row.image,
                tuple(prompt_ids(llava, row.prompt)),
                tuple(answer_ids(llava, row.target)),
                row.cls == "harmful",
            )
        )
    if not out:
        raise InputError("no training rows", where=str(folder), expected="at least one", todo="name another folder")
    return out


def collate(llava: Llava, examples: list[Example]) -> Batch:
    """Pad a list of examples on the right into a batch; position s predicts the token at s + 1."""
    images = []
    for example in examples:
        with Image.open(example.image) as image:
            images.append(image.convert("RGB"))
    pad = llava.processor.tokenizer.pad_token_id or 0
    longest = max(len(e.prompt) + len(e.answer) for e in examples) - 1
    ids = torch.full((len(examples), longest), pad)
    targets = torch.full_like(ids, pad)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, e in enumerate(examples):
        whole = torch.tensor([*e.prompt, *e.answer])
        ids[i, : len(whole) - 1] = whole[:-1]
        targets[i, : len(whole) - 1] = whole[1:]
        mask[i, len(e.prompt) - 1 : len(whole) - 1] = True
    return Batch(pixel_values(llava, images), ids, targets, mask, torch.tensor([e.harmful for e in examples]))
