"""Results of long runs as committed JSON: what was counted, when, on what machine and with which versions."""

from __future__ import annotations

import datetime
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgesafe.bundle import write_atomically
from edgesafe.machine import machine_name

_PACKAGES = ("numpy", "onnxruntime", "tokenizers", "pillow")


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result with its circumstances."""
    head = {
        "date": datetime.date.today().isoformat(),
        "machine": machine_name(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps({**head, **result}, indent=1, ensure_ascii=False) + "\n").encode())
