"""Whole answers of the finished bundle, by the shipped runtime, against what the checkpoint would have answered.

A changed word may be harmless and an equal one luck: what counts is how far the two distributions over the next token lie
apart in each place of an answer (`scoring`). Two limits hold at every exit. Few tokens may diverge a little, which shows damage
that is spread thin. And few answers may hold a token that diverges a lot: one is enough to turn a refusal into help. The limits
are from a study of damaged models (`tests/long/damage.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from edgesafe.certify.string_judge import classify
from edgesafe.errors import BundleError, ParityError
from edgesafe.format.exits import Exit
from edgesafe.progress import bar
from edgesafe.runtime.decode import argmax_token, generate
from edgesafe.runtime.sampling import last_row
from edgesafe.runtime.session import Session
from edgesafe.runtime.tokenizer import TextStream, encode_prompt
from edgesafe_export.parity_model import Probe
from edgesafe_export.scoring import Answered, Score
from edgesafe_export.tolerances import DIVERGED_NATS, DIVERGED_TOKENS, KEPT_ANSWERS, LOST_NATS

# A request and the exits that it is asked at.
Request = tuple[Probe, Sequence[Exit]]
_SHOWN, _WIDTH = 4, 70  # changed answers that an error quotes, and characters of each


@dataclass(frozen=True)
class Compared:
    """An answer of the bundle and the checkpoint's view of it.

    Attributes:
        answered: the bundle's answer.
        score: the checkpoint's score of it.
        meant: the checkpoint's own answer; of a model that is compared in pieces up to its first other token, then "...".
        whole: whether `meant` is all of it.
    """

    answered: Answered
    score: Score
    meant: str
    whole: bool

    @property
    def same(self) -> bool:
        """Whether the checkpoint's greedy answer is this one, token by token."""
        return self.answered.ids == self.score.best

    @property
    def divergence(self) -> float:
        """The largest one in any of its places, nats."""
        return max(self.score.divergence)

    @property
    def kept(self) -> bool:
        """Whether no place of it diverges a lot."""
        return self.divergence <= LOST_NATS


def ask(session: Session, requests: Sequence[Request], max_new_tokens: int) -> list[Answered]:
    """A bundle's greedy answers, as `Session.answer_features` makes them, with their tokens."""
    answers: list[Answered] = []
    shown: Any = None
    for (image, prompt), exits in bar(requests, len(requests), "answers of the bundle"):
        if shown != (here := (id(image), tuple(exits))):  # requests about one picture stand next to each other
            shown, states = here, session.vision_states(image, exits)
        for exit in exits:
            cut = session.cut(image, exit)
            prompt_ids = encode_prompt(session.tokenizer, session.manifest, prompt, cut, exit)
            ids, logits = _greedy(session, states[exit], prompt_ids, max_new_tokens)
            text = _text(session.tokenizer, ids)
            answers.append(Answered(image, prompt, exit, cut, tuple(prompt_ids), ids, text, logits))
    return answers


def _greedy(session: Session, features: Any, prompt_ids: list[int], limit: int) -> tuple[tuple[int, ...], np.ndarray]:
    """An answer's tokens as `Session.tokens` gives them, and the logits that each was picked from [n,V]."""
    rows: list[np.ndarray] = []

    def pick(logits: np.ndarray) -> int:
        rows.append(last_row(logits).copy())  # they stand until the next read alone
        return argmax_token(logits)

    try:
        with session.turns.enter():
            reader = session.reader(len(prompt_ids) + limit)
            read = reader.read(session.merged(features, prompt_ids))
            ids = tuple(generate(reader, read, session.manifest.text, limit, pick))
    except BundleError as error:
        what, todo = (
            f"the finished bundle doesn't answer: {error.what}",
            "use a milder scheme, or report this checkpoint's config",
        )
        raise ParityError(what, where=error.where, expected="an answer to every request", todo=todo) from error
    return ids, np.stack(rows)


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    stream = TextStream(tokenizer)
    for token in ids:
        stream.push(token)
    stream.finish()
    return stream.text


def compare(
    tokenizer: Tokenizer, answers: Sequence[Answered], scores: Sequence[Score], meant: Sequence[str] | None
) -> list[Compared]:
    """Each answer beside the checkpoint's own: `meant` where these are known, else as far as the scores tell."""
    whole = meant is not None
    texts = meant if meant is not None else [_begun(tokenizer, *row) for row in zip(answers, scores, strict=True)]
    return [Compared(*row, whole) for row in zip(answers, scores, texts, strict=True)]


def _begun(tokenizer: Tokenizer, answered: Answered, found: Score) -> str:
    """The checkpoint's answer up to the first token that it would have chosen otherwise."""
    if answered.ids == found.best:
        return answered.text
    at = next(i for i, (a, b) in enumerate(zip(answered.ids, found.best, strict=True)) if a != b)
    return _text(tokenizer, (*answered.ids[:at], found.best[at])) + " ..."


def changed(compared: Sequence[Compared]) -> str:
    """Why a bundle does not answer as its checkpoint, with the answers that show it; an empty text where it does."""
    for exit, found in figures(compared).items():
        kept, apart = found["kept"], found["diverged_tokens"]
        if kept >= KEPT_ANSWERS and apart <= DIVERGED_TOKENS:
            continue
        far = [one for one in compared if str(one.answered.exit) == exit and one.divergence > DIVERGED_NATS]
        shown = "; ".join(map(_quoted, sorted(far, key=lambda one: -one.divergence)[:_SHOWN]))
        if kept < KEPT_ANSWERS:
            return f"exit {exit} keeps {100 * kept:.0f} % of its answers, below {100 * KEPT_ANSWERS:.0f} %: {shown}"
        return f"exit {exit}: {100 * apart:.1f} % of its tokens diverge, not below {100 * DIVERGED_TOKENS:.1f} %: {shown}"
    return ""


def _quoted(one: Compared) -> str:
    asked, meant, text = (shorten(repr(t), _WIDTH) for t in (one.answered.prompt, one.meant, one.answered.text))
    return f"{asked}: {text} in place of {meant}"


def figures(compared: Sequence[Compared]) -> dict[str, dict[str, Any]]:
    """By exit: shares of equal and of kept answers, of equal classes and of diverged tokens, and how the tokens agree.

    `same_class` is there where the checkpoint's whole answers are known. `token_agreement` is the share of the answers' tokens
    that the checkpoint thinks best, `token_loss` their mean loss, `divergence` the answers' mean largest divergence, nats.
    """
    groups: dict[str, list[Compared]] = {}
    for one in compared:
        groups.setdefault(str(one.answered.exit), []).append(one)
    return {exit: {key: round(value, 4) for key, value in _figures(group).items()} for exit, group in groups.items()}


def _figures(group: Sequence[Compared]) -> dict[str, float]:
    losses = [loss for one in group for loss in one.score.losses]
    best = [a == b for one in group for a, b in zip(one.answered.ids, one.score.best, strict=True)]
    apart = [nats > DIVERGED_NATS for one in group for nats in one.score.divergence]
    classes = [_class(one, one.answered.text) == _class(one, one.meant) for one in group if one.whole]
    return {
        "equal": _mean([one.same for one in group]),
        "kept": _mean([one.kept for one in group]),
        **({"same_class": _mean(classes)} if classes else {}),
        "diverged_tokens": _mean(apart),
        "token_agreement": _mean(best),
        "token_loss": _mean(losses),
        "divergence": _mean([one.divergence for one in group]),
    }


def _class(one: Compared, text: str) -> str:
    return classify(text, one.answered.prompt)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
