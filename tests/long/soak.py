"""Thousands of asks of one session from four threads: no wrong exit, no interleaved text, no growing memory.

`make soak` runs it on build/DEVICE/bundle, or without one on the bundle made by hand, and writes the counts. Every ask's text
must be what the same ask gave when it was alone, its graphs those of its exit, and its steps must not alternate with another's.
Asks come as `ask`, `stream` and `ask_async`; some are cancelled on the way.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import edgesafe
from edgesafe import Exit, Session
from edgesafe.errors import CancelledError
from edgesafe.progress import table
from edgesafe.runtime import Cancel
from handmade import make_bundle
from results import write_result

ASKS, THREADS = 2000, 4
TOKENS = 16
MOST_GROWTH = 0.02
# The first asks fill allocators and caches; growth is counted from there.
WARM = 0.2
HUNG_S = 60.0
SAMPLES = Path(edgesafe.__file__).parent / "reference" / "samples"


@dataclass(frozen=True)
class Question:
    """One kind of ask and what it gave alone."""

    picture: Any
    prompt: str
    exit: Exit
    text: str
    graphs: int


def questions(session: Session, handmade: bool) -> list[Question]:
    """A few pictures, prompts and exits with their answers, asked one after the other."""
    if handmade:
        pairs = [(np.full((8, 8, 3), value, np.uint8), prompt) for value in (0, 90, 255) for prompt in ("what?", "how many?")]
    else:
        lines = (SAMPLES / "requests.tsv").read_text(encoding="utf-8").splitlines()
        pairs = [(SAMPLES / line.split("\t")[0], line.split("\t")[1]) for line in lines[::3]]
    made = []
    for picture, prompt in pairs:
        for exit in session.manifest.ladder[:: 1 if handmade else 4]:
            answer = session.ask(picture, prompt, exit=exit, max_new_tokens=TOKENS)
            made.append(Question(picture, prompt, exit, answer.text, len(session.manifest.exit(exit).graphs)))
    return made


def rss_mib() -> float:
    """This process's resident memory, MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Soak:
    """The asking threads' shared counts."""

    def __init__(self, session: Session, made: list[Question], asks: int, seconds: float) -> None:
        self.session, self.made, self.asks = session, made, asks
        self.counts: Counter[str] = Counter()
        self.steps: list[int] = []
        self.wrong: list[str] = []
        self.until = time.perf_counter() + seconds
        self.lock = threading.Lock()
        self.number = 0
        self.warm_mib = 0.0

    def run(self, seed: int) -> None:
        """Ask until all is asked or the time is over."""
        rng = random.Random(seed)
        while time.perf_counter() < self.until:
            with self.lock:
                if self.number == self.asks:
                    return
                self.number += 1
                number = self.number
                if number == int(WARM * self.asks):
                    self.warm_mib = rss_mib()
            try:
                self.one(number, rng)
            except Exception as error:
                self.wrong.append(f"ask {number}: {type(error).__name__}: {error}")

    def one(self, number: int, rng: random.Random) -> None:
        """One ask, compared with what it gave alone."""
        question, how = rng.choice(self.made), rng.choice(["ask", "ask", "stream", "async", "cancel"])
        graphs, cancel = [], Cancel()

        def progress(step: Any) -> None:
            self.steps.append(number)
            if step.stage == "vision":
                graphs.append(step.total)
            elif how == "cancel" and step.done == 2:
                cancel.cancel()

        options = {"exit": question.exit, "max_new_tokens": TOKENS, "cancel": cancel, "progress": progress}
        self.counts[how] += 1
        try:
            if how == "stream":
                stream = self.session.stream(question.picture, question.prompt, **options)
                text, answer = "".join(stream), stream.answer
            elif how == "async":
                answer = self.session.ask_async(question.picture, question.prompt, **options).result()
                text = answer.text
            else:
                answer = self.session.ask(question.picture, question.prompt, **options)
                text = answer.text
        except CancelledError:
            if how != "cancel":
                raise
            return
        if how == "cancel":
            self.wrong.append(f"ask {number} was cancelled and answered")
        if text != question.text:
            self.wrong.append(f"ask {number} at exit {question.exit}: {text!r}, alone {question.text!r}")
        if answer.exit != question.exit or set(graphs) != {question.graphs}:
            self.wrong.append(f"ask {number} ran exit {answer.exit} by {graphs}, wanted {question.exit}")


def alternations(steps: list[int]) -> int:
    """How often a request continued after a step of another one.

    >>> alternations([1, 1, 2, 2, 3]), alternations([1, 2, 1, 2])
    (0, 2)
    """
    return sum(a != b for a, b in pairwise(steps)) - (len(set(steps)) - 1)


def soak(bundle: Path | None, asks: int = ASKS, threads: int = THREADS, seconds: float = 1200.0) -> dict[str, Any]:
    """Ask so often from so many threads.

    Returns:
        {bundle, asks, wanted, threads, distinct_answers, kinds, wrong, interleaved, rss_warm_mib, rss_end_mib, growth, asks_s}.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = bundle or make_bundle(Path(folder) / "bundle").root
        with Session.open(root, threads=1, allow_uncertified=True) as session:
            made = questions(session, bundle is None)
            run = Soak(session, made, asks, seconds)
            begin = time.perf_counter()
            workers = [threading.Thread(target=run.run, args=(seed,), daemon=True) for seed in range(threads)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(max(0.0, run.until - time.perf_counter()) + HUNG_S)
                if worker.is_alive():
                    run.wrong.append("a thread hangs")
            took, end = time.perf_counter() - begin, rss_mib()
            name = session.manifest.name
    return {
        "bundle": name,
        "wanted": asks,
        "asks": run.number,
        "threads": threads,
        "questions": len(made),
        "distinct_answers": len({q.text for q in made}),
        "kinds": dict(sorted(run.counts.items())),
        "wrong": run.wrong[:20],
        "interleaved": alternations(run.steps),
        "rss_warm_mib": round(run.warm_mib, 1),
        "rss_end_mib": round(end, 1),
        "growth": round(end / run.warm_mib - 1, 4) if run.warm_mib else None,
        "asks_s": round(run.number / took, 1),
    }


def kept(row: dict[str, Any]) -> bool:
    """Whether it kept what `make soak` promises."""
    grew = row["growth"] is None or row["growth"] > MOST_GROWTH
    return not (row["wrong"] or row["interleaved"] or grew or row["asks"] < row["wanted"])


def main() -> int:
    """Run it and print the counts; 1 where a promise broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="a bundle (the one made by hand)")
    parser.add_argument("--asks", type=int, default=ASKS)
    parser.add_argument("--seconds", type=float, default=1200.0, help="about how long at most (1200)")
    parser.add_argument("--out", type=Path, help="write the counts there")
    options = parser.parse_args()
    bundle = options.bundle if options.bundle and options.bundle.is_dir() else None
    row = soak(bundle, options.asks, seconds=options.seconds)
    if options.out:
        write_result(options.out, row)
    print(table([[key, str(value)] for key, value in row.items()], ["what", "value"]))
    return 0 if kept(row) else 1


if __name__ == "__main__":
    sys.exit(main())
