"""The device side: a bundle, a picture and a question in; text out, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgesafe.runtime.answer import Answer, AnswerStream, PendingAnswer
from edgesafe.runtime.choose import Budget, choose_exit
from edgesafe.runtime.conversation import Conversation
from edgesafe.runtime.engine import Engine, Graph, Reader, RunnableGraph
from edgesafe.runtime.forecast import Forecast
from edgesafe.runtime.measure import measure
from edgesafe.runtime.sampling import Sampling
from edgesafe.runtime.session import Session
from edgesafe.runtime.turns import Cancel, Progress

if TYPE_CHECKING:
    from edgesafe.runtime.ort import OnnxRuntime

__all__ = [
    "Answer",
    "AnswerStream",
    "Budget",
    "Cancel",
    "Conversation",
    "Engine",
    "Forecast",
    "Graph",
    "OnnxRuntime",
    "PendingAnswer",
    "Progress",
    "Reader",
    "RunnableGraph",
    "Sampling",
    "Session",
    "choose_exit",
    "measure",
]


def __getattr__(name: str) -> Any:
    """Load the default engine when it is named, since another one needs no onnxruntime."""
    if name != "OnnxRuntime":
        raise AttributeError(f"module 'edgesafe.runtime' has no attribute {name!r}")
    from edgesafe.runtime.ort import OnnxRuntime

    return OnnxRuntime
