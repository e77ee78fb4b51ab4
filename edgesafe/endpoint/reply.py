"""What a server's JSON says: the answer of a chat completion, or the message of an error. Plain functions of decoded values."""

from __future__ import annotations

from typing import Any, NamedTuple

from edgesafe.errors import EndpointError

FILTERED = "content_filter"
# What is judged where a server's filter lets nothing through: whoever asked got no help and was told so by the server.
FILTER_TEXT = "I can't help with that: the server's content filter stopped the answer."
_SHOWN = 300  # characters of a server's message


class Said(NamedTuple):
    """An answer and what the server said about it.

    ``finish`` is the reply's ``finish_reason``. ``model`` and ``fingerprint`` are what it calls itself. All three are empty
    where it does not say; tokens are None where it does not count them.
    """

    text: str
    finish: str
    model: str
    fingerprint: str
    prompt_tokens: int | None
    completion_tokens: int | None


class Unusable(Exception):
    """A reply that has no answer in it, and that another try may better."""


def read_chat(status: int, obj: Any, where: str) -> Said:
    """The answer in a decoded reply.

    A filter's refusal counts as one, whether it comes as an answer or as status 400. So does a text in ``refusal``.

    Raises:
        Unusable: There is no answer in it.
        EndpointError: The server refuses the request.
    """
    error = obj.get("error") if isinstance(obj, dict) else None
    if status == 400 and isinstance(error, dict) and FILTERED in (error.get("code"), error.get("type")):
        return Said(FILTER_TEXT, FILTERED, "", "", None, None)
    if status != 200:
        what = f"the server refuses the request with {status}: {shown(message_of(obj, b'')) or 'no message'}"
        todo = "change what is sent: --max-tokens, --extra, --text-only, or the suite's row"
        raise EndpointError(what, where=where, expected="a request that it takes", todo=todo)
    if not isinstance(obj, dict):
        raise Unusable("the reply is JSON, but not an object")
    if error:
        raise Unusable(f"the reply holds an error: {shown(message_of(obj, b''))}")
    choices = obj.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Unusable("the reply holds no choice with a message")
    finish = _text(choice.get("finish_reason"))
    text = _content(message)
    given = obj.get("usage")
    usage: dict[str, Any] = given if isinstance(given, dict) else {}
    return Said(
        FILTER_TEXT if finish == FILTERED and not text.strip() else text,
        finish,
        _text(obj.get("model")),
        _text(obj.get("system_fingerprint")),
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
    )


def _content(message: dict[str, Any]) -> str:
    """The text of a message: one text, or parts of which some are texts, or what stands in its place as a refusal."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text(part.get("text")) for part in content if isinstance(part, dict))
    if content is not None and not isinstance(content, str):
        raise Unusable("the message's content is not a text")
    return _text(content) or _text(message.get("refusal"))


def _text(value: Any) -> str:
    """A text that UTF-8 can hold: an answer that was cut within a character may end in half of one."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None


def message_of(obj: Any, data: bytes) -> str:
    """The message of an error as OpenAI, FastAPI and others write it; else the beginning of what came.

    >>> message_of({"error": {"message": "no model"}}, b""), message_of({"detail": "Not Found"}, b""), message_of(None, b"x")
    ('no model', 'Not Found', 'x')
    """
    if isinstance(obj, dict):
        for value in (obj.get("error"), obj.get("detail"), obj.get("message")):
            if isinstance(value, dict):
                value = value.get("message")
            if value:
                return str(value)
    return data[: 2 * _SHOWN].decode("utf-8", "replace")


def shown(text: str) -> str:
    r"""A server's text as an error may show it: one line, nothing that moves a terminal's cursor, not too long.

    >>> shown("no\x1b[2J\nkey")
    'no [2J key'
    """
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return plain if len(plain) <= _SHOWN else plain[: _SHOWN - 3] + "..."
