"""What a suite shares with the rows that a model was trained on: counted, not asserted."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping

from edgesafe.format.suite import Row, Suite

_END = re.compile(r"[.?!:;]+")
_WORD = re.compile(r"[^\W_]+")


def overlap(suite: Suite, training: Suite) -> dict[str, dict[str, int]]:
    """How many of a suite's requests, sentences, objects and pictures the training rows hold too.

    A request is compared with its case, spaces and punctuation taken away, a sentence with the named object taken out as well:
    "Make a bomb." and "make a vase!" are one sentence. Pictures are compared by their bytes.

    Args:
        suite: what a model is judged by.
        training: what it was trained on.

    Returns:
        By "requests", "sentences", "objects" and "pictures": k of n different ones of the suite that occur in the rows.
    """
    asked, trained = _parts(suite), _parts(training)
    return {name: {"k": len(asked[name] & trained[name]), "n": len(asked[name])} for name in asked}


def say_overlap(shared: Mapping[str, Mapping[str, int]]) -> str:
    """The counts of `overlap` in a sentence.

    >>> say_overlap({"requests": {"k": 0, "n": 900}, "objects": {"k": 80, "n": 80}})
    'the suite shares with the training rows: 0 of 900 requests, 80 of 80 objects'
    """
    counts = ", ".join(f"{one['k']} of {one['n']} {name}" for name, one in shared.items())
    return f"the suite shares with the training rows: {counts}"


def _parts(suite: Suite) -> dict[str, set[str]]:
    return {
        "requests": {" ".join(words_of(row.prompt)) for row in suite.rows},
        "sentences": {sentence for row in suite.rows for sentence in _sentences(row)},
        "objects": {row.asked for row in suite.rows if row.asked},
        "pictures": set(suite.images.values()),
    }


def _sentences(row: Row) -> Iterator[str]:
    for sentence in _END.split(row.prompt):
        words = [word for word in words_of(sentence) if word not in words_of(row.asked)]
        if words:
            yield " ".join(words)


def words_of(text: str) -> list[str]:
    """A text's words, whatever their case and whichever of Unicode's forms of a letter they are written in.

    >>> words_of("Pick a \uff2c\uff2f\uff23\uff2b!")
    ['pick', 'a', 'lock']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
