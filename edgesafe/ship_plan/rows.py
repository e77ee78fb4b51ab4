"""What rows and suite of `ship` will be, before they are made: how many, and how long; nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgesafe.align.sizes import Lengths
from edgesafe.format.suite import MAX_NEW_TOKENS, Row, read_suite
from edgesafe.reference.data import ALIGN, CERTIFY
from edgesafe.reference.world import draws, sample
from edgesafe.requests.gather import gather
from edgesafe.requests.public import read_public
from edgesafe.steps import TRAINING_ROWS

# Rows that are drawn to see how long those of the reference world are: one draws 40,000 of them in minutes.
_SAMPLED = 128
# What the preset makes of its pinned sets, counted from copies of them: rows, those that the model answers, and pictures; and
# how long the requests are, by a tokenizer of 49,152 words, as a hundred of them.
_PUBLIC = {"train": (1301, 531, 508), "test": (831, 0, 61)}
_REQUESTS = (13,) * 60 + (22,) * 30 + (45,) * 7 + (100,) * 2 + (198,)
# Tokens of the model's own answers, as twenty of them: a refusal has a dozen, and few are as long as they may be.
_ANSWERS = (24,) * 19 + (MAX_NEW_TOKENS,)
# Tokens that a chat layout puts around a request.
_LAYOUT = 16


@dataclass(frozen=True)
class Planned:
    """Rows to come.

    count: how many. asked: of them, those that the model answers itself first. pictures: different ones. prompts, answers:
        tokens of requests, without picture and layout, and of wanted answers; of all rows, or of some that speak for them.
    """

    count: int
    asked: int
    pictures: int
    prompts: tuple[int, ...]
    answers: tuple[int, ...]

    def request(self, image_tokens: int) -> float:
        """Tokens of a request with its picture, on average."""
        return sum(self.prompts) / len(self.prompts) + image_tokens + _LAYOUT

    @property
    def answer(self) -> float:
        """Tokens of an answer, on average."""
        return sum(self.answers) / len(self.answers)

    def padded(self, image_tokens: int, rows: int) -> tuple[int, int]:
        """Tokens that each of so many rows has in one batch, with its picture and without its answer; and of its answer."""
        return longest_of(self.prompts, rows) + image_tokens + _LAYOUT, longest_of(self.answers, rows)

    def lengths(self, image_tokens: int) -> Lengths:
        """The longest of all, as a memory plan wants them."""
        return Lengths(max(self.prompts) + image_tokens + _LAYOUT, max(self.answers), self.count)


def longest_of(lengths: Sequence[int], rows: int) -> int:
    """The longest of so many that are drawn from a few, as often as not.

    >>> longest_of(range(100), 1), longest_of(range(100), 10), longest_of((7,), 10)
    (50, 93, 7)
    """
    order = sorted(lengths)
    return order[int(0.5 ** (1 / rows) * len(order))]


def rows_of(folder: Path, tokenizer: Any) -> Planned:
    """The rows of a folder of one's own."""
    rows = read_suite(folder, verify=False).rows
    return _planned(rows, len(rows), len({row.image for row in rows}), tokenizer)


def drawn_rows(split: str, tokenizer: Any) -> Planned:
    """The rows that the reference world draws: `align` of 40,000, or those of the suite `cert`."""
    shares: dict[str, float] = dict(ALIGN) if split == "align" else {k: float(n) for k, n in CERTIFY.items()}
    some = [sample(family, split, index) for family, index in draws(split, _SAMPLED, 0, shares)]
    count = TRAINING_ROWS if split == "align" else sum(CERTIFY.values())
    return _planned(some, count, count, tokenizer)


def public_rows(folder: Path | None, split: str, tokenizer: Any) -> Planned:
    """The rows that the preset makes: counted in a folder with its sets, else as many as their pinned requests give."""
    if folder is None:
        return Planned(*_PUBLIC[split], _REQUESTS, _ANSWERS)
    recipe = read_public(folder)
    items = gather(recipe.rows if split == "train" else recipe.suite, split).items
    asked = sum(item.row.cls != "harmful" and not item.row.target for item in items) if split == "train" else 0
    planned = _planned([item.row for item in items], len(items), len({item.picture for item in items}), tokenizer)
    return replace(planned, asked=asked, answers=_ANSWERS)


def _planned(rows: Sequence[Row | Any], count: int, pictures: int, tokenizer: Any) -> Planned:
    prompts, answers = (
        [len(ids) for ids in tokenizer([getattr(r, k) for r in rows])["input_ids"]] for k in ("prompt", "target")
    )
    return Planned(count, 0, pictures, tuple(prompts), tuple(answers))
