"""Prompts to token ids and answers back to text, over the bundle's own ``tokenizer.json``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from edgesafe.errors import BundleError, InputError
from edgesafe.format.chat import ControlTexts, control_texts
from edgesafe.format.exits import Exit, prompt_at
from edgesafe.format.manifest import Manifest
from edgesafe.format.tiles import ALONE, Cut, prompt_runs
from edgesafe.runtime.sampling import ended

# What a decoder shows for bytes that aren't a whole character yet.
_HALF = "\ufffd"
# A token that is one byte, with which some tokenizers spell what they have no token for. A decoder reads a run of them as a
# whole: one wrong byte makes all of the run unreadable, also what was a character before it came.
_BYTE = re.compile("<0x[0-9A-F]{2}>")
# No tokenizer known spells more characters with one token; a text far beyond the context isn't worth tokenizing.
_LONGEST_TOKEN = 128


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a bundle.

    Raises:
        BundleError: The file is not a tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise BundleError(f"the tokenizer can't be read: {error}", where=str(path)) from error
    # Whatever lengths the training side set, a prompt is never cut or padded silently here.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode_prompt(
    tokenizer: Tokenizer, manifest: Manifest, prompt: str, cut: Cut = ALONE, exit: Exit | None = None
) -> list[int]:
    """The ids of the whole prompt, the image token repeated once for each image feature.

    Args:
        tokenizer: The bundle's tokenizer.
        manifest: Gives the chat text around the prompt, the image token and the context length.
        prompt: What the user wrote, without control texts.
        cut: How the picture is cut, where the bundle has tiles.
        exit: The exit that reads it; by default one that has all visual tokens.

    Returns:
        The ids, S of them, as many of which are ``manifest.image_token_id`` as the exit has features of the picture.

    Raises:
        InputError: The prompt is empty, not text, too long, or holds a control text (`edgesafe.format.chat`).
    """
    ids = unchecked_ids(tokenizer, manifest, prompt, cut, exit)
    check_fits(ids, manifest, cut)
    return ids


def unchecked_ids(tokenizer: Tokenizer, manifest: Manifest, prompt: str, cut: Cut, exit: Exit | None) -> list[int]:
    """As `encode_prompt`, but however long they are."""
    _check_prompt(tokenizer, manifest, prompt)
    shown, runs = prompt_runs(manifest.tiles, cut, manifest.image_token, manifest.image_tokens)
    text = manifest.chat.prefix.replace(manifest.image_token, shown) + prompt + manifest.chat.suffix
    ids = tokenizer.encode(text, add_special_tokens=manifest.chat.add_special_tokens).ids
    ids = _repeated(ids, manifest, runs)
    return ids_at(ids, manifest, exit) if exit is not None else ids


def fits(ids: Sequence[int], manifest: Manifest) -> bool:
    """Whether a prompt leaves the context room for an answer."""
    return len(ids) < manifest.text.context_length


def check_fits(ids: Sequence[int], manifest: Manifest, cut: Cut, more: str = "") -> None:
    """Refuse a prompt that leaves no room for an answer; `more`: what else the caller may do.

    Raises:
        InputError: It doesn't.
    """
    limit = manifest.text.context_length
    if not fits(ids, manifest):
        raise InputError(
            f"the prompt takes {len(ids)} tokens with its picture",
            expected=f"fewer than the context's {limit} tokens, to leave room for an answer",
            todo=f"shorten it by {len(ids) - limit + 1} tokens or more"
            + (", or use a smaller picture" if cut.rows else "")
            + more,
        )


def ids_at(ids: Sequence[int], manifest: Manifest, exit: Exit) -> list[int]:
    """A whole prompt's ids as an exit reads them: with as many image tokens as it has visual tokens."""
    return prompt_at(ids, exit, manifest.image_token_id, manifest.image_tokens)


def _repeated(ids: list[int], manifest: Manifest, runs: list[int]) -> list[int]:
    """The ids with each image token as often as its run says."""
    image = manifest.image_token_id
    if ids.count(image) != len(runs):
        raise BundleError(
            f"the chat text holds the image token {ids.count(image)} times",
            where=manifest.tokenizer,
            expected=f"{manifest.image_token!r} as token {image}, " + ("once" if len(runs) == 1 else f"{len(runs)} times"),
            todo="export the bundle again",
        )
    left = iter(runs)
    return [i for token in ids for i in [token] * (next(left) if token == image else 1)]


def _check_prompt(tokenizer: Tokenizer, manifest: Manifest, prompt: str) -> None:
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError("the prompt is empty", expected="a question about the picture", todo="write one")
    most = _LONGEST_TOKEN * manifest.text.context_length
    if len(prompt) > most:
        raise InputError(f"the prompt has {len(prompt)} characters", expected=f"at most {most}", todo="shorten it")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("the prompt is not valid Unicode text", expected="UTF-8 text") from error
    # What stands for characters that the tokenizer doesn't know is written by no template. Unigram models don't tell its name.
    unknown = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "<unk>")
    ids = set(tokenizer.encode(prompt, add_special_tokens=False).ids) - {unknown}
    found = _control(tokenizer, manifest).found_in(prompt, ids)
    if found:
        raise InputError(
            f"the prompt holds the control text {found!r}",
            expected="plain text: what the chat template writes between turns would let the prompt speak for the system",
            todo="remove or reword that text",
        )


def _control(tokenizer: Tokenizer, manifest: Manifest) -> ControlTexts:
    """What a prompt must not hold. A bundle whose manifest names none is protected by its chat text and its tokenizer."""
    added = tokenizer.get_added_tokens_decoder()
    numbers = {token.content: number for number, token in added.items()}
    numbers[manifest.image_token] = manifest.image_token_id
    special = {manifest.image_token, *(token.content for token in added.values() if token.special)}
    return control_texts((manifest.chat.prefix, manifest.chat.suffix), manifest.chat.control, numbers, special)


class TextStream:
    """Answer ids to text, piece by piece, never splitting a character that several tokens spell.

    The pieces joined are exactly what ``text`` is at the end: the decoded ids without special tokens and
    without leading white space, up to the first of the stop texts; ``ended`` says that one of them came.
    A run of byte tokens is held back until another token ends it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._in_bytes = False
        self._stop = stop
        self.text = ""
        self.ended = False

    def push(self, token_id: int) -> str:
        """The text that this id completes, often a word, sometimes nothing."""
        self._ids.append(token_id)
        token = self._tokenizer.id_to_token(token_id)
        if token is not None and token_id not in self._special:  # others are left out of the text and end no run
            self._in_bytes = bool(_BYTE.fullmatch(token))
        whole = self._decoded()
        # Half a character decodes to a mark that the next byte replaces: hold it back until it is whole.
        if whole.endswith(_HALF):
            return ""
        shown, self.ended = ended(whole, self._stop)
        return "" if self._in_bytes and not self.ended else self._advance(whole[:shown])

    def finish(self) -> str:
        """What was still held back."""
        whole = self._decoded()
        return self._advance(whole[: ended(whole, self._stop)[0]] if self.ended else whole)

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).lstrip()

    def _advance(self, whole: str) -> str:
        if not whole.startswith(self.text):
            return ""
        piece = whole[len(self.text) :]
        self.text = whole
        return piece
