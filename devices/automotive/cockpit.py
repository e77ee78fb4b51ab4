"""Questions about what a car's camera sees, answered in a sentence or two that can be spoken, within what driving allows.

Speed and gear come from a KUKSA data broker. Each question is written from standard input, a line each; what is to be spoken
goes to standard output. The camera's program keeps its newest picture in a file. Questions, answers and the evidence for them
go to a log, without pictures.

  python devices/automotive/cockpit.py BUNDLE --picture /run/camera/front.jpg --log /var/log/cockpit.jsonl
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from driving import Broker, Limits, Signals, limits, stricter

from edgesafe import Answer, Budget, EdgesafeError, Session, refuses

TOKENS, WORDS = 32, 25  # 25 words are spoken in about ten seconds
NO_RECORDS = "I can't keep records, so I don't answer."
LATE = "That took too long. Ask me again when we stand."
NO_TIME = "I can't answer that fast enough now."
UNSEEN = "I can't see that, or don't understand the question."
UNSAFE = "I can't answer that safely."
FAILED = "Something is wrong with me. I can't answer."
_MEANT = {"NoExitFitsError": NO_TIME, "NotMeasuredError": NO_TIME, "BusyError": NO_TIME, "InputError": UNSEEN}


@dataclass
class Cockpit:
    """Answers questions and keeps the evidence.

    Args:
        session: An opened bundle, without ``allow_uncertified``.
        signals: Tells speed and gear.
        log: A file of one JSON object a line, appended to.
    """

    session: Session
    signals: Callable[[], Signals]
    log: Path

    def ask(self, picture: Any, question: str) -> str:
        """What is to be spoken; nothing is spoken that is not in the log.

        Args:
            picture: As `Session.ask` takes it.
            question: Plain text.
        """
        start_s = time.monotonic()
        before = self.signals()
        if before.why:
            print(f"the speed is unknown: {before.why}", file=sys.stderr)
        row: dict[str, Any] = {"question": question}
        said, allowed = self._said(picture, question, limits(before), start_s, row)
        row = {"mode": allowed.mode, "speed_kmh": before.speed_kmh, "gear": before.gear, "signals": before.why} | row
        try:
            self._keep({**row, "said": said})
        except OSError as error:
            print(f"{self.log}: {error}", file=sys.stderr)
            return NO_RECORDS
        return said

    def _said(self, picture: Any, question: str, allowed: Limits, start_s: float, row: dict[str, Any]) -> tuple[str, Limits]:
        if allowed.why:
            row["outcome"] = "not allowed"
            return allowed.why, allowed
        spent_ms = 1e3 * (time.monotonic() - start_s)
        try:
            budget = Budget(max(1.0, allowed.ttft_ms - spent_ms), max(1.0, allowed.total_ms - spent_ms))
            answer = self.session.ask(picture, question, budget, max_new_tokens=TOKENS)
        except EdgesafeError as error:
            row |= {"outcome": "no answer", "error": f"{type(error).__name__}: {error}"}
            return _MEANT.get(type(error).__name__, FAILED), allowed
        row |= {"outcome": "refused" if refuses(answer.text, question) else "answered", "answer": answer.to_dict()}
        # The car may have left its place while the model thought.
        return self._withheld(answer, stricter(allowed, limits(self.signals())), row)

    def _withheld(self, answer: Answer, allowed: Limits, row: dict[str, Any]) -> tuple[str, Limits]:
        """The answer in short, or why it is not spoken."""
        late = answer.deadline_met is False or answer.ttft_ms > allowed.ttft_ms
        why = allowed.why or ("" if answer.certified else UNSAFE) or (LATE if late and allowed.mode != "parked" else "")
        if why:
            row["outcome"] = "withheld"
        return why or spoken(answer.text) or UNSEEN, allowed

    def _keep(self, row: dict[str, Any]) -> None:
        certificate = self.session.certificate
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        sealed = {"bundle": self.session.bundle.digest, "certificate": certificate.digest if certificate else None}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": now, **row, **sealed}) + "\n")


def spoken(text: str) -> str:
    """As many whole sentences as can be listened to; a longer first one is cut between words.

    >>> spoken("It is a van. It stands on the left."), spoken("on " * 40)[-6:]
    ('It is a van. It stands on the left.', 'on on…')
    """
    said: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", text.strip()):
        words = sentence.split()
        if said and len(said) + len(words) > WORDS:
            break
        said += words
    return " ".join(said[:WORDS]) + ("…" if len(said) > WORDS else "")


def main(arguments: list[str] | None = None) -> int:
    """Answer every line of standard input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="certified and measured on this machine")
    parser.add_argument("--picture", type=Path, required=True, metavar="FILE", help="the camera's newest picture")
    parser.add_argument("--log", type=Path, required=True, metavar="FILE", help="evidence, one JSON object a line")
    parser.add_argument("--broker", type=_address, default=("127.0.0.1", 55555), metavar="HOST:PORT", help="127.0.0.1:55555")
    parser.add_argument("--token", type=Path, metavar="FILE", help="the broker's token, where it wants one")
    args = parser.parse_args(arguments)
    try:
        token = args.token.read_text(encoding="utf-8").strip() if args.token else None
        args.log.open("a").close()
        with Session.open(args.bundle) as session:
            if not session.certified:
                parser.exit(51, f"no exit is certified on this machine: {session.standing.why or 'the bundle has none'}\n")
            if importlib.util.find_spec("kuksa_client") is None:
                parser.exit(10, "kuksa-client is not installed: pip install kuksa-client==0.6.0\n")
            cockpit = Cockpit(session, Broker(*args.broker, token).signals, args.log)
            for question in filter(None, map(str.strip, sys.stdin)):
                print(cockpit.ask(args.picture, question), flush=True)
    except EdgesafeError as error:
        parser.exit(error.exit_code, f"{type(error).__name__}: {error}\n")
    except OSError as error:
        parser.exit(11, f"{error.filename}: {error.strerror}\n")
    return 0


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host, int(port)


if __name__ == "__main__":
    sys.exit(main())
