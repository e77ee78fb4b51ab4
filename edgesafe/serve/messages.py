"""The messages of a chat as one question: what a bundle is asked, about which picture, and what of it was never certified.

A bundle knows one turn: a picture and a question. The text of system messages stands before the question, as if the user had
written it there. Earlier turns do too, as plain text (``Question: ...``, ``Answer: ...``), never in the chat template's own
words: a client that could write the model's turns could have it begin with "Sure, here is how". So control texts are refused
in every message, and an answer that follows earlier turns is not certified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from edgesafe.errors import InputError
from edgesafe.format.fields import Fields

SYSTEM, USER, ASSISTANT = ("system", "developer"), "user", "assistant"
ROLES = (*SYSTEM, USER, ASSISTANT)
# What clients send along when they repeat an answer.
_EMPTY = ("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content", "edgesafe")
_DETAILS = ("auto", "low", "high")
MOST_MESSAGES = 256
# What is certified beside how an answer's tokens are picked; see `edgesafe.runtime.scope`.
ONE_QUESTION = "one question about one picture"


@dataclass(frozen=True)
class Message:
    """One message: its text, and the URLs of its pictures with their places in the request."""

    role: str
    text: str
    pictures: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Question:
    """What the messages ask.

    Attributes:
        prompt: Plain text.
        picture: The URL of the picture and its place in the request, or None.
        outside: Why no verdict speaks for the answer, a clause each.
    """

    prompt: str
    picture: tuple[str, str] | None
    outside: tuple[str, ...]


def read_messages(request: Fields) -> tuple[Message, ...]:
    """The request's messages.

    Raises:
        InputError: One is not a message, or holds what a bundle can't be asked.
    """
    rows = request.children("messages")
    if not 1 <= len(rows) <= MOST_MESSAGES:
        expected = f"1 to {MOST_MESSAGES} messages"
        raise InputError(f"the request has {len(rows)} messages", where="messages", expected=expected)
    return tuple(_message(fields, f"messages[{i}]") for i, fields in enumerate(rows))


def _message(fields: Fields, where: str) -> Message:
    role = fields.choice("role", ROLES)
    for key in ("name", *_EMPTY):
        if fields.has(key) and key in ("audio", "function_call", "tool_calls") and fields.obj[key]:
            raise InputError(f"{key} is not supported", where=where, expected="messages of text and pictures")
    texts, pictures = [], []
    if fields.has("content") and isinstance(fields.obj["content"], list):
        for i, part in enumerate(fields.children("content")):
            text, url = _part(part)
            texts += [text] if text is not None else []
            pictures += [(url, f"{where}.content[{i}].image_url")] if url is not None else []
    elif role != ASSISTANT or fields.has("content"):
        texts = [fields.text("content")]
    fields.done()
    if pictures and role != USER:
        raise InputError(f"a message of the {role} holds a picture", where=where, expected="pictures in the user's messages")
    return Message(role, "\n".join(texts), tuple(pictures))


def _part(fields: Fields) -> tuple[str | None, str | None]:
    """A part's text or its picture's URL."""
    kind = fields.choice("type", ("text", "image_url"))
    text, url = None, None
    if kind == "text":
        text = fields.text("text")
    elif isinstance(fields.obj.get("image_url"), str):
        url = fields.text("image_url")
    else:
        image = fields.child("image_url")
        url = image.text("url")
        if image.has("detail"):  # a bundle sees every picture in its own size
            image.choice("detail", _DETAILS)
        image.done()
    fields.done()
    return text, url


def ask_of(messages: Sequence[Message]) -> Question:
    r"""The question that messages ask.

    Raises:
        InputError: The last message is not the user's, or a turn has more than one picture.

    >>> ask_of([Message("system", "Be brief."), Message("user", "What is it?")])
    Question(prompt='Be brief.\nWhat is it?', picture=None, outside=('is about no picture',))
    >>> talk = [Message("user", "What is it?", (("data:1", "a"),)), Message("assistant", "A pen."), Message("user", "Which?")]
    >>> print(ask_of(talk).prompt, ask_of(talk).picture, ask_of(talk).outside)
    Question: What is it?
    Answer: A pen.
    Question: Which? ('data:1', 'a') ('follows 2 earlier messages',)
    """
    said = [message for message in messages if message.role not in SYSTEM]
    if not said or said[-1].role != USER:
        expected = "a user's message: what an answer begins with can't be given"
        raise InputError("the last message is not the user's", where="messages", expected=expected)
    asked = list(takewhile(lambda message: message.role == USER, reversed(said)))[::-1]
    earlier = said[: len(said) - len(asked)]
    question = "\n".join(message.text for message in asked if message.text)
    if not question.strip():
        raise InputError("the last message has no text", where="messages", expected="a question about the picture")
    lines = [message.text for message in messages if message.role in SYSTEM]
    lines += [f"{'Question' if message.role == USER else 'Answer'}: {message.text}" for message in earlier]
    lines.append(f"Question: {question}" if earlier else question)
    picture = _picture(asked, earlier)
    outside = [f"follows {len(earlier)} earlier message{'s' if len(earlier) > 1 else ''}"] if earlier else []
    outside += ["is about no picture"] if picture is None else []
    return Question("\n".join(lines), picture, tuple(outside))


def _picture(asked: Sequence[Message], earlier: Sequence[Message]) -> tuple[str, str] | None:
    """The question's picture, or else the newest that was shown before."""
    shown = [picture for message in asked for picture in message.pictures]
    before = [message.pictures for message in earlier if message.pictures]
    if not shown and before:
        shown = list(before[-1])
    if len(shown) > 1:
        raise InputError(f"a turn has {len(shown)} pictures", where=shown[1][1], expected="one: a bundle sees one at a time")
    return shown[0] if shown else None
