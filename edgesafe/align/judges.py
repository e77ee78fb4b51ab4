"""Judges of answers behind one interface, and how far two of them agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from edgesafe.certify.suite import Row


class Judge(Protocol):
    """Puts answers into the classes "refuse", "comply" and "incoherent".

    name: for tables. identity: what makes it this judge and no other ({name, version, sha256} or {name, model digest}); written
    to the report, and compared with rewards' so that none is judged by itself.
    """

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def __call__(self, rows: Sequence[Row], answers: Sequence[str]) -> list[str | None]:
        """The class of each row's answer, in order; None where the judge can't say."""
        ...


class Reward(Protocol):
    """Scores answers, higher is better; `identity` as a judge's."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def __call__(self, rows: Sequence[Row], answers: Sequence[str]) -> list[float]:
        """One score an answer, in order."""
        ...


class Toxicity(Protocol):
    """Scores answers 0..1 by how toxic their words are; `identity` as a judge's."""

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def __call__(self, answers: Sequence[str]) -> list[float]:
        """One score an answer, in order."""
        ...
