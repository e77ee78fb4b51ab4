"""A guard model on this machine in the place of a server: asked, kept and resumed alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from edgesafe.endpoint.reply import Said

LOCAL = "local:"  # where it answers, as a certificate has it


class Reader(Protocol):
    """A guard that reads a request and an answer, such as `edgesafe.evaluate.guard_judge.GuardJudge`."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What makes it this guard and no other: its digest or commit, among others."""
        ...

    def reply(self, prompt: str, answer: str) -> str:
        """What it says of the answer."""
        ...


@dataclass(frozen=True)
class LocalGuard:
    """A reader with a client's methods."""

    reader: Reader
    address: str = LOCAL
    exposes_key: bool = False

    def chat(self, body: Mapping[str, Any]) -> Said:
        """Its reply about the user's and the assistant's turn."""
        prompt, answer = (message["content"] for message in body["messages"])
        return Said(self.reader.reply(prompt, answer), "", self.reader.name, "", None, None)

    def models(self) -> tuple[list[dict[str, Any]], str]:
        """Itself, with its identity."""
        return [{"id": self.reader.name, "meta": dict(self.reader.identity)}], ""

    def again(self) -> LocalGuard:
        """Itself: nothing was closed."""
        return self

    def close(self) -> None:
        """Nothing is open."""
