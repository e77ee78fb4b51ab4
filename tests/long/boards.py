"""`make smoke DEVICE=rpi5` for real: emulated, on a processor that computes wrongly, and by ssh in good and bad conditions.

Needs root, qemu-user-static, debootstrap, openssh-server and sshpass; takes about 20 minutes on two free cores:

  python tests/long/boards.py build/rpi5/bundle --out tests/bench/results/boards.json

The ssh way reaches sshd on this machine (`loopback.py`), from an account that has nothing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "devices"))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "devices"))

from fake_systemd import SYSTEMCTL
from loopback import PASSWORD, Loopback, loopback

from edgesafe.format.latency import LATENCY_VERSION
from edgesafe.format.seal import read_sealed
from edgesafe.machine import machine_name
from edgesafe.progress import table
from edgesafe_boards.arm64_root import arm64_root
from edgesafe_boards.facts import FOLDER
from results import write_result

ROOT = Path(__file__).resolve().parents[2]
CUT_AFTER = 3  # files that have arrived when the connection is cut
ENV = os.environ | {"PYTHONPATH": f"{ROOT / 'devices'}:{os.environ.get('PYTHONPATH', '')}"}
CANNOT = 60
FEW = 20  # rows are enough to see what goes wrong everywhere
SERVED_ON = 28765  # the board's loopback is this machine's


def command(bundle: Path, work: Path, *more: str | Path) -> list[str]:
    """The command that `make smoke` runs for a board by ssh."""
    return [
        str(w) for w in (sys.executable, "-m", "edgesafe_boards", "rpi5", bundle, "--work", work, "--out", work / "out", *more)
    ]


def make_smoke(bundle: Path, work: Path, *more: str) -> list[str]:
    """`make smoke` of a bundle that lies anywhere, in the environment that is there."""
    out = work / "made"
    out.mkdir(exist_ok=True)
    (out / "bundle").unlink(missing_ok=True)
    (out / "bundle").symlink_to(bundle.resolve())
    return ["make", "-o", ".venv/ready", "smoke", "DEVICE=rpi5", f"OUT={out}", f"BOARD={work}", *more]


def ran(words: list[str], log: Path) -> tuple[int, str, float]:
    """Code, output with errors, seconds."""
    start = time.perf_counter()
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV, cwd=ROOT, check=False)
    with log.open("a") as file:
        file.write(f"$ {shlex.join(words)}\n{done.stdout}ended with {done.returncode}\n\n")
    return done.returncode, done.stdout, round(time.perf_counter() - start, 1)


def scenario(
    rows: list[list[Any]], name: str, wanted: int, shown: str, result: tuple[int, str, float], clean: bool = True
) -> None:
    """Keep a row; `clean` is whether the board was left as it should be."""
    code, text, seconds = result
    fine = code == wanted and shown in text and clean
    rows.append([name, wanted, code, seconds, "as wanted" if fine else "WRONG"])
    print(f"{name}: code {code} after {seconds} s: {'as wanted' if fine else 'WRONG'}", flush=True)


def bad_conditions(rows: list[list[Any]], server: Loopback, run: Callable[..., tuple[int, str, float]]) -> None:
    """What must be refused before anything is copied, and what breaks later."""
    untouched: Callable[[str], bool] = lambda user: not list(server.home(user).glob(f"{FOLDER}/*"))  # noqa: E731
    wrong = run("guest", server.by_password("wrong"))
    scenario(rows, "wrong password", CANNOT, "refuses the login", wrong, untouched("guest"))
    nobody = server.ssh.replace(f"-p {server.port}", "-p 9")
    scenario(rows, "nobody answers", CANNOT, "can't be reached", run("guest", nobody), untouched("guest"))
    for name, program, script, shown in (
        ("32-bit board", "uname", '[ "$1" = -m ] && echo armv7l || echo Linux', "armv7l"),
        ("no Python", "python3", "exit 127", "has no Python"),
        ("old Python", "python3", "echo 3 9 64 venv glibc 2.36", "Python is 3.9"),
        ("little memory", "grep", "echo MemAvailable: 50000 kB", "51 MB of free memory"),
    ):
        server.fake(program, script)
        scenario(rows, name, CANNOT, shown, run("guest", server.ssh), untouched("guest"))
        server.fake(program, None)
    by_password = run("small", server.by_password(PASSWORD))
    scenario(rows, "full disk, told before", CANNOT, "the board's disk has", by_password)
    server.fake("df", "echo Filesystem; echo x 9 0 99999999 0% /")
    scenario(rows, "full disk, met while installing", CANNOT, "the board's disk is full", run("small", server.ssh))
    server.fake("df", None)
    left = [path.name for path in (server.home("small") / FOLDER).glob("*")]
    scenario(rows, "and nothing is left of it", 0, "", (len(left), str(left), 0.0))


def cut_off(rows: list[list[Any]], server: Loopback, words: list[str], log: Path) -> None:
    """Cut the connection while the wheels are being copied."""
    start, partial = time.perf_counter(), server.home() / FOLDER / "wheels.partial"
    with (
        log.open("a") as file,
        subprocess.Popen(words, stdout=file, stderr=subprocess.PIPE, text=True, env=ENV, cwd=ROOT) as job,
    ):
        while job.poll() is None and len(list(partial.glob("*.whl"))) < CUT_AFTER:
            time.sleep(0.01)
        server.cut()
        errors = job.stderr.read() if job.stderr else ""
    arrived, installed = len(list(partial.glob("*.whl"))), (server.home() / FOLDER / "venv").exists()
    result = (job.returncode, errors, round(time.perf_counter() - start, 1))
    scenario(rows, f"cut off after {arrived} files", CANNOT, "the connection broke", result, arrived > 0 and not installed)


def good(rows: list[list[Any]], run: Callable[..., tuple[int, str, float]], server: Loopback, out: Path) -> dict[str, Any]:
    """The whole way, continued after the cut, and once more; what was fetched."""
    scenario(rows, "whole, continued after the cut", 0, "fetched from guest@127.0.0.1", run("guest", server.ssh))
    again = run("guest", server.by_password(PASSWORD))
    clean = "copying" not in again[1] and "installing" not in again[1]
    scenario(rows, "once more by password, nothing to copy", 0, "was measured before", again, clean)
    (folder,) = (out / "boards").iterdir()
    latency = read_sealed(folder / "latency.json") or {}
    records = [path.name for path in folder.glob("*.json") if path.name != "latency.json"]
    fine = latency.get("format_version") == LATENCY_VERSION and latency.get("machine") != machine_name() and records
    scenario(rows, "latency and record are the board's", 0, "", (0 if fine else 1, "", 0.0))
    return {"machine": latency.get("machine"), "records": records}


def served(rows: list[list[Any]], server: Loopback, deploy: Callable[..., tuple[int, str, float]]) -> None:
    """`make deploy` before and after the board has passed its test, again, on a port that is taken, and removed."""
    # systemd is no part of the board's system: a program starts and ends the one unit.
    server.fake("systemctl", SYSTEMCTL)
    server.fake("loginctl", "echo yes")
    on = ("--deploy", "--port", str(SERVED_ON))
    early = deploy("small", *on)
    scenario(rows, "deploy before any test", CANNOT, "is not what was tested", early)
    scenario(rows, "deploy", 0, f"serves this bundle on http://127.0.0.1:{SERVED_ON}/", deploy("guest", *on))
    scenario(rows, "deploy again", 0, "serves this bundle already", deploy("guest", *on))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        failed = deploy("guest", "--deploy", "--port", port)
    scenario(rows, "deploy to a port that is taken", CANNOT, "the former version was started again", failed)
    scenario(rows, "and the former one answers", 0, "serves this bundle already", deploy("guest", *on))
    gone = deploy("guest", "--remove")
    scenario(rows, "remove", 0, "was stopped and removed", gone, not (server.home() / "edgesafe-service").exists())


def main() -> int:
    """Run everything and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="the bundle of `make export DEVICE=rpi5`")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "board", help="as of `make smoke` (build/board)")
    parser.add_argument("--only", choices=("emulated", "wrong", "ssh"), help="this part alone")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    args = parser.parse_args()
    work, rows, parts = args.work.resolve(), [], {}
    log = work / "boards.log"
    work.mkdir(parents=True, exist_ok=True)
    if args.only in (None, "emulated"):
        result = ran(make_smoke(args.bundle, work), log)
        scenario(rows, "emulated", 0, "answers compared", result)
        parts["emulated"] = result[1].splitlines()
    if args.only in (None, "wrong"):
        result = ran(make_smoke(args.bundle, work, "CPU=max", f"ROWS={FEW}"), log)
        # make ends with 2 and says what its command ended with.
        scenario(rows, "emulated, a processor that is computed wrongly", 2, "Error 42", result)
    if args.only in (None, "ssh"):
        with loopback(arm64_root(work / "root"), work / "loopback") as server:

            def words(user: str, ssh: str) -> list[str]:
                return command(args.bundle, work, "--host", f"{user}@127.0.0.1", "--ssh", ssh)

            bad_conditions(rows, server, lambda user, ssh: ran(words(user, ssh), log))
            cut_off(rows, server, words("guest", server.ssh), log)
            parts["ssh"] = good(rows, lambda user, ssh: ran(words(user, ssh), log), server, work / "out")
            served(rows, server, lambda user, *more: ran([*words(user, server.ssh), *more], log))
    print(table(rows, ["case", "wanted code", "code", "s", ""]))
    if args.out:
        write_result(args.out, {"cases": rows, **parts})
    return 0 if all(row[-1] == "as wanted" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
