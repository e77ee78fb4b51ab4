"""The device side: a bundle, a picture and a question in; text out, without torch."""

from __future__ import annotations

from edgesafe.runtime.answer import Answer
from edgesafe.runtime.asking import AnswerStream, PendingAnswer
from edgesafe.runtime.choose import Budget, choose_exit
from edgesafe.runtime.conversation import Conversation
from edgesafe.runtime.engine import Engine, OnnxRuntime, RunnableGraph
from edgesafe.runtime.forecast import Forecast
from edgesafe.runtime.measure import measure
from edgesafe.runtime.sampling import Sampling
from edgesafe.runtime.session import Session
from edgesafe.runtime.turns import Cancel, Progress

__all__ = [
    "Answer",
    "AnswerStream",
    "Engine",
    "Budget",
    "Cancel",
    "Conversation",
    "Forecast",
    "OnnxRuntime",
    "PendingAnswer",
    "Progress",
    "RunnableGraph",
    "Sampling",
    "Session",
    "choose_exit",
    "measure",
]
