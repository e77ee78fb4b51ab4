"""The device side: a bundle, a picture and a question in; text out, without torch."""

from __future__ import annotations

from edgesafe.runtime.asking import AnswerStream, PendingAnswer
from edgesafe.runtime.backend import Backend, OnnxRuntime, RunnableGraph
from edgesafe.runtime.choose import Budget, Prediction, choose_exit
from edgesafe.runtime.measure import measure
from edgesafe.runtime.session import Answer, Session
from edgesafe.runtime.turns import Cancel, Progress

__all__ = [
    "Answer",
    "AnswerStream",
    "Backend",
    "Budget",
    "Cancel",
    "OnnxRuntime",
    "PendingAnswer",
    "Prediction",
    "Progress",
    "RunnableGraph",
    "Session",
    "choose_exit",
    "measure",
]
