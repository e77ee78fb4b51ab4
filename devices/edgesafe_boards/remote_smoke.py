"""`make smoke HOST=user@address`: the wheel and a bundle on a board by ssh, measured and tested there, results fetched back."""

from __future__ import annotations

import re
from pathlib import Path

from edgesafe.format.bundle import LATENCY
from edgesafe.format.files import held, write_atomically
from edgesafe.progress import step
from edgesafe_boards import facts, tasks, wheels
from edgesafe_boards.copies import fetch
from edgesafe_boards.install import Cargo, install, needs, open_bundle
from edgesafe_boards.shell import Shell
from edgesafe_boards.ssh import connected

RECORDS = "bundle.smoke"


def run(address: str, ssh: str, bundle_path: Path, work: Path, out: Path) -> int:
    """Install on a board, measure where that was not done, run smoke, and fetch what they wrote; smoke's exit code.

    Args:
        address: The board, as ssh takes it.
        ssh: The command, with options of your own.
        bundle_path: The bundle.
        work: A folder for the wheels.
        out: What comes back lies in ``boards/ADDRESS`` there.

    Raises:
        ConfigError: The address is none.
        DeviceError: The board can't be reached or doesn't fit, or a step fails there.
        BundleError, IntegrityError: The bundle is none, or not whole.
    """
    bundle = open_bundle(bundle_path)
    with connected(address, ssh) as shell:
        told = facts.ask(shell)
        facts.check_system(told, address)
        with held(work):
            with step("the wheel and what it depends on"):
                build = wheels.build(work / "wheel")
                depended = wheels.depended(work, told.machine, told.python_text)
            files = {path.name: path for path in (build.wheel, *depended.glob("*.whl"))}
            cargo = Cargo(bundle, files)
            facts.check_room(told, needs(cargo, told), address)
            install(shell, told, cargo)
        return _ask(shell, out / "boards" / re.sub(r"[^\w.@-]", "-", address))


def _ask(shell: Shell, kept: Path) -> int:
    """Measure and run smoke, print and keep what they gave."""
    kept.mkdir(parents=True, exist_ok=True)
    there = shell.run(f"cd {facts.FOLDER} && ls bundle/{LATENCY} 2>/dev/null || true", "looking for a measurement").text.strip()
    if there:
        print(f"{shell.name} was measured before; `rm ~/{facts.FOLDER}/{there}` there to measure again")
    else:
        with step(f"edgesafe measure on {shell.name}"):
            measured = tasks.measure(shell, show=True)
        write_atomically(kept / "measure.txt", f"{measured.text}\n".encode())
        print(f"== edgesafe measure on {shell.name}\n{measured.text}")
    write_atomically(kept / LATENCY, fetch(shell, f"bundle/{LATENCY}"))
    with step(f"edgesafe smoke on {shell.name}"):
        smoked = tasks.smoke(shell, show=True)
    write_atomically(kept / "smoke.txt", f"{smoked.text}\n".encode())
    print(f"\n== edgesafe smoke on {shell.name}\n{smoked.text}")
    names = shell.run(f"cd {facts.FOLDER}/{RECORDS} && ls", "looking for the record").text.split()
    for name in names:
        write_atomically(kept / name, fetch(shell, f"{RECORDS}/{name}"))
    print(f"\nfetched from {shell.name} into {kept}: {', '.join([LATENCY, *names])}")
    return smoked.code
