"""The apps under devices/, which are scripts beside each other and no package.

What needs a package of an app, or onnx, is collected where that is installed: `make apps` has an environment of its own for it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

DEVICES = Path(__file__).resolve().parents[2] / "devices"
ALONE = {"kuksa_client": "test_apps_broker.py", "flet": "test_apps_page.py", "onnx": "test_apps_java.py"}
collect_ignore = [file for package, file in ALONE.items() if importlib.util.find_spec(package) is None]
sys.path[:0] = [
    str(Path(__file__).parent),
    *(str(DEVICES / part) for part in ("automotive", "android/src", "android/chaquopy", "rpi5")),
]
