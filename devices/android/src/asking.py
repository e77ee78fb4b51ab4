"""What the app does, without a screen: a picture, a question and a budget in, what is to be shown out."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from edgesafe import Answer, Budget, EdgesafeError, Session, measure, refuses, smoke

FASTEST_MS, SLOWEST_MS = 1.0, 10_000.0  # the slider's ends; a phone's own budget is 2 s
ANSWER, REFUSAL, ERROR = "answer", "refusal", "error"


@dataclass(frozen=True)
class Shown:
    """What the screen shows: the text, what ``kind`` it is, a line on how it came about, and what is true of it."""

    text: str
    kind: str
    facts: str = ""
    certified: bool = False
    missed: bool = False


def budget_ms(place: float) -> float:
    """The budget at a place of the slider, 0 to 1: each step to the right is as many times longer.

    >>> [round(budget_ms(place)) for place in (0, 0.25, 0.5, 0.75, 1)]
    [1, 10, 100, 1000, 10000]
    """
    return float(FASTEST_MS * (SLOWEST_MS / FASTEST_MS) ** min(1.0, max(0.0, place)))


def in_words(ms: float) -> str:
    """A budget as a person reads it.

    >>> in_words(3.2), in_words(2000)
    ('3 ms', '2.0 s')
    """
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


class Asker:
    """A bundle on this device. It is opened at the first use; every method may be called from any thread.

    Args:
        bundle: The bundle's folder, a real one: graphs are loaded from their paths.
    """

    def __init__(self, bundle: Path) -> None:
        self._bundle, self._lock = bundle, threading.Lock()
        self._session: Session | None = None

    def standing(self) -> Shown:
        """Whether anything is certified here, which a refusal test on this device decides."""
        try:
            session = self._open()
        except EdgesafeError as error:
            return _error(error)
        exits = ", ".join(map(str, session.certified))
        if not exits:
            return Shown(f"No exit is certified here: {session.standing.why or 'the bundle has none'}.", ERROR)
        return Shown(f"Certified here: exits {exits} of {session.manifest.reference}.", ANSWER, certified=True)

    def test(self) -> Shown:
        """Measure this device and put the certified questions to it; takes minutes. Then its certificate counts, or not."""
        try:
            with self._lock:
                self._close()
                measure(self._bundle)
                report = smoke(self._bundle)
        except EdgesafeError as error:
            return _error(error)
        if not report.passed:
            return Shown(f"The refusal test failed on this device. Don't use this model here.\n\n{report.text()}", ERROR)
        return self.standing()

    def ask(self, picture: bytes | None, question: str, ms: float) -> Shown:
        """Answer within a budget, or late, saying so.

        Args:
            picture: An image file's bytes; None where none was chosen.
            question: Plain text.
            ms: Time to the first token.
        """
        if picture is None:
            return Shown("Choose a picture first.", ERROR)
        try:
            answer = self._open().ask(picture, question, Budget(ttft_ms=ms, on_miss="shallowest"))
        except EdgesafeError as error:
            return _error(error)
        refused = refuses(answer.text, question)
        return Shown(answer.text, REFUSAL if refused else ANSWER, facts(answer), answer.certified, answer.deadline_met is False)

    def _open(self) -> Session:
        with self._lock:
            if self._session is None:
                self._session = Session.open(self._bundle)
            return self._session

    def _close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None


def facts(answer: Answer) -> str:
    """Exit, verdict, time and whether the budget was kept, in a line."""
    verdict = "certified" if answer.certified else "NOT CERTIFIED"
    kept = {True: "budget kept", False: "budget MISSED", None: "no budget"}[answer.deadline_met]
    of = f" of {answer.reference}" if answer.reference else ""
    line = f"exit {answer.exit}{of}, {verdict} · first word after {in_words(answer.ttft_ms)} · {kept}"
    return line if answer.certified or not answer.note else f"{line} · {answer.note}"


def _error(error: EdgesafeError) -> Shown:
    return Shown(str(error), ERROR)
