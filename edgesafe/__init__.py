"""edgesafe: vision-language models whose every early exit is certified safe before a device may use it.

The public names are loaded on first use, so that ``import edgesafe`` costs nothing and the base install needs
neither torch nor transformers.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# From 1.29 on, onnxruntime's own wheels send usage data to Microsoft unless they are told not to before their first import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from edgesafe.assurance.signing import Verified, sign, verify
    from edgesafe.certify.smoke import smoke
    from edgesafe.certify.string_judge import refuses
    from edgesafe.device import DeviceProfile, list_devices, load_device
    from edgesafe.errors import EdgesafeError
    from edgesafe.format.bundle import Bundle
    from edgesafe.format.certificate import Certificate
    from edgesafe.format.exits import Exit
    from edgesafe.runtime import Answer, Budget, Sampling, Session, choose_exit, measure

_HOMES = {
    "Answer": "edgesafe.runtime",
    "Budget": "edgesafe.runtime",
    "Bundle": "edgesafe.format.bundle",
    "Certificate": "edgesafe.format.certificate",
    "DeviceProfile": "edgesafe.device",
    "EdgesafeError": "edgesafe.errors",
    "Exit": "edgesafe.format.exits",
    "Sampling": "edgesafe.runtime",
    "Session": "edgesafe.runtime",
    "Verified": "edgesafe.assurance.signing",
    "choose_exit": "edgesafe.runtime",
    "list_devices": "edgesafe.device",
    "load_device": "edgesafe.device",
    "measure": "edgesafe.runtime",
    "refuses": "edgesafe.certify.string_judge",
    "sign": "edgesafe.assurance.signing",
    "smoke": "edgesafe.certify.smoke",
    "verify": "edgesafe.assurance.signing",
}

__all__ = [
    "Answer",
    "Budget",
    "Bundle",
    "Certificate",
    "DeviceProfile",
    "EdgesafeError",
    "Exit",
    "Sampling",
    "Session",
    "Verified",
    "__version__",
    "choose_exit",
    "list_devices",
    "load_device",
    "measure",
    "refuses",
    "sign",
    "smoke",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module that holds it."""
    import importlib

    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'edgesafe' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
