"""A board that is this machine's own shell in an empty home, with programs of its own in front of the system's."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgesafe_boards.shell import Shell


@pytest.fixture
def board(tmp_path: Path) -> Shell:
    """Scripts run in ``tmp_path/home``; a program in ``tmp_path/bin`` takes the place of the system's."""
    for name in ("home", "bin"):
        (tmp_path / name).mkdir()
    path = f"PATH={tmp_path / 'bin'}:/usr/bin:/bin"
    return Shell("the board", ("env", "-i", f"HOME={tmp_path / 'home'}", path, "sh", "-c", 'cd && eval "$0"'))


@pytest.fixture
def program(tmp_path: Path, board: Shell):
    """Puts a program of ``sh`` on the board."""

    def put(name: str, script: str) -> None:
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/sh\n{script}\n", encoding="ascii")
        file.chmod(0o755)

    return put
