"""The wheel's tests and a bundle's smoke test at the lowest and the newest versions of what edgesafe depends on.

Each Python is that of a Debian, which debootstrap puts into a folder and chroot enters. What is installed is what a board
gets: nothing of tokenizers' own dependencies. Needs root and debootstrap; takes about ten minutes on two free cores:

  python tests/long/versions.py build/rpi5/bundle --out tests/bench/results/versions.json
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "devices"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edgesafe.progress import step, table
from edgesafe_boards import wheels
from edgesafe_boards.arm64_root import mirror
from results import write_result

DEBIANS = {"3.11": "bookworm", "3.13": "trixie"}
# Where the lowest versions have no wheels for that Python, the first that have.
FIRST = {"3.13": {"numpy": "2.1.0", "tokenizers": "0.20.2", "pillow": "10.4.0"}}
_LOWEST = re.compile(r"([\w-]+)>=([\d.]+)")
_HERE = "edgesafe"  # a folder of the Debian's root
_ENTER = """
mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && mount --rbind /sys "$1/sys"
cd "$1" && exec chroot . /usr/bin/env -i HOME=/root LANG=C.UTF-8 OMP_NUM_THREADS=1 PATH=/usr/bin:/bin sh -euc "cd /$2 && $3"
"""
_LIST = "import importlib.metadata as m; print({d.name.lower(): d.version for d in m.distributions()})"


def lowest(python: str) -> list[str]:
    """The lowest versions that pyproject.toml allows and that Python has wheels for."""
    named = dict(found.groups() for found in map(_LOWEST.fullmatch, wheels.dependencies()) if found)
    return [f"{name}=={version}" for name, version in (named | FIRST.get(python, {})).items()]


def newest(python: str) -> list[str]:
    """The packages alone: pip takes the newest."""
    return [name.partition(">")[0] for name in wheels.dependencies()]


def debian(root: Path, suite: str) -> None:
    """Put a Debian of this machine's processor into a folder, whole or not at all."""
    if root.is_dir():
        return
    partial = root.with_name(f"{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    words = ["debootstrap", "--variant=minbase", "--include=python3-minimal,python3-venv,e2fsprogs", suite, str(partial)]
    subprocess.run([*words, *filter(None, [mirror()])], check=True, stdout=subprocess.DEVNULL)
    partial.rename(root)


def entered(root: Path, script: str) -> tuple[int, str]:
    """Run a script in a Debian's folder of what is tried; its code and output."""
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", _ENTER, "sh", str(root), _HERE, script]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout.strip()


def tried(root: Path, build: wheels.Build, bundle: Path, python: str, wanted: list[str]) -> dict[str, Any]:
    """Install versions and let them answer: {versions, tests, tests_code, smoke_code}."""
    here = root / _HERE
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(build.tests, here / "tests")
    shutil.copytree(bundle, here / "bundle")
    wheels.fetch(here / "wheels", platform.machine(), python, [*wanted, *wheels.FOR_TESTS])
    shutil.copy(build.wheel, here / "wheels")
    pip = "venv/bin/python -m pip install -q --disable-pip-version-check --no-index --no-deps wheels/*.whl"
    code, said = entered(root, f"python3 -m venv venv && {pip} && venv/bin/python -c '{_LIST}'")
    if code:
        sys.exit(said)
    versions = json.loads(said.splitlines()[-1].replace("'", '"'))
    tests_code, tests = entered(root, "cd tests && PYTHONPATH=. ../venv/bin/python -m pytest .")
    smoke_code, smoke = entered(root, "venv/bin/edgesafe smoke bundle")
    with (root.parent / "versions.log").open("a", encoding="utf-8") as log:
        log.write(f"Python {python}, {versions}\n{tests}\n\n{smoke}\n\n")
    return {"versions": versions, "tests": tests.splitlines()[-1], "tests_code": tests_code, "smoke_code": smoke_code}


def main() -> int:
    """Try all of them; 1 where something fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a certified bundle")
    parser.add_argument("--python", choices=DEBIANS, help="this Python alone")
    parser.add_argument("--work", type=Path, default=Path("build/versions"), help="folder of the Debians (build/versions)")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    args = parser.parse_args()
    work, found = args.work.resolve(), []
    build = wheels.build(work / "wheel")
    for python, suite in DEBIANS.items():
        if args.python not in (None, python):
            continue
        debian(work / suite, suite)
        for name, wanted in (("lowest", lowest(python)), ("newest", newest(python))):
            start = time.perf_counter()
            with step(f"Python {python}, {name}"):
                row = tried(work / suite, build, args.bundle, python, wanted)
            found.append({"python": python, "which": name, **row, "seconds": round(time.perf_counter() - start, 1)})
    packages = newest("")
    rows = [[row["python"], *(row["versions"][p] for p in packages), row["tests"], row["smoke_code"]] for row in found]
    print(table(rows, ["Python", *packages, "the wheel's tests", "smoke's code"]))
    if args.out:
        write_result(args.out, {"tried": found})
    return 1 if any(row["tests_code"] or row["smoke_code"] for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
