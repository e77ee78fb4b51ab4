"""A checkpoint's chat template: the text around a prompt, whether the tokenizer adds its own tokens, and the control texts.

Shared by align and export (tier 2), so that what is trained, evaluated and shipped is one prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from edgesafe.errors import ExportError, InputError
from edgesafe.format.chat import ChatSpec, ControlTexts, control_texts, separators

_WHERE = "chat_template"
_FILES = "use the processor files that belong to this checkpoint"
# Two unlike texts: a template that edits, repeats or looks at what the user says shows it in one of them.
_MARKS = ("@@first mark@@", "Other  Mark\n<3 {{x}}")
# Contents of other turns. Letters and digits alone, so that they aren't separators themselves.
_TURNS = ("SystemContent0", "UserContent1", "AssistantContent2", "UserContent3")
# No part of them is alike: day, month, year, week day, hour. One is to come, for templates that ask whether a day is over.
_DATES = ("1987-06-05T03:04:05", "2011-12-13T14:15:16", "2199-10-21T22:23:24")


@dataclass(frozen=True)
class Chat:
    """What stands around a prompt, and what must not stand in it.

    Attributes:
        prefix: With the image token once.
        suffix: What follows the prompt, up to where the answer starts.
        add_special_tokens: Whether the tokenizer adds its own (BOS, EOS) to the whole text.
        control: Control texts of the template, those in `prefix` and `suffix` among them, and all special tokens.
        named: Those of them that `prefix`, `suffix` and the tokenizer do not show.
    """

    prefix: str
    suffix: str
    add_special_tokens: bool
    control: ControlTexts
    named: tuple[str, ...]

    @property
    def spec(self) -> ChatSpec:
        """The manifest's `chat` table."""
        return ChatSpec(self.prefix, self.suffix, self.add_special_tokens, self.named)


def read_chat(processor: Any) -> Chat:
    """A processor's chat template, rendered.

    Raises:
        InputError: It can't be rendered, or holds today's date.
        ExportError: It does not insert the user's text once and verbatim behind the picture.
    """
    prefix, suffix = _around(processor)
    tokenizer = processor.tokenizer
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | {processor.image_token}
    found = {*separators(_between(processor), added), *_in_source(processor, added)}
    named = found - special - set(separators((prefix, suffix), added))
    control = control_texts((prefix, suffix), sorted(named), added, special)
    return Chat(prefix, suffix, adds_special_tokens(tokenizer, prefix), control, tuple(sorted(named)))


def adds_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer's own special tokens go around a rendered chat text: not where the template wrote its BOS.

    Source: transformers 5.23 `ProcessorMixin.apply_chat_template(tokenize=True)`.
    """
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)


def check_prompt(chat: Chat, tokenizer: Any, prompt: str) -> None:
    """Refuse what the runtime refuses.

    Raises:
        InputError: An empty prompt, or one that holds a control text.
    """
    if not prompt.strip():
        raise InputError("the request is empty", where="prompt", expected="a question", todo="write one")
    ids = set(tokenizer(prompt, add_special_tokens=False)["input_ids"]) - {tokenizer.unk_token_id}
    found = chat.control.found_in(prompt, ids)
    if found:
        raise InputError(
            f"the request holds the control text {found!r}",
            where=repr(prompt),
            expected="plain text: what the chat template writes between turns would let the request speak for the system",
            todo="remove or reword that text",
        )


def prompt_ids(processor: Any, chat: Chat, prompt: str, picture: str) -> list[int]:
    """Token ids of a request, up to where the answer starts.

    Args:
        processor: The checkpoint's.
        chat: Its template, rendered.
        prompt: What the user says.
        picture: What stands in the image token's place.

    Raises:
        InputError: As `check_prompt`.
    """
    check_prompt(chat, processor.tokenizer, prompt)
    text = chat.prefix.replace(processor.image_token, picture) + prompt + chat.suffix
    return list(processor.tokenizer(text, add_special_tokens=chat.add_special_tokens)["input_ids"])


def _turn(role: str, text: str, *, picture: bool = False) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image"}] * picture + [{"type": "text", "text": text}]}


def _around(processor: Any) -> tuple[str, str]:
    """The text before and behind the user's own."""
    parts = []
    for mark in _MARKS:
        today = datetime.now().isoformat()
        first, *others = (_render(processor, [_turn("user", mark, picture=True)], date) for date in (*_DATES, today))
        if any(other != first for other in others):
            raise InputError(
                "the chat template depends on today's date, which would be frozen on the day of the export",
                where=_WHERE,
                expected="a text that is the same every day",
                todo="replace strftime_now(...) in the template by a date in quotes, such as that of the training",
            )
        parts.append(first.split(mark))
    if any(len(p) != 2 for p in parts) or parts[0] != parts[1]:
        raise ExportError(
            "the chat template changes the user's text",
            where=_WHERE,
            expected="text inserted once, as it is",
            todo="use a template that does not edit what the user says",
        )
    prefix, suffix = parts[0]
    if prefix.count(processor.image_token) != 1 or processor.image_token in suffix:
        raise ExportError(
            "the chat template does not put the picture before the text",
            where=_WHERE,
            expected=f"{processor.image_token!r} once, before the user's text",
            todo="use a template that puts the picture first",
        )
    return prefix, suffix


def _render(processor: Any, turns: Sequence[dict[str, Any]], date: str = _DATES[0]) -> str:
    """A conversation as the template writes it on a day; what follows is the assistant's."""
    try:
        with _clock_at(date):
            return str(processor.apply_chat_template(list(turns), add_generation_prompt=True))
    except Exception as error:  # jinja and transformers raise a dozen kinds here
        raise InputError(
            f"the chat template can't be rendered: {error}",
            where=_WHERE,
            expected="a template that takes one picture and one text",
            todo=_FILES,
        ) from error


@contextmanager
def _clock_at(date: str) -> Iterator[None]:
    """A day on which templates are rendered: transformers' `strftime_now` reads its module's `datetime`."""
    from transformers.utils import chat_template_utils

    module: Any = chat_template_utils  # its datetime is not among what it exports
    real = module.datetime
    module.datetime = SimpleNamespace(now=lambda: datetime.fromisoformat(date))
    try:
        yield
    finally:
        module.datetime = real


def _between(processor: Any) -> list[str]:
    """What the template writes before, between and behind the contents of every conversation that it takes."""
    system, user, assistant, again = _TURNS
    asked = [_turn("user", user, picture=True), _turn("assistant", assistant), _turn("user", again)]
    plain = [asked[0], {"role": "assistant", "content": assistant}, asked[2]]
    systems: list[dict[str, Any]] = [_turn("system", system), {"role": "system", "content": system}]
    found: list[str] = []
    for turns in (asked, plain, *([one, asked[0]] for one in systems)):
        try:
            text = _render(processor, turns)
        except InputError:
            continue  # many templates have no system role, or want the contents as a text
        if all(content in text for turn in turns for content in _TURNS if content in str(turn)):
            found += re.split("|".join(_TURNS), text)
    return found


def _in_source(processor: Any, added: Iterable[str]) -> list[str]:
    """Added tokens that the template can write in a branch that was not rendered, such as those of tools."""
    template = processor.chat_template or processor.tokenizer.chat_template or ""
    source = template if isinstance(template, str) else "\n".join(map(str, template.values()))
    return [token for token in added if token in source and not token.strip().isalnum() and token.strip()]
