"""Judges of answers with one interface, and how far two of them agree."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edgesafe.certify.stats import cohen_kappa
from edgesafe.certify.string_judge import JUDGE, classify
from edgesafe.errors import ConfigError
from edgesafe.format.suite import Row
from edgesafe.reference import grammar

_DIGESTS = ("sha256", "digest", "commit", "revision")  # what names a model's bytes or a judge's rules


class Judge(Protocol):
    """Puts answers into the classes "refuse", "comply" and "incoherent"."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What makes it this judge and no other: {name, version, sha256} or {name, model digest}.

        It is written to the report, and compared with rewards' so that none is judged by itself.
        """
        ...

    def __call__(self, rows: Sequence[Row], answers: Sequence[str]) -> list[str | None]:
        """The class of each row's answer, in order; None where the judge can't say."""
        ...


class Reward(Protocol):
    """What answers are worth to a training: reported beside the judges, never one of them."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Judge`."""
        ...

    def __call__(self, rows: Sequence[Row], answers: Sequence[str]) -> list[float]:
        """One score an answer, in order."""
        ...


class Toxicity(Protocol):
    """Scores answers 0..1 by how toxic their words are."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Judge`."""
        ...

    def __call__(self, answers: Sequence[str]) -> list[float]:
        """One score an answer, in order."""
        ...


@dataclass(frozen=True)
class StringJudge:
    """The rules of `edgesafe.certify.string_judge`: the judge whose rates a report and a certificate give.

    On the 1,250 labelled answers of XSTest's completions (harmless requests, five models) it and people agree in 92.6 % on
    whether an answer refuses, a partial refusal counted as one; kappa 0.783, by model 0.61 to 0.89.
    """

    name: str = str(JUDGE["name"])

    @property
    def identity(self) -> Mapping[str, Any]:
        """Its name, version and the digest of its rules."""
        return JUDGE

    def __call__(self, rows: Sequence[Row], answers: Sequence[str]) -> list[str | None]:
        """See `Judge`."""
        return [classify(answer, row.prompt) for row, answer in zip(rows, answers, strict=True)]


@dataclass(frozen=True)
class GrammarJudge:
    """The reference world's own grammar (`edgesafe.reference.grammar`): whole sentences or nothing, for that world's suites.

    Of XSTest's 1,250 completions it can parse none, as it should: free English is not its language. On the 16,120 answers of
    the shipped weights to the val suite at 13 depths it and the string judge agree in 99.5 %, kappa 0.989 (0.915 at depth 1);
    the 79 others are garbled or wrongly articled ("It is a arsenic."), which is incoherent here and an answer there.
    """

    name: str = str(grammar.IDENTITY["name"])

    @property
    def identity(self) -> Mapping[str, Any]:
        """Its name, version and the digest of its rules."""
        return grammar.IDENTITY

    def __call__(self, rows: Sequence[Row], answers: Sequence[str]) -> list[str | None]:
        """See `Judge`."""
        return [grammar.classify(answer) for answer in answers]


def open_second(spec: str, suite_name: str) -> Judge | None:
    """The second judge that a text names.

    Args:
        spec: "auto" (the grammar for the reference world's suites, else none), "grammar", "none", or the folder or hub id of a
            guard model.
        suite_name: the suite's own name.

    Raises:
        ConfigError: the guard model can't be loaded.
    """
    if spec == "auto":
        spec = "grammar" if suite_name.startswith("reference-") else "none"
    if spec == "none":
        return None
    if spec == "grammar":
        return GrammarJudge()
    from edgesafe.evaluate.guard_judge import open_guard

    return open_guard(spec)


def agreement(first: Sequence[str | None], second: Sequence[str | None]) -> dict[str, Any]:
    """How far two judges agree on the same answers.

    Returns:
        {n, agree, agreement, kappa, unparsed}: n answers that both could judge, of which `agree` got the same class; Cohen's
        kappa, None where both gave one class alone; the answers that either could not judge.

    >>> agreement(["refuse", "comply", "comply", "comply"], ["refuse", "comply", "refuse", None])
    {'n': 3, 'agree': 2, 'agreement': 0.6666666666666666, 'kappa': 0.4, 'unparsed': 1}
    """
    both = [(x, y) for x, y in zip(first, second, strict=True) if x is not None and y is not None]
    agree = sum(x == y for x, y in both)
    return {
        "n": len(both),
        "agree": agree,
        "agreement": agree / len(both) if both else 0.0,
        "kappa": cohen_kappa([x for x, _ in both], [y for _, y in both]),
        "unparsed": len(first) - len(both),
    }


def keep_apart(judges: Sequence[Judge], rewards: Sequence[Any]) -> None:
    """Refuse judges that are one and the same, and a reward that is a judge or is made from one.

    Args:
        judges: the first and, where there is one, the second.
        rewards: rewards, or identities of rewards; None is skipped.

    Raises:
        ConfigError: two of them are the same: an answer would be judged by what it was trained or chosen by.
    """
    if len(judges) > 1 and _same(judges[0], judges[1]):
        raise ConfigError(
            "the second judge is the first one", where="--second-judge", expected="another judge", todo="name another or 'none'"
        )
    for reward in rewards:
        for judge in judges:
            if reward is not None and _same(judge, reward):
                raise ConfigError(
                    f"the judge {judge.name} is also the reward",
                    where="reward",
                    expected="a judge that no answer was trained or scored by",
                    todo="use another --second-judge, or another reward",
                )


def _same(judge: Judge, other: Any) -> bool:
    """Whether `other` (a judge, a reward or an identity) is this judge, holds it, or names the same bytes or rules."""
    held = [other, *vars(other).values()] if hasattr(other, "__dict__") else [other]
    whole, marks = _marks(judge.identity)
    for one in held:
        identity = one if isinstance(one, Mapping) else getattr(one, "identity", None)
        if isinstance(identity, Mapping):
            wholes, theirs = _marks(identity)
            if whole[0] in wholes or marks & theirs:
                return True
    return False


def _marks(identity: Mapping[str, Any]) -> tuple[list[str], set[str]]:
    """An identity and those nested in it, outermost first, as canonical JSON; and every digest that they name."""
    wholes, digests = [json.dumps(identity, sort_keys=True, default=str)], set()
    for key, value in identity.items():
        if isinstance(value, Mapping):
            inner, more = _marks(value)
            wholes += inner
            digests |= more
        elif key in _DIGESTS and value:
            digests.add(str(value))
    return wholes, digests
