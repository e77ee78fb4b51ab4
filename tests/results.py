"""Results of long runs as committed JSON (`bench/results`): what was counted, when, on what machine and with which versions."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgesafe.format.files import write_atomically
from edgesafe.machine import machine_name

_PACKAGES = ("numpy", "onnxruntime", "tokenizers", "pillow")


def circumstances() -> dict[str, Any]:
    """When and where, with which versions, and how busy the machine is (its load averages)."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine_name(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result with its circumstances as they are at its end."""
    write_json(path, circumstances() | result)
