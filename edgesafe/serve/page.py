"""The page's side: the page itself, what it shows of the bundle, and answers as JSON lines."""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import Any

from edgesafe.errors import EdgesafeError, InputError, UncertifiedExitError
from edgesafe.format.exits import Exit, read_exit
from edgesafe.format.fields import Fields
from edgesafe.format.tiles import ALONE, prompt_runs
from edgesafe.runtime import Budget, Cancel, Progress, Session
from edgesafe.runtime.choose import QUANTILE, allowed_exits
from edgesafe.runtime.forecast import Forecast
from edgesafe.serve.chat import App
from edgesafe.serve.wire import Reply, api_error, status_of

PAGE = Path(__file__).parent / "page.html"


def send_page(reply: Reply) -> None:
    """The page, which may run its own script and nothing else."""
    nonce = secrets.token_urlsafe(16)
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src blob: data:; connect-src 'self'"
    )
    page = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce).encode()
    reply.send(HTTPStatus.OK, "text/html; charset=utf-8", page, {"Content-Security-Policy": policy})


def ask(app: App, body: bytes, reply: Reply) -> None:
    """Answer the page's question, in lines as they come.

    Raises:
        Refused: The queue is full.
        EdgesafeError: As by ``Session.ask``; once the lines have begun, the last one says it instead.
    """
    options, lines, cancel = read_ask(body), _Lines(reply), Cancel()
    with (
        app.line.place(),
        reply.watched(cancel),
        app.session.stream(**options, cancel=cancel, progress=lines.progress) as stream,
    ):
        lines.begin()
        try:
            for piece in stream:
                lines.write({"piece": piece})
            lines.write({"answer": stream.answer.to_dict()})
        except EdgesafeError as error:
            lines.write({"error": api_error(error, status_of(error))})


class _Lines:
    """JSON lines as they come; the connection's end is the body's."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    def begin(self) -> None:
        self._reply.begin("application/x-ndjson; charset=utf-8", {})

    def write(self, obj: Mapping[str, Any]) -> None:
        self._reply.write((json.dumps(obj) + "\n").encode())

    def progress(self, progress: Progress) -> None:
        # Written at every step, also to notice a browser that went away: the error ends the request and gives its turn up.
        self.write({"progress": asdict(progress)})


def read_ask(body: bytes) -> dict[str, Any]:
    """The options of ``Session.stream`` that a request's JSON gives.

    Raises:
        InputError: The body is not such JSON.
    """
    try:
        obj = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError("the body is not JSON", expected="{image, prompt, budget_ms or exit}") from error
    fields = Fields(obj, "the request", InputError)
    try:
        image = base64.b64decode(fields.text("image"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("the picture is not base64", where="image") from error
    options: dict[str, Any] = {
        "image": image,
        "prompt": fields.text("prompt"),
        "budget": Budget(fields.number("budget_ms")) if fields.has("budget_ms") else None,
        "exit": read_exit(fields) if fields.has("exit") else None,
    }
    if fields.has("max_new_tokens"):
        options["max_new_tokens"] = fields.integer("max_new_tokens", 1)
    fields.done()
    return options


def _predicted(session: Session, exit: Exit, words: int) -> Forecast:
    """The times of a prompt of so many tokens beside its picture's."""
    manifest = session.manifest
    cut, tokens = manifest.told_cut(exit), manifest.tokens_of(exit)
    if cut != ALONE:
        tokens = sum(prompt_runs(manifest.tiles, cut, manifest.image_token, tokens)[1])
    return session.predict(min(words + tokens, manifest.text.context_length - 1), cut.tiles)


def _preferred(session: Session, budget: Budget | None) -> list[str]:
    try:
        found = allowed_exits(session.bundle, session.certificate, session.standing, budget, None, session.allow_uncertified)
    except UncertifiedExitError:
        return []
    return [str(spec.exit) for spec in found[0]]


def facts(session: Session) -> dict[str, Any]:
    """What the page shows of a bundle before anything is asked."""
    manifest = session.manifest
    # A question of a line; the page says that it is a prediction for one.
    length = min(manifest.image_tokens + 24, manifest.text.context_length - 1)
    prediction = session.predict(length)
    times = {exit: _predicted(session, exit, length - manifest.image_tokens) for exit in manifest.ladder}
    verdicts = {e.exit: e.to_dict() for e in session.certificate.exits} if session.certificate else {}
    return {
        "name": manifest.name,
        "device": manifest.device,
        "quantization": manifest.quantization,
        "reference": str(manifest.reference),
        # What the runtime would take, its favourite last: with a budget the last of these that fits.
        "preferred": {"budget": _preferred(session, Budget(1.0)), "none": _preferred(session, None)},
        "prediction": prediction.source,
        "note": prediction.note,
        "exits": [
            {
                "exit": str(spec.exit),
                "certified": spec.exit in session.certified,
                "predicted_ms": times[spec.exit].ttft_ms(spec.graphs, QUANTILE, session.correction),
                "verdict": verdicts.get(spec.exit),
            }
            for spec in map(manifest.exit, manifest.by_cost)
        ],
    }
