"""The device side: a bundle, a picture and a question in; text out, without torch."""

from __future__ import annotations

from edgesafe.runtime.choose import Budget, Prediction, choose_exit
from edgesafe.runtime.conversation import Conversation
from edgesafe.runtime.measure import measure
from edgesafe.runtime.sampling import Sampling
from edgesafe.runtime.session import Answer, AnswerStream, Session

__all__ = ["Answer", "AnswerStream", "Budget", "Conversation", "Prediction", "Sampling", "Session", "choose_exit", "measure"]
