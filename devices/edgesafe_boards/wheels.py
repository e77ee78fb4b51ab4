"""What goes to a board besides the bundle: the wheel of this checkout, what it depends on, and its tests."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from edgesafe.errors import ConfigError, DeviceError
from edgesafe.format.files import replacing, sha256_file
from edgesafe_boards.emulated import ROOT

CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
# The wheels' oldest C libraries that pip is to take for one that is at least as new as the first.
GLIBCS = ("2_28", "2_27", "2_17")
FOR_TESTS = ("pytest", "pytest-socket")
# Taken without its dependencies: it asks for a client of the Hugging Face hub, which nothing on a board imports.
ALONE = "tokenizers"


@dataclass(frozen=True)
class Build:
    """What `tests/wheel.py --prepare` makes: the wheel, and its tests with all that they use."""

    wheel: Path
    tests: Path


def build(folder: Path) -> Build:
    """Build the wheel of this checkout and lay out its tests.

    Raises:
        ConfigError: It can't be built, or isn't right.
    """
    words: list[str | Path] = [sys.executable, ROOT / "tests" / "wheel.py", folder, "--prepare"]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"the wheel can't be built: {done.stdout.strip()}", where=str(ROOT), todo="see `make wheel`")
    (wheel,) = folder.glob("*.whl")
    return Build(wheel, folder / "tests")


def depended(work: Path, machine: str, python: str, more: tuple[str, ...] = ()) -> Path:
    """A folder with all wheels that edgesafe needs on a board, in the versions that it is tested with; fetched once.

    Args:
        work: Where such folders lie.
        machine: The board's architecture, such as ``aarch64``.
        python: The board's Python, such as ``3.11``.
        more: Packages that are wanted besides.

    Raises:
        DeviceError: pip can't fetch them.
    """
    wanted = [*dependencies(), *more]
    parts = [*wanted, ALONE, machine, python, CONSTRAINTS.read_text(encoding="utf-8")]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    folder = work / f"wheels-{machine}-{python}-{key[:8]}"
    if folder.is_dir():
        return folder
    with replacing(folder, "folder of wheels", key=key) as partial:
        fetch(partial / "new", machine, python, wanted, "-c", str(CONSTRAINTS))
    return folder


def dependencies() -> list[str]:
    """What edgesafe depends on, as `pyproject.toml` says it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [str(name) for name in project["dependencies"]]


def fetch(folder: Path, machine: str, python: str, wanted: list[str], *options: str) -> None:
    """Let pip download wheels, with what they depend on but for that of ``ALONE``.

    Raises:
        DeviceError: pip can't fetch them.
    """
    platforms = [f"--platform=manylinux_{glibc}_{machine}" for glibc in GLIBCS] + [f"--platform=manylinux2014_{machine}"]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--only-binary=:all:", *platforms]
    words = [*pip, f"--python-version={python}", "--implementation=cp", *options, "-d", str(folder)]
    alone = [name for name in wanted if name.startswith(ALONE)]
    for these in (["--no-deps", *alone], [name for name in wanted if name not in alone]):
        done = subprocess.run([*words, *these], capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
            raise DeviceError(
                f"pip can't fetch wheels for Python {python} on {machine}: {' '.join(errors) or 'no message'}",
                where="pip download",
                expected="a package index that this machine reaches, with wheels for that Python",
                todo="look at the network and `pip config list` here, then run it again",
            )


def install_key(files: dict[str, Path]) -> str:
    """What tells one set of wheels from another."""
    return hashlib.sha256("".join(f"{name} {sha256_file(path)}\n" for name, path in sorted(files.items())).encode()).hexdigest()


def contents(folder: Path) -> dict[str, Path]:
    """The files of a folder by their paths in it."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
