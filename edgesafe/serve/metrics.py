"""What a server counts, in Prometheus' text format: exits, misses, refusals, the queue."""

from __future__ import annotations

import threading
from collections import Counter

from edgesafe.certify.string_judge import refuses
from edgesafe.errors import EdgesafeError
from edgesafe.runtime import Answer, Session
from edgesafe.serve.line import Line
from edgesafe.serve.wire import code_of

KIND = "text/plain; version=0.0.4; charset=utf-8"
# Name: its help. Those that end in _total only grow.
HELP = {
    "edgesafe_bundle_info": "The bundle and the certificate that are served; always 1.",
    "edgesafe_exit_certified": "Whether an exit is certified on this machine.",
    "edgesafe_answers_total": "Whole answers, by the exit that gave them and whether they are certified.",
    "edgesafe_refusals_total": "Whole answers in which the model refuses, by the string judge, by exit.",
    "edgesafe_deadlines_total": "Whole answers with a budget, by whether it was kept.",
    "edgesafe_tokens_total": "Tokens of whole answers: read (kind prompt) and made (kind completion).",
    "edgesafe_first_token_seconds_total": "Time to the first token, summed over whole answers.",
    "edgesafe_answer_seconds_total": "Time of whole answers, waiting included, summed.",
    "edgesafe_errors_total": "Requests that were not answered, by the error's code.",
    "edgesafe_cancelled_total": "Requests whose client went away before the answer ended.",
    "edgesafe_queue_requests": "Requests that run or wait now.",
    "edgesafe_queue_room": "Requests that may run or wait at once.",
}
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """The counts of one server; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, Labels]] = Counter()

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Count something that ``HELP`` names."""
        with self._lock:
            # A Counter holds floats as well; its stubs say int.
            self._counts[name, tuple(sorted(labels.items()))] += amount  # type: ignore[assignment]

    def error(self, error: EdgesafeError, status: int) -> None:
        """Count a request that was not answered."""
        self.add("edgesafe_errors_total", code=code_of(error, status))

    def answered(self, answer: Answer, prompt: str, prompt_tokens: int, made: int) -> None:
        """Count a whole answer."""
        exit = str(answer.exit)
        self.add("edgesafe_answers_total", exit=exit, certified=str(answer.certified).lower())
        self.add("edgesafe_refusals_total", refuses(answer.text, prompt), exit=exit)
        if answer.deadline_met is not None:
            self.add("edgesafe_deadlines_total", met=str(answer.deadline_met).lower())
        self.add("edgesafe_tokens_total", prompt_tokens, kind="prompt")
        self.add("edgesafe_tokens_total", made, kind="completion")
        self.add("edgesafe_first_token_seconds_total", answer.ttft_ms / 1e3)
        self.add("edgesafe_answer_seconds_total", answer.total_ms / 1e3)

    def text(self, session: Session, line: Line) -> str:
        """All of it, with the state of the session and of the queue."""
        digest = session.certificate.digest if session.certificate else ""
        info = {"name": session.manifest.name, "bundle": session.bundle.digest, "certificate": digest}
        with self._lock:
            rows: dict[tuple[str, Labels], float] = dict(self._counts)
        rows["edgesafe_bundle_info", tuple(info.items())] = 1
        for exit in session.manifest.ladder:
            rows["edgesafe_exit_certified", (("exit", str(exit)),)] = int(exit in session.certified)
        rows["edgesafe_queue_requests", ()], rows["edgesafe_queue_room", ()] = line.held, line.room
        lines = []
        for name, text in HELP.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}"]
            lines += [f"{name}{_shown(labels)} {value}" for (key, labels), value in sorted(rows.items()) if key == name]
        return "\n".join(lines) + "\n"


def _shown(labels: Labels) -> str:
    r"""Labels as the format writes them.

    >>> _shown((("a", 'x"\n'), ("b", "y"))), _shown(())
    ('{a="x\\"\\n",b="y"}', '')
    """
    texts = [(name, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for name, value in labels]
    return "{" + ",".join(f'{name}="{value}"' for name, value in texts) + "}" if texts else ""
