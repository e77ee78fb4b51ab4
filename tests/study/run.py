"""Every run of the plan, each in a process of its own, a few at a time; what is done already is not run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgesafe.errors import AlignError, ConfigError
from edgesafe.format.suite import read_suite
from edgesafe.reference.data import write_split, write_training
from edgesafe.steps import REFERENCE, digest_world
from study.plan import FOLDERS, PLANS, TRAINING_ROWS, Run
from study.raw import ROWS, read_suite_digest, write_rows
from study.work import Setup, has_checkpoint, is_done, run_key

_POLL_S = 0.2
_TESTS = Path(__file__).resolve().parents[1]  # where `python -m study` is found


@dataclass
class _Queue:
    """Runs by where they are; `waiting` keeps the plan's order."""

    waiting: list[Run]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


def prepare(
    build: Path, model: Path | None, data: Path | None, suite: Path | None, share: float = 1.0
) -> tuple[Path, Path, Path]:
    """Model, training rows and suite; what is not named is the reference model's, drawn where it is not there yet.

    Of the test split a `share` is drawn.

    The drawn folders carry the digest of the code that draws them in their names.
    """
    world = digest_world(REFERENCE.parent)[:8]
    rows, asked = build / f"train-{world}", build / f"test-{f'{share:g}-' if share != 1 else ''}{world}"
    build.mkdir(parents=True, exist_ok=True)
    if data is None and not rows.is_dir():
        write_training(rows, TRAINING_ROWS, seed=0)
    if suite is None and not asked.is_dir():
        write_split(asked, "test", scale=share)
    return model or REFERENCE, data or rows, suite or asked


def run_study(setup: Setup, *, only: Sequence[str] = (), jobs: int = 2) -> list[str]:
    """Run what the plan says and what is not done, `jobs` runs at a time.

    Args:
        setup: where and on what.
        only: names of runs, or beginnings of names with a `*` at the end; () = all.
        jobs: processes at a time.

    Returns:
        Names of the runs that were run.

    Raises:
        AlignError: some runs failed; the others were finished. Their logs are named.
        ConfigError: `only` names no run.
    """
    named = {run.name: run for run in PLANS[setup.plan]()}
    suite = read_suite(setup.suite, verify=False)
    todo = to_do(setup, select(named, only), named)
    _fits(setup, suite.digest)
    write_rows(setup.out, suite.digest, suite.split, suite.rows)
    print(f"  {len(todo)} runs to do: {', '.join(r.name for r in todo) or 'none'}", file=sys.stderr, flush=True)
    if left_out := {run.pictures for run in select(named, only)} & set(FOLDERS) - set(setup.folders):
        print(f"  left out: runs with {', '.join(sorted(left_out))}; name a --folder", file=sys.stderr, flush=True)
    queue = _Queue(list(todo))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a killed study ends its runs as Ctrl-C does
    try:
        while queue.waiting or queue.running:
            _start_ready(setup, queue, jobs)
            _collect(setup, queue)
            time.sleep(_POLL_S)
    finally:  # Ctrl-C, or a bug here: no training goes on behind a person's back
        for process in queue.running.values():
            process.terminate()
        for process in queue.running.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)
    if queue.failed:
        raise AlignError(
            f"{len(queue.failed)} runs failed: {', '.join(queue.failed)}",
            where=", ".join(str(_log(setup, name)) for name in queue.failed[:3]),
            expected="every run to end well",
            todo="read the ends of the logs; the same command continues with what is not done",
        )
    return [run.name for run in todo]


def select(named: Mapping[str, Run], only: Sequence[str]) -> list[Run]:
    """The runs that the names mean, in the plan's order.

    >>> [r.name for r in select({r.name: r for r in plan()}, ["before", "l-sft-*"])]
    ['before', 'l-sft-0', 'l-sft-1', 'l-sft-2']
    """
    for word in only:
        if not any(_means(word, name) for name in named):
            raise ConfigError(f"no run is called {word!r}", where="--only", expected=", ".join(named), todo="name one of these")
    return [run for name, run in named.items() if not only or any(_means(word, name) for word in only)]


def _means(word: str, name: str) -> bool:
    return name.startswith(word[:-1]) if word.endswith("*") else name == word


def to_do(setup: Setup, wanted: Sequence[Run], named: Mapping[str, Run]) -> list[Run]:
    """Of the wanted runs those without answers of today's key, and before them the runs whose checkpoint they need.

    A run whose folder of pictures was not named is none of them.
    """
    wanted = [run for run in wanted if run.pictures not in FOLDERS or run.pictures in setup.folders]
    stale = {run.name for run in wanted if not is_done(setup, run, run_key(setup, run, named))}
    needed = {run.of for run in wanted if run.name in stale and run.of and not has_checkpoint(setup, named[run.of])}
    return [run for name, run in named.items() if name in stale | needed]


def _fits(setup: Setup, suite: str) -> None:
    """Refuse a folder with raw answers to another suite: its tables could not be made any more."""
    found = read_suite_digest(setup.out)
    if found not in (None, suite) and any((setup.out / "raw").glob("*.json")):
        raise AlignError(
            "the folder holds answers to another suite",
            where=str(setup.out / ROWS),
            expected=f"suite {suite[:12]}",
            todo="remove its raw files, or name another --out",
        )


def _start_ready(setup: Setup, queue: _Queue, jobs: int) -> None:
    """Start waiting runs while there is room; one whose checkpoint is not there yet lets others pass."""
    for run in list(queue.waiting):
        if len(queue.running) >= jobs:
            return
        if run.of in queue.failed:
            queue.waiting.remove(run)
            queue.failed.append(run.name)
        elif run.of not in queue.running and all(run.of != other.name for other in queue.waiting):
            queue.waiting.remove(run)
            queue.running[run.name] = _start(setup, run)
            print(f"> {run.name} (log: {_log(setup, run.name)})", file=sys.stderr, flush=True)


def _start(setup: Setup, run: Run) -> subprocess.Popen[bytes]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(setup.threads))}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_TESTS), os.environ.get("PYTHONPATH")]))
    folders = ("plan", "out", "build", "model", "data", "suite")
    options = [word for name in folders for word in (f"--{name}", str(getattr(setup, name)))]
    options += [word for name, folder in setup.folders.items() for word in ("--folder", f"{name}={folder}")]
    numbers = ["--threads", str(setup.threads), "--trial", str(setup.trial)]
    _log(setup, run.name).parent.mkdir(parents=True, exist_ok=True)
    with _log(setup, run.name).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "study", "one", run.name, *options, *numbers],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _collect(setup: Setup, queue: _Queue) -> None:
    """Take the runs that have ended off the list."""
    for name, process in list(queue.running.items()):
        code = process.poll()
        if code is None:
            continue
        del queue.running[name]
        if code:
            queue.failed.append(name)
        left = f"{len(queue.waiting)} wait"
        print(f"{'x' if code else '+'} {name} ended with {code}, {left}", file=sys.stderr, flush=True)


def _log(setup: Setup, name: str) -> Path:
    return setup.build / name / "log.txt"
