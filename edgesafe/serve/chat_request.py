"""What a client may send to ``/v1/chat/completions``: each field is honoured, or without effect on the answer, or refused."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from edgesafe.errors import InputError
from edgesafe.format.exits import Exit
from edgesafe.format.fields import Fields
from edgesafe.format.suite import MAX_NEW_TOKENS
from edgesafe.runtime import Budget, Sampling
from edgesafe.serve.messages import Question, ask_of, read_messages
from edgesafe.serve.sources import read_picture
from edgesafe.serve.wire import Refused

MOST_STOPS = 4
# They change nothing in the answer of a bundle.
WITHOUT_EFFECT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("reasoning_effort", "verbosity", "parallel_tool_calls", "stream_options"),
)
# Each asks for something that a bundle doesn't do, but for the values that ask for nothing.
_NOTHING: tuple[object, ...] = (None, False, 0, 0.0, "", "none", "auto", [], {}, {"type": "text"}, ["text"])
NOT_DONE = (
    *("tools", "tool_choice", "tool_prompt", "functions", "function_call", "response_format", "modalities", "audio"),
    *("logprobs", "top_logprobs", "logit_bias", "frequency_penalty", "presence_penalty", "prediction", "web_search_options"),
)


@dataclass(frozen=True)
class ChatRequest:
    """A request as the session is asked it; ``picture`` are a file's bytes."""

    question: Question
    picture: bytes | None
    budget: Budget | None
    exit: Exit | None
    max_new_tokens: int
    sampling: Sampling
    stream: bool
    include_usage: bool


def read_chat(body: bytes, model: str, folders: Sequence[Path]) -> ChatRequest:
    """Read a body strictly, and its picture.

    Args:
        body: JSON.
        model: The one model's name.
        folders: Where pictures may be read from.

    Raises:
        InputError: The body is not such a request.
        Refused: It names another model: 404, as the API has it.
    """
    try:
        obj = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError("the body is not JSON", expected='{"model": ..., "messages": [...]}') from error
    fields = Fields(obj, "the request", InputError)
    named = fields.text("model")
    if named != model:
        other = InputError(f"there is no model {named[:80]!r}", where="model", expected=model, todo="see /v1/models")
        raise Refused(HTTPStatus.NOT_FOUND, other)
    stream = fields.has("stream") and fields.flag("stream")
    include_usage = stream and _include_usage(fields)
    question, budget, sampling = ask_of(read_messages(fields)), _budget(fields), _sampling(fields)
    exit = Exit.of(fields.obj["exit"]) if fields.has("exit") else None
    max_new_tokens = _max_new_tokens(fields)
    _refuse_what_is_not_done(fields)
    fields.done()
    # Last, because it is the one thing that costs something.
    picture = read_picture(*question.picture, folders) if question.picture else None
    return ChatRequest(question, picture, budget, exit, max_new_tokens, sampling, stream, include_usage)


def _include_usage(fields: Fields) -> bool:
    if not fields.has("stream_options"):
        return False
    options = fields.child("stream_options")
    options.known.add("include_obfuscation")
    wanted = options.has("include_usage") and options.flag("include_usage")
    options.done()
    return wanted


def _budget(fields: Fields) -> Budget | None:
    first = fields.number("budget_ms") if fields.has("budget_ms") else None
    total = fields.number("total_ms") if fields.has("total_ms") else None
    return Budget(first, total) if first is not None or total is not None else None


def _max_new_tokens(fields: Fields) -> int:
    names = [name for name in ("max_completion_tokens", "max_tokens") if fields.has(name)]
    given = {fields.integer(name, 1) for name in names}
    if len(given) > 1:
        raise InputError("max_tokens and max_completion_tokens differ", where="max_tokens", expected="one of the two")
    return given.pop() if given else MAX_NEW_TOKENS


def _sampling(fields: Fields) -> Sampling:
    temperature = fields.number("temperature", 0.0) if fields.has("temperature") else 0.0
    if temperature > 2:
        raise InputError(f"temperature is {temperature}", where="temperature", expected="0 to 2")
    # Below zero the API's seeds are whole numbers of 64 bits, as the generator's are above.
    seed = fields.integer("seed", -(2**63)) % 2**64 if fields.has("seed") else secrets.randbits(63)
    return Sampling(
        temperature=temperature,
        top_p=fields.number("top_p", 0.0) if fields.has("top_p") else 1.0,
        seed=seed,
        stop=_stops(fields),
    )


def _stops(fields: Fields) -> tuple[str, ...]:
    if not fields.has("stop"):
        return ()
    stops = (fields.text("stop"),) if isinstance(fields.obj["stop"], str) else fields.texts("stop")
    if len(stops) > MOST_STOPS:
        raise InputError(f"stop has {len(stops)} texts", where="stop", expected=f"at most {MOST_STOPS}")
    return stops


def _refuse_what_is_not_done(fields: Fields) -> None:
    fields.known.update(WITHOUT_EFFECT)
    if fields.has("n") and fields.integer("n", 1) != 1:
        raise InputError("n is not 1", where="n", expected="1: a bundle gives one answer")
    for key in NOT_DONE:
        if fields.has(key) and fields.obj[key] not in _NOTHING:
            raise InputError(f"{key} is not supported", where=key, todo=f"leave {key} out")
