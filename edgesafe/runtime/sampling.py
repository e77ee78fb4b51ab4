"""How the next token is picked from the logits: pure functions of arrays, and the options that choose among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesafe.errors import BundleError, InputError

Floats = npt.NDArray[Any]


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are picked; as it stands, greedily, as certificates are made by default.

    ``temperature`` 0 takes the likeliest token; above it tokens are drawn, with ``top_p`` from the likeliest ones that together
    have that share, by a generator started with ``seed`` (the same seed gives the same answer). ``repetition_penalty``
    above 1 makes tokens less likely that the prompt or the answer holds; ``no_repeat_ngram`` n > 0 never says the same
    n tokens twice. The answer ends before the first of the texts ``stop``.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _number(self.temperature, "temperature", "at least 0", lambda x: x >= 0)
        _number(self.top_p, "top_p", "above 0 and at most 1", lambda x: 0 < x <= 1)
        _number(self.repetition_penalty, "repetition_penalty", "above 0", lambda x: x > 0)
        for value, where in ((self.seed, "seed"), (self.no_repeat_ngram, "no_repeat_ngram")):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"{where} is {value!r}", where=where, expected="a whole number of at least 0")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"stop is {self.stop!r}", where="stop", expected="a tuple of texts that are not empty")


class Picker:
    """Picks an answer's tokens one after the other and remembers them.

    Args:
        sampling: The options.
        prompt: The prompt's ids, which count as said for the repetition penalty and n-grams, as in transformers' ``generate``.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self._said = list(prompt)
        self._random = np.random.default_rng(sampling.seed)

    def pick(self, logits: Floats) -> int:
        """The next token.

        Args:
            logits: [1,S,V]; the last of S is read and left as it is.

        Raises:
            BundleError: A logit is not finite.
        """
        options = self._sampling
        row = last_row(logits)
        row = penalize(row, self._said, options.repetition_penalty)
        row = ban_repeats(row, self._said, options.no_repeat_ngram)
        if options.temperature == 0:
            token = int(row.argmax())
        else:
            token = draw(nucleus(tempered(row, options.temperature), options.top_p), self._random.random())
        self._said.append(token)
        return token


def last_row(logits: Floats) -> Floats:
    """The last position's logits, V of them.

    Raises:
        BundleError: One is not finite, where argmax would quietly return some token.

    >>> last_row(np.array([[[9.0, 0.0], [1.0, 2.0]]])).tolist()
    [1.0, 2.0]
    """
    row: Floats = logits[0, -1]
    if not np.isfinite(row).all():
        raise BundleError("the decoder returned logits that are not finite", todo="export the bundle again")
    return row


def penalize(row: Floats, said: Sequence[int], penalty: float) -> Floats:
    """Each token that was said made less likely: its logit over the penalty, or times it where it is negative.

    Source: CTRL, arXiv 1909.05858, section 4.1, with the sign's case from transformers' ``RepetitionPenaltyLogitsProcessor``.

    >>> penalize(np.array([2.0, -2.0, 1.0]), [0, 1], 2.0).tolist()
    [1.0, -4.0, 1.0]
    """
    if penalty == 1:
        return row
    # An image token's id may lie outside of the decoder's vocabulary.
    ids = np.unique([token for token in said if token < row.shape[0]]).astype(np.int64)
    changed = row.copy()
    changed[ids] = np.where(row[ids] < 0, row[ids] * penalty, row[ids] / penalty)
    return changed


def ban_repeats(row: Floats, said: Sequence[int], n: int) -> Floats:
    """Minus infinity for each token that would say the same n tokens again; n = 0 bans nothing.

    Source: transformers' ``NoRepeatNGramLogitsProcessor``.

    >>> ban_repeats(np.zeros(4), [1, 2, 3, 1, 2], 3).tolist()
    [0.0, 0.0, 0.0, -inf]
    """
    if n == 0 or len(said) < n:
        return row
    last = list(said[len(said) - n + 1 :])
    after = [said[i + n - 1] for i in range(len(said) - n + 1) if list(said[i : i + n - 1]) == last]
    changed = row.copy()
    changed[[token for token in after if token < row.shape[0]]] = -math.inf
    # All banned: saying something again is better than saying what was banned first.
    return changed if np.isfinite(changed).any() else row


def tempered(row: Floats, temperature: float) -> Floats:
    """The logits over the temperature, above the likeliest one's: however small it is, nothing becomes infinite but downwards.

    >>> tempered(np.array([1.0, 3.0, 2.0]), 0.5).tolist(), tempered(np.array([1.0, 3.0]), 5e-324).tolist()
    ([-4.0, 0.0, -2.0], [-inf, 0.0])
    """
    with np.errstate(over="ignore"):
        scaled: Floats = (row.astype(np.float64) - row.max()) / temperature
    return scaled


def nucleus(row: Floats, top_p: float) -> Floats:
    """Minus infinity but for the likeliest tokens whose probabilities first reach ``top_p``; the likeliest always stays.

    Source: arXiv 1904.09751, section 3.1; transformers' ``TopPLogitsWarper``.

    >>> nucleus(np.log([0.5, 0.3, 0.2]), 0.6).round(1).tolist()
    [-0.7, -1.2, -inf]
    """
    if top_p >= 1:
        return row
    order = np.argsort(row, kind="stable")
    share = np.cumsum(softmax(row)[order])
    dropped = order[share <= 1 - top_p]
    changed = row.copy()
    changed[dropped[dropped != order[-1]]] = -math.inf
    return changed


def softmax(row: Floats) -> Floats:
    """Probabilities, in float64.

    >>> softmax(np.array([0.0, 0.0, -math.inf])).tolist()
    [0.5, 0.5, 0.0]
    """
    weights = np.exp(row.astype(np.float64) - row.max())
    shares: Floats = weights / weights.sum()
    return shares


def draw(row: Floats, chance: float) -> int:
    """The token that a number in [0, 1) falls on when the probabilities stand in a row.

    >>> [draw(np.log([0.5, 0.25, 0.25]), chance) for chance in (0.0, 0.4, 0.6, 0.9)]
    [0, 0, 1, 2]
    """
    edges = np.cumsum(softmax(row))
    # The sum's last bit may be missing; what has no probability must not be drawn for it.
    return int(np.searchsorted(edges, chance * edges[-1], side="right"))


def ended(text: str, stop: Sequence[str]) -> tuple[int, bool]:
    """How much of an answer may be shown, and whether it has ended by a stop text.

    A tail that a stop text could begin with is held back until more is known.

    >>> ended("a cat. No", (". N",)), ended("a cat. ", (". N",)), ended("a cat", ())
    ((5, True), (5, False), (5, False))
    """
    found = [text.find(word) for word in stop if word in text]
    if found:
        return min(found), True
    held = max((k for word in stop for k in range(1, len(word)) if text.endswith(word[:k])), default=0)
    return len(text) - held, False


def _number(value: float, where: str, expected: str, fits: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not fits(value):
        raise InputError(f"{where} is {value!r}", where=where, expected=expected)


GREEDY = Sampling()
