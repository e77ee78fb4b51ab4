"""Kills a write at every step that touches the disk, one after the other, in forked children."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path


def killed_at_every_step(
    folder: Path, write: Callable[[], object], lay: Callable[[], object], which: Callable[[], str]
) -> list[str]:
    """What is there after each kill: `lay` the old result, `write` the new one in a child that dies at its k-th step."""
    seen: list[str] = []
    step = 0
    while True:
        step += 1
        lay()
        child = os.fork()
        if child == 0:
            try:
                _die_at(step, str(folder))
                write()
            except BaseException:
                os._exit(9)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        seen.append(which())
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return seen


def _die_at(step: int, folder: str) -> None:
    left = step

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if arguments and folder in str(arguments[:2]) and (event == "open" or event.startswith(("os.", "shutil."))):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
