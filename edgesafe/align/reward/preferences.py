"""Preference pairs for a reward model: JSON lines, read strictly, split by prompt.

A line is {"prompt", "chosen", "rejected"} or HH-RLHF's own shape, whole dialogues in "chosen" and "rejected" alone.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesafe.errors import InputError
from edgesafe.format.fields import Fields
from edgesafe.progress import bar

# Who says it ("user" or "assistant", as chat templates name them) and what.
Turns = tuple[tuple[str, str], ...]
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}
_MARK = {"user": _HUMAN, "assistant": _ASSISTANT}
_NAMED = 8  # bad lines that a message lists


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt as token ids. `prompt` is the user's first turn; the split goes by it."""

    prompt: str
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def asked_and_answered(prompt: str, answer: str) -> Turns:
    """One question and its answer."""
    return ("user", prompt), ("assistant", answer)


def render(tokenizer: Any, turns: Turns) -> str:
    r"""The text that a reward model reads: the tokenizer's chat template where it has one, else HH-RLHF's format.

    >>> from types import SimpleNamespace
    >>> render(SimpleNamespace(chat_template=None), asked_and_answered("What is it?", "A pen."))
    '\n\nHuman: What is it?\n\nAssistant: A pen.'
    """
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template([{"role": r, "content": text} for r, text in turns], tokenize=False))
    return "".join(f"{_MARK[role]} {text}" for role, text in turns)


def parse_dialogue(text: str) -> Turns | None:
    r"""The turns of a dialogue in HH-RLHF's format; None where it has none or does not end with the assistant.

    >>> parse_dialogue("\n\nHuman: What is it?\n\nAssistant: A pen.")
    (('user', 'What is it?'), ('assistant', 'A pen.'))
    >>> parse_dialogue("A pen.") is None
    True
    """
    before, *parts = _SPEAKER.split(text)
    turns = tuple((_ROLE[who], turn.strip()) for who, turn in zip(parts[::2], parts[1::2], strict=True))
    return turns if turns and not before.strip() and turns[-1][0] == "assistant" else None


def in_validation(prompt: str, share: float) -> bool:
    """Whether a prompt's pairs validate: by its hash alone, so all of them fall on one side, in every file and run.

    >>> [in_validation(prompt, 0.5) for prompt in ("a", "b", "c")]
    [False, True, True]
    """
    return int(hashlib.sha256(prompt.strip().encode()).hexdigest()[:13], 16) / 16**13 < share


def read_pairs(
    path: Path, encode: Callable[[Turns], list[int]], max_length: int, *, skip_bad: bool = False
) -> tuple[list[Pair], int]:
    """Read a file of pairs, plain or gzipped.

    Args:
        path: JSON lines.
        encode: token ids of a dialogue.
        max_length: most tokens of a dialogue; it is never cut.
        skip_bad: leave out what can't be used instead of refusing it.

    Returns:
        The pairs in file order, and how many lines were left out.

    Raises:
        InputError: no such file, no pair in it, or a line that can't be used; it names the first and counts the others.
    """
    pairs: list[Pair] = []
    bad: list[tuple[int, InputError]] = []
    for number, line in enumerate(bar(_lines(path), label="read pairs"), start=1):
        try:
            pairs.append(_read_pair(line, f"{path}:{number}", encode, max_length))
        except InputError as error:
            bad.append((number, error))
    if bad and not skip_bad:
        raise _first_of(bad)
    if not pairs:
        raise InputError("the file has no pairs", where=str(path), expected='lines {"prompt", "chosen", "rejected"}')
    return pairs, len(bad)


def _lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"the pairs can't be read: {error}", where=str(path), expected="JSON lines in UTF-8") from error
    # Not splitlines: JSON leaves U+2028 and the like as they are inside a text.
    return text.removesuffix("\n").split("\n") if text.strip() else []


def _read_pair(line: str, where: str, encode: Callable[[Turns], list[int]], max_length: int) -> Pair:
    try:
        fields = Fields(json.loads(line), where, InputError)
    except (ValueError, RecursionError):
        raise InputError("the line is not JSON", where=where, expected="one pair as a JSON object") from None
    answers = {key: fields.text(key) for key in ("chosen", "rejected")}
    prompt = fields.text("prompt") if fields.has("prompt") else None
    turns = {key: _turns(prompt, answer, f"{where}: {key}") for key, answer in answers.items()}
    for key, dialogue in turns.items():
        if not dialogue[-1][1].strip():
            raise InputError("the answer is empty", where=f"{where}: {key}", expected="an answer", todo="remove the line")
    ids = {key: tuple(encode(dialogue)) for key, dialogue in turns.items()}
    if turns["chosen"] == turns["rejected"] or ids["chosen"] == ids["rejected"]:
        raise InputError(
            "chosen and rejected are the same", where=where, expected="two answers that differ", todo="remove the line"
        )
    for key, tokens in ids.items():
        if len(tokens) > max_length:
            raise InputError(
                f"{len(tokens)} tokens are too long",
                where=f"{where}: {key}",
                expected=f"at most {max_length}",
                todo="raise --max-length or remove the line",
            )
    first = next((text for role, text in turns["chosen"] if role == "user"), "")
    return Pair(first, ids["chosen"], ids["rejected"])


def _turns(prompt: str | None, answer: str, where: str) -> Turns:
    """The dialogue that a line means by its prompt and one of its answers."""
    if prompt is not None and _SPEAKER.search(prompt):
        opened = prompt.rstrip() if prompt.rstrip().endswith(_ASSISTANT) else prompt + _ASSISTANT
        turns = parse_dialogue(f"{opened} {answer}")
    elif prompt is not None:
        turns = asked_and_answered(prompt, answer)
    elif not answer.strip():
        turns = asked_and_answered("", "")
    else:
        turns = parse_dialogue(answer)
    if turns is None:
        raise InputError(
            "the line has no prompt, and its text is not a dialogue",
            where=where,
            expected='a key "prompt", or whole dialogues "\\n\\nHuman: ...\\n\\nAssistant: ..."',
            todo="add the prompt",
        )
    return turns


def _first_of(bad: list[tuple[int, InputError]]) -> InputError:
    """The first bad line's error, with the others counted."""
    (_, error), others = bad[0], [number for number, _ in bad[1:]]
    if not others:
        return error
    more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
    also = f"lines {', '.join(map(str, others[:_NAMED]))}{more} can't be used either; --skip-bad leaves such lines out"
    todo = f"{error.todo}; {also}" if error.todo else also
    return InputError(error.what, where=error.where, expected=error.expected, todo=todo)
