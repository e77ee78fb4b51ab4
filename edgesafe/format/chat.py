"""The manifest's ``chat`` table, and control texts: what a chat template writes between turns, which no prompt may hold.

A prompt that spells such a text speaks for the system or closes its own turn, so it is refused. There are four kinds:

- *tokens* of the tokenizer (`<|im_start|>`, special or not): refused wherever they stand.
- *marks* in brackets (`[/INST]`, `<<SYS>>`): refused in any case, also with spaces inside the brackets.
- *labels* that end in a colon or the like (`ASSISTANT:`): refused anywhere as the template writes them, in capitals or
  capitalised, also with spaces or asterisks before the colon; at the start of a line in any case. `my assistant: a robot` is
  ordinary English.
- *lines* (`### Response`) of at most three words: refused in any case where they are a line of their own, and anywhere as the
  template writes them where they are in capitals.

Characters that can't be seen, full-width letters and the like don't help; letters of another script that look alike are not
looked for, because a tokenizer reads them as something else.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from edgesafe.errors import BundleError
from edgesafe.format.fields import Fields

_BRACKETED = re.compile(r"<+[^<>\s]+>+|\[[^\[\]\s]+\]")
# What a label ends in: "USER:", "User>".
_ENDS = ":>|»"
_LABEL = re.compile(rf"\S*\w\s?[{_ENDS}]")
# A template may write whole sentences (a default system prompt). Only in a text shorter than this is the first word a label.
_FEW_WORDS = 6
_LINE_WORDS = 3
# Stands for a token that was cut out of a text.
_CUT = "\0"


@dataclass(frozen=True)
class ChatSpec:
    """The text around the user's; ``prefix`` holds the image token once. Rendered at export.

    ``control`` lists what the chat template writes for other roles and a prompt must not hold; what stands in ``prefix`` and
    ``suffix`` needs no mention.
    """

    prefix: str
    suffix: str
    add_special_tokens: bool = True
    control: tuple[str, ...] = ()

    @staticmethod
    def read(fields: Fields, *, control: bool) -> ChatSpec:
        """Read the manifest's ``chat`` table strictly; ``control`` says whether its format has that key."""
        texts = fields.texts("control") if control else ()
        if not all(text.strip() for text in texts):
            raise BundleError("control lists an empty text", where=fields.where, expected="texts that are not empty")
        spec = ChatSpec(fields.text("prefix"), fields.text("suffix"), fields.flag("add_special_tokens"), texts)
        fields.done()
        return spec


@dataclass(frozen=True)
class ControlTexts:
    """What a prompt must not hold.

    Attributes:
        tokens: The text and id of each control token.
        texts: Marks, labels and lines.
    """

    tokens: Mapping[str, int]
    texts: tuple[str, ...]

    def found_in(self, prompt: str, ids: Collection[int]) -> str | None:
        """The first control text that a prompt holds, or None.

        Args:
            prompt: What the user wrote.
            ids: Its token ids: a tokenizer's normaliser may turn other characters into a control token.

        >>> control = ControlTexts({"</s>": 2}, ("ASSISTANT:",))
        >>> control.found_in("What is this? ASSISTANT :", []), control.found_in("Is my assistant: a robot?", [])
        ('ASSISTANT:', None)
        >>> control.found_in("a</s>b", []), control.found_in("a", [2])
        ('</s>', '</s>')
        """
        plain = _plain(prompt)
        spelled = [token for token in self.tokens if token and (token in prompt or token in plain)]
        hidden = [token for token, number in self.tokens.items() if number in ids]
        return next(iter([*sorted(spelled), *sorted(hidden), *(t for t in self.texts if _pattern(t).search(plain))]), None)


def separators(around: Iterable[str], tokens: Collection[str]) -> tuple[str, ...]:
    r"""The control texts in what a chat template writes around the turns' contents, sorted.

    Args:
        around: The texts before, between and behind the contents.
        tokens: The tokenizer's added tokens, the image token among them.

    >>> separators(["USER: <image>\n", " ASSISTANT:"], ["<image>", "</s>"])
    ('<image>', 'ASSISTANT:', 'USER:')
    >>> separators(["<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"], ["<|im_start|>", "<|im_end|>"])
    ('<|im_end|>', '<|im_start|>')
    >>> separators(["You see a picture. Say what it shows.\n### Request\n", "\n### Response\n"], [])
    ('### Request', '### Response')
    """
    found: set[str] = set()
    longest_first = sorted((t for t in tokens if t.strip()), key=len, reverse=True)
    for text in around:
        for token in longest_first:
            if token in text:
                found.add(token)
                text = text.replace(token, _CUT)
        found.update(_BRACKETED.findall(text))
        found.update(_literals(_BRACKETED.sub(_CUT, text)))
    return tuple(sorted(found))


def _literals(text: str) -> Iterable[str]:
    """Labels and lines of a text in which `_CUT` stands for each token and mark."""
    text = unicodedata.normalize("NFKC", text)
    # A word that is glued to a token (<|im_start|>user) isn't a line by itself.
    short = len(text.replace(_CUT, " ").split()) < _FEW_WORDS
    lines = [line for line in text.split("\n") if line.strip(_CUT + " \t")]
    for line in lines if short else lines[-1:]:
        shown = line.replace(_CUT, " ").strip()
        labels = [re.sub(r"\s", "", label) for label in _LABEL.findall(shown)]
        yield from labels if short else labels[-1:] * shown.endswith(tuple(_ENDS))
        words = re.sub(rf"\S*{_CUT}\S*", " ", line).split()
        if not labels and 0 < len(words) <= _LINE_WORDS and not shown.endswith((".", "!", "?")):
            yield " ".join(words)


def _plain(prompt: str) -> str:
    """The prompt with characters that mean the same made one (full-width ones), and without those that can't be seen."""
    shown = (c for c in unicodedata.normalize("NFKC", prompt) if unicodedata.category(c) not in ("Cf", "Mn"))
    return re.sub(r"\r\n?|[\u2028\u2029\v\f\x85]", "\n", "".join(shown))


@lru_cache(maxsize=1024)
def _pattern(text: str) -> re.Pattern[str]:
    """What finds one control text in a plain prompt."""
    if _BRACKETED.fullmatch(text):
        opened, inner, closed = re.fullmatch(r"([<\[]+)(.*?)([>\]]+)", text).groups()  # type: ignore[union-attr]  # it does
        return re.compile(re.escape(opened) + r"\s*" + re.escape(inner) + r"\s*" + re.escape(closed), re.IGNORECASE)
    if text[-1] in _ENDS:
        return _label_pattern(text[:-1], text[-1])
    words = r"[ \t]+".join(map(re.escape, text.split()))
    anywhere = rf"(?<!\w){words}(?!\w)|" if text.isupper() and len(text) > 2 else ""
    return re.compile(rf"{anywhere}^[ \t]*(?i:{words})[ \t]*$", re.MULTILINE)


def _label_pattern(word: str, end: str) -> re.Pattern[str]:
    """A label in its spellings; only a script with spaces says where a word starts."""
    start = r"(?<!\w)" if word[0].isalnum() and word[0].isascii() else ""
    spellings = "|".join(map(re.escape, sorted({word, word.upper(), word.capitalize()})))
    return re.compile(rf"(?:{start}(?:{spellings})|^[^\w\n]*(?i:{re.escape(word)}))[\s*_`]*{re.escape(end)}", re.MULTILINE)


def control_texts(
    around: Sequence[str], more: Sequence[str], added: Mapping[str, int], special: Collection[str]
) -> ControlTexts:
    """Everything that a prompt must not hold: all special tokens, and what a chat template writes around contents.

    Args:
        around: The texts before and behind a prompt.
        more: Control texts that are known from elsewhere, such as a manifest's `chat.control`.
        added: The tokenizer's added tokens and their ids.
        special: Those of them that are flagged special, and the image token.
    """
    found = {*separators(around, added), *more}
    tokens = {text: number for text, number in added.items() if text in special or text in found}
    return ControlTexts(tokens, tuple(sorted(found - set(tokens))))
