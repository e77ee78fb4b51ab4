"""``/v1/chat/completions`` and ``/v1/models``: the OpenAI API's shapes, with what the certificate says of each answer."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

from PIL import Image

from edgesafe.errors import EdgesafeError
from edgesafe.format.exits import Exit
from edgesafe.runtime import Answer, Cancel, Progress, Session
from edgesafe.runtime.conversation import Conversation
from edgesafe.runtime.forecast import WAIT
from edgesafe.runtime.image import Picture
from edgesafe.runtime.scope import reasons_outside
from edgesafe.serve.chat_request import ChatRequest, read_chat
from edgesafe.serve.line import Line
from edgesafe.serve.messages import ONE_QUESTION
from edgesafe.serve.metrics import Metrics
from edgesafe.serve.wire import Reply, api_error, status_of

_CHUNK = "chat.completion.chunk"
# The API knows no deadline: to its clients an answer that was cut is one that was too long.
_FINISH = {"stop": "stop", "length": "length", "deadline": "length"}


@dataclass
class App:
    """What the requests of one server share.

    Attributes:
        session: The opened bundle.
        line: The queue.
        folders: Where pictures may be read from, real paths.
        metrics: The counts.
        created: Seconds since 1970.
    """

    session: Session
    line: Line
    folders: tuple[Path, ...] = ()
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> str:
        """The one model's name."""
        return self.session.manifest.name

    @property
    def certificate(self) -> str | None:
        """The certificate's digest."""
        return self.session.certificate.digest if self.session.certificate else None

    @property
    def scope(self) -> str:
        """What a passed verdict speaks for."""
        return f"{self.session.scope}, each to {ONE_QUESTION}"


def models(app: App) -> dict[str, Any]:
    """The list of the one model."""
    return {"object": "list", "data": [model(app)]}


def model(app: App) -> dict[str, Any]:
    """The bundle as a model of the API."""
    session = app.session
    facts = {
        "bundle": session.bundle.digest,
        "certificate": app.certificate,
        "scope": app.scope,
        "reference": str(session.manifest.reference),
        "exits": [str(exit) for exit in session.manifest.ladder],
        "certified": [str(exit) for exit in session.certified],
        "why": session.standing.why,
        "device": session.manifest.device,
        "quantization": session.manifest.quantization,
    }
    # Clients that ask how long a prompt may be look for vLLM's name of it.
    known = {"id": app.model, "object": "model", "created": app.created, "owned_by": "edgesafe"}
    return {**known, "max_model_len": session.manifest.text.context_length, "edgesafe": facts}


def chat(app: App, body: bytes, reply: Reply) -> None:
    """Answer one request, whole or as it comes.

    Raises:
        Refused: It names another model, or the queue is full.
        EdgesafeError: As by ``Session.ask``; once a stream has begun, its last event says it instead.
    """
    answering, cancel = None, Cancel()
    try:
        # In line before anything is read, so that only so many pictures are held at once.
        with app.line.place(), reply.watched(cancel):
            answering = _Answering(app, read_chat(body, app.model, app.folders), reply)
            answer = answering.run(cancel)
        # Out of the line first: whoever has the whole reply may ask again at once, and finds the place free.
        answering.finish(answer)
    except EdgesafeError as error:
        if answering is None or not answering.begun or cancel.cancelled:
            raise
        app.metrics.error(error, status_of(error))
        answering.event({"error": api_error(error, status_of(error))})


class _Answering:
    """One request while it is answered."""

    def __init__(self, app: App, asked: ChatRequest, reply: Reply) -> None:
        self.begun = False
        self._app, self._asked, self._reply = app, asked, reply
        self._read = self._made = 0  # tokens
        self._talk: Conversation | None = None
        self._cancel = Cancel()
        self._common = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": app.model,
            "system_fingerprint": f"fp_{app.session.bundle.digest[:16]}",
        }

    def run(self, cancel: Cancel) -> Answer:
        """Ask, and send the pieces where they are wanted as they come."""
        app, asked, prompt = self._app, self._asked, self._asked.question.prompt
        self._cancel = cancel
        picture = self._picture()
        self._talk = app.session.conversation(
            picture,
            asked.budget,
            exit=asked.exit,
            max_new_tokens=asked.max_new_tokens,
            sampling=asked.sampling,
            cancel=cancel,
            progress=self._step,
        )
        with self._talk.stream(prompt) as stream:
            for piece in stream:
                if asked.stream:
                    self._chunk({"content": piece})
            answer = self._settled(stream.answer)
        self._read = self._talk.prompt_tokens
        return answer

    def finish(self, answer: Answer) -> None:
        """Count the answer, and send it or what is left of it."""
        app, asked, read, made = self._app, self._asked, self._read, self._made
        app.line.took((answer.total_ms - answer.actual_ms[WAIT]) / 1e3)
        app.metrics.answered(answer, asked.question.prompt, read, made)
        usage = {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
        if asked.stream:
            self._end(answer, usage)
        else:
            self._whole(answer, usage)

    def event(self, obj: Mapping[str, Any]) -> None:
        """One event of the stream."""
        self._reply.write(b"data: " + json.dumps(obj).encode() + b"\n\n")

    def _picture(self) -> Picture:
        """The request's picture; where it has none a white one of the size that the bundle sees, which the answer says."""
        size = self._app.session.manifest.image
        return self._asked.picture or Image.new("RGB", (size.width, size.height), "white")

    def _step(self, progress: Progress) -> None:
        if progress.stage != "decode":
            return
        self._made = progress.done
        if self._reply.gone():  # the thread that watches may hear of it a token later
            self._cancel.cancel()
        if self._asked.stream and not self.begun:
            assert self._talk is not None and self._talk.exit is not None
            self._reply.begin("text/event-stream; charset=utf-8", self._early_headers(self._talk.exit))
            self.begun = True
            self._chunk({"role": "assistant", "content": ""})

    def _settled(self, answer: Answer) -> Answer:
        """The answer, not certified where its question is unlike those that were."""
        outside = self._asked.question.outside
        if not outside:
            return answer
        note = f"NOT certified: the answer {' and '.join(outside)}, but exits are certified on {ONE_QUESTION}"
        return replace(answer, certified=False, note="; ".join(filter(None, (note, answer.note))))

    def _early_headers(self, exit: Exit) -> dict[str, str]:
        """What is known at the first token: a length beyond the certified one shows at the end alone."""
        session, asked = self._app.session, self._asked
        before = exit in session.certified and not asked.question.outside
        before = before and not reasons_outside(session.scope, asked.sampling, 0, asked.question.prompt)
        longest = min(asked.max_new_tokens, session.scope.max_new_tokens + 1)
        settled = not before or not reasons_outside(session.scope, asked.sampling, longest)
        certified = str(before).lower() if settled else "open"
        return {"X-Edgesafe-Exit": str(exit), "X-Edgesafe-Certified": certified, **self._evidence()}

    def _evidence(self) -> dict[str, str]:
        return {"X-Edgesafe-Certificate": self._app.certificate or "none", "X-Edgesafe-Bundle": self._app.session.bundle.digest}

    def _facts(self, answer: Answer) -> dict[str, Any]:
        """What is known of the answer but its text."""
        known = {name: value for name, value in answer.to_dict().items() if name != "text"}
        evidence = {"bundle": self._app.session.bundle.digest, "certificate": self._app.certificate, "scope": self._app.scope}
        return known | evidence

    def _whole(self, answer: Answer, usage: Mapping[str, int]) -> None:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _FINISH[answer.finish_reason]}
        headers = {
            "X-Edgesafe-Exit": str(answer.exit),
            "X-Edgesafe-Certified": str(answer.certified).lower(),
            "X-Edgesafe-Why": answer.why,
            "X-Edgesafe-Note": answer.note,
            "X-Edgesafe-TTFT-Ms": f"{answer.ttft_ms:.3f}",
            "X-Edgesafe-Total-Ms": f"{answer.total_ms:.3f}",
            **self._evidence(),
        }
        obj = {**self._common, "object": "chat.completion", "choices": [choice], "usage": usage}
        self._reply.json(HTTPStatus.OK, {**obj, "edgesafe": self._facts(answer)}, headers)

    def _chunk(self, delta: Mapping[str, str], finish: str | None = None, **more: Any) -> None:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        self.event({**self._common, "object": _CHUNK, "choices": [choice], **more})

    def _end(self, answer: Answer, usage: Mapping[str, int]) -> None:
        self._chunk({}, _FINISH[answer.finish_reason], edgesafe=self._facts(answer))
        if self._asked.include_usage:
            self.event({**self._common, "object": _CHUNK, "choices": [], "usage": usage})
        self._reply.write(b"data: [DONE]\n\n")
