"""Two folders exchanged in one step, where the system can: no moment at which a reader finds neither, or half of one."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_HERE = -100  # AT_FDCWD: relative paths start at the working folder
_SWAP = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS


def exchange(a: Path, b: Path) -> bool:
    """Each gets the other's name; False where the system or the file system can't, and then nothing has changed.

    Source: renameat2(2) of Linux, renamex_np(2) of macOS.
    """
    first, second = os.fsencode(a), os.fsencode(b)
    try:
        libc = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return bool(libc.renamex_np(first, second, _SWAP) == 0)
        return bool(libc.renameat2(_HERE, first, _HERE, second, _SWAP) == 0)
    except (AttributeError, OSError, TypeError):  # no such function in this C library, or no C library to ask
        return False
