"""The device side: a bundle, a picture and a question in; text out, without torch."""

from __future__ import annotations

from edgesafe.runtime.choose import Budget, choose_exit
from edgesafe.runtime.forecast import Forecast
from edgesafe.runtime.measure import measure
from edgesafe.runtime.session import Answer, AnswerStream, Session

__all__ = ["Answer", "AnswerStream", "Budget", "Forecast", "Session", "choose_exit", "measure"]
