"""The wheel and a bundle on a board: checked before anything is copied, copied whole, installed by pip as a user would."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from edgesafe.errors import DeviceError
from edgesafe.format.bundle import CERTIFICATE, LATENCY, MANIFEST, Bundle, signature_path
from edgesafe.format.suite import read_suite
from edgesafe.progress import step
from edgesafe_boards.copies import send
from edgesafe_boards.facts import FOLDER, Facts, Needs, check_room
from edgesafe_boards.shell import Shell
from edgesafe_boards.wheels import install_key

PYTHON = "venv/bin/python"
EDGESAFE = "venv/bin/edgesafe"
# Measured: 51 MB of wheels are an environment of 203 MB, and lie beside it until it is whole.
_UNPACKED = 5
_SPARE = 50_000_000
# An environment of its own, because Debian's Python refuses pip (PEP 668). The key is written last: without it nothing counts.
_INSTALL = f"""
cd {FOLDER} && rm -rf venv ready && {{
    python3 -m venv --without-pip venv && {PYTHON} -m ensurepip &&
    {PYTHON} -m pip install -q --disable-pip-version-check --no-index --no-deps wheels/*.whl &&
    rm -f bundle/{LATENCY} && echo KEY > ready.partial && mv ready.partial ready && rm -rf wheels
}} || {{ code=$?; rm -rf venv wheels ready.partial; exit $code; }}
"""


@dataclass(frozen=True)
class Cargo:
    """What goes to a board: a verified bundle, and the wheels by file name, which are all that is installed."""

    bundle: Bundle
    wheels: dict[str, Path]

    @property
    def bundle_files(self) -> dict[str, Path]:
        """The bundle's files by path: all but a measurement, which is of this machine."""
        sealed = [self.bundle.root / name for name in (MANIFEST, CERTIFICATE)]
        extra = [path for path in (*sealed, *map(signature_path, sealed)) if path.exists()]
        return {path: self.bundle.root / path for path in self.bundle.manifest.files} | {path.name: path for path in extra}

    @property
    def bundle_key(self) -> str:
        """What `edgesafe_boards.facts` tells of the same bundle on a board."""
        data = b"".join((self.bundle.root / name).read_bytes() for name in (MANIFEST, CERTIFICATE))
        return hashlib.sha256(data).hexdigest()


def open_bundle(path: Path) -> Bundle:
    """A verified bundle with a certificate.

    Raises:
        BundleError, IntegrityError: It is none, or not whole.
        DeviceError: It has no certificate, so that no board could agree with it.
    """
    bundle = Bundle.open(path)
    if not (bundle.root / CERTIFICATE).is_file():
        what = "the bundle has no certificate that a board could agree with"
        raise DeviceError(what, where=str(path), expected=CERTIFICATE, todo=f"edgesafe certify {path}")
    return bundle


def rows_for_devices(bundle: Bundle) -> int:
    """How many rows `edgesafe smoke` asks of a bundle.

    Raises:
        DeviceError: It ships no suite.
    """
    if bundle.manifest.suite is None:
        what = "the bundle ships no suite that a board could answer"
        raise DeviceError(what, where=str(bundle.root), expected="a suite inside it", todo="export it with --suite")
    return len(read_suite(bundle.root / bundle.manifest.suite.path, verify=False).smoke_rows())


def needs(cargo: Cargo, facts: Facts) -> Needs:
    """What is still to be put on the board, and what opening the bundle takes there."""
    files = cargo.bundle.manifest.files
    disk = _SPARE
    disk += 0 if facts.bundle == cargo.bundle_key else sum(spec.bytes for spec in files.values())
    disk += 0 if facts.installed == install_key(cargo.wheels) else int(_UNPACKED * sum(map(_size, cargo.wheels.values())))
    # Graphs and weights are read once, and packed for the kernels beside that; Python and its packages take 150 MB.
    memory = 150_000_000 + int(1.5 * sum(spec.bytes for path, spec in files.items() if path.startswith(("text/", "vision/"))))
    return Needs(disk, memory)


def install(shell: Shell, facts: Facts, cargo: Cargo) -> None:
    """Put the wheels and the bundle on a board, but for what is there already.

    Raises:
        DeviceError: The board lacks room, can't be reached, or pip fails there; then no environment is left.
    """
    check_room(facts, needs(cargo, facts), shell.name)
    key = install_key(cargo.wheels)
    if facts.installed != key:
        with step(f"installing the wheel on {shell.name}"):
            send(shell, cargo.wheels, "wheels")
            todo = "look at the message, then run it again: what was installed is removed again"
            script = _INSTALL.replace("KEY", key)
            shell.run(script, "installing the wheel by pip", todo=todo)
    if facts.bundle != cargo.bundle_key:
        with step(f"copying the bundle to {shell.name}"):
            digests = {path: spec.sha256 for path, spec in cargo.bundle.manifest.files.items()}
            send(shell, cargo.bundle_files, "bundle", digests)


def _size(path: Path) -> int:
    return path.stat().st_size
