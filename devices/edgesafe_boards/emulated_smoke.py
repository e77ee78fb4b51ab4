"""`make smoke` without a board: what a user would do on one, on an emulated one, and its answers beside the host's."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from edgesafe.errors import DeviceError
from edgesafe.format.files import held, write_atomically
from edgesafe.machine import machine_name
from edgesafe.progress import step, table
from edgesafe_boards import answers, facts, tasks, wheels
from edgesafe_boards.arm64_root import arm64_root
from edgesafe_boards.copies import fetch, send
from edgesafe_boards.differences import Difference, differences, digest
from edgesafe_boards.emulated import MARK, board_of, check_host, emulated, lanes
from edgesafe_boards.install import Cargo, install, open_bundle, rows_for_devices
from edgesafe_boards.shell import Shell, stop

# An emulated core takes a third of a second for an answer. So many rows at each exit keep a run below eight minutes.
ROWS = 75
MEASURE_S = 5  # the times are worth nothing; that measuring works is
PYTHON = "3.11"  # of arm64_root's Debian
_SHOWN = 20
Job = Callable[[Shell, tuple[str, ...], bool], tasks.Outcome]


@dataclass(frozen=True)
class Report:
    """What an emulated board gave, beside this machine. ``seconds`` is the time of the whole run."""

    board: str
    host: str
    smoke_code: int
    tests_code: int
    rows: int
    rows_for_devices: int
    compared: int
    differences: tuple[Difference, ...]
    digest: str
    texts: dict[str, str]
    took_s: dict[str, float]
    seconds: float

    @property
    def code(self) -> int:
        """What the run ends with: smoke's own code first."""
        return self.smoke_code or (DeviceError.exit_code if self.tests_code else 0)

    def text(self) -> str:
        """Each task's own output under its machine's name, the differences, and the closing table."""
        parts = [f"{MARK}\n{self.texts['measure']}", self.texts["smoke"], self.texts["tests"]]
        titles = ["edgesafe measure", "edgesafe smoke", "the wheel's tests"]
        shown = [f"== {title} on {self.board}\n{part}" for title, part in zip(titles, parts, strict=True)]
        return "\n\n".join([*shown, self._compared(), self._closing()])

    def _compared(self) -> str:
        title = f"== {self.board} beside {self.host}, token by token"
        rows = [[one.exit, one.id, one.place, one.host, one.board] for one in self.differences[:_SHOWN]]
        listed = [table(rows, ["exit", "row", "first other token", "host's", "board's"])] if rows else []
        left = len(self.differences) - len(rows)
        return "\n".join(
            [
                title,
                f"{self.rows} of the suite's {self.rows_for_devices} rows for devices were asked (ROWS=all asks all)",
                f"{self.compared} answers compared, {len(self.differences)} differ; digest of these {self.digest[:12]}",
                *listed,
                *([f"and {left} more"] if left else []),
            ]
        )

    def _closing(self) -> str:
        same = self.compared - len(self.differences)
        last = self.texts["tests"].splitlines()[-1:] or ["no output"]
        rows: list[list[object]] = [
            ["edgesafe measure", self.board, "ran; " + MARK, self.took_s["measure"]],
            ["edgesafe smoke", self.board, f"ended with {self.smoke_code}", self.took_s["smoke"]],
            ["the wheel's tests", self.board, last[0], self.took_s["tests"]],
            ["the same answers", self.board, f"{same} of {self.compared} have the host's tokens", None],
        ]
        return f"{table(rows, ['task', 'machine that answered', 'result', 's'])}\n{self.seconds:.0f} s in all"


def run(device: str, bundle_path: Path, work: Path, cpu: str | None = None, rows: int | None = ROWS) -> Report:
    """Build the board's system where it is not there, install the wheel, and run every task.

    Args:
        device: A profile's name.
        bundle_path: The bundle.
        work: A folder for the system, the wheels and what Linux says of the board.
        cpu: Another of QEMU's processors, such as ``max``.
        rows: About how many of the suite's rows for devices to ask, evenly spread; None asks all.

    Raises:
        DeviceError: This machine can't emulate, or a task doesn't run there.
        BundleError, IntegrityError: The bundle is none, or not whole.
    """
    start = time.perf_counter()
    board = board_of(device)
    check_host()
    bundle = open_bundle(bundle_path)
    subset = rows_for_devices(bundle)
    every = -(-subset // (rows or subset))
    with held(work), ThreadPoolExecutor(3) as pool:
        root, host = pool.submit(_root, work), pool.submit(_host_answers, bundle.root, every)
        built = pool.submit(wheels.build, work / "wheel")
        depended = wheels.depended(work, "aarch64", PYTHON, wheels.FOR_TESTS)
        build = built.result()
        files = {path.name: path for path in (build.wheel, *depended.glob("*.whl"))}
        cargo = Cargo(bundle, files)
        with emulated(board, root.result(), work / "machine", cpu) as shell:
            outcomes = _on_board(shell, cargo, build, every)
            board_answers = fetch(shell, tasks.ANSWERS).decode()
    found = differences(host.result(), board_answers)
    return _report(shell.name, outcomes, (-(-subset // every), subset), found, time.perf_counter() - start)


def write_report(report: Report, file: Path) -> None:
    """Write a report's fields as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(asdict(report), indent=1) + "\n").encode())


def _root(work: Path) -> Path:
    with step("Debian of arm64"):
        return arm64_root(work / "root")


def _host_answers(bundle: Path, every: int) -> str:
    """The answers of this machine, in a process of its own, whose libraries are those of this environment."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / tasks.ANSWERS
        done = subprocess.run(
            [sys.executable, answers.__file__, "ask", bundle, file, str(every)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise DeviceError(f"this machine can't answer: {done.stderr.strip().splitlines()[-1:]}", where=str(bundle))
        return file.read_text(encoding="utf-8")


def _on_board(shell: Shell, cargo: Cargo, build: wheels.Build, every: int) -> dict[str, tasks.Outcome]:
    told = facts.ask(shell)
    facts.check_system(told, shell.name)
    install(shell, told, cargo)
    send(shell, wheels.contents(build.tests) | {"answers.py": Path(answers.__file__)}, "tests")
    with step(f"smoke on {shell.name}"):
        smoked = tasks.smoke_by_token(shell, every)
    jobs: dict[str, Job] = {
        "tests": tasks.tests,
        "measure": partial(tasks.measure, seconds=MEASURE_S),
    }
    return {"smoke": smoked} | _in_lanes(shell, jobs)


def _in_lanes(shell: Shell, jobs: dict[str, Job]) -> dict[str, tasks.Outcome]:
    """Run the jobs, the longest first, so many at a time as there are lanes, each on a core of its own."""
    free: SimpleQueue[tuple[str, ...]] = SimpleQueue()
    for lane in (every := lanes()):
        free.put(lane)

    def one(name: str, job: Job) -> tasks.Outcome:
        lane = free.get()
        try:
            with step(f"{name} on {shell.name}"):
                return job(shell, lane, True)
        finally:
            free.put(lane)

    with ThreadPoolExecutor(len(every)) as pool:
        running: dict[str, Future[tasks.Outcome]] = {name: pool.submit(one, name, job) for name, job in jobs.items()}
        try:
            return {name: future.result() for name, future in running.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            raise


def _report(
    board: str,
    outcomes: dict[str, tasks.Outcome],
    rows: tuple[int, int],
    found: tuple[int, list[Difference]],
    seconds: float,
) -> Report:
    return Report(
        board=board,
        host=machine_name(),
        smoke_code=outcomes["smoke"].code,
        tests_code=outcomes["tests"].code,
        rows=rows[0],
        rows_for_devices=rows[1],
        compared=found[0],
        differences=tuple(found[1]),
        digest=digest(found[1]),
        texts={name: outcomes[name].text for name in ("measure", "smoke", "tests")},
        took_s={name: round(outcome.seconds, 1) for name, outcome in outcomes.items()},
        seconds=round(seconds, 1),
    )
