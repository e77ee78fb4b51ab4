"""The manifest's ``chat`` table, and control texts: what a chat template writes between turns, which no prompt may hold.

A prompt that spells such a text speaks for the system or closes its own turn, so it is refused. There are four kinds:

- *tokens* of the tokenizer (`<|im_start|>`, special or not): refused wherever they stand.
- *marks* in brackets (`[/INST]`, `<<SYS>>`), tokens or not: refused in any case, also with spaces beside their signs.
- *labels* that end in a colon or the like (`ASSISTANT:`): refused anywhere as the template writes them or with any capital,
  also letter by letter (`A S S I S T A N T:`) and with spaces, asterisks, quotes or brackets before the colon; at the start of
  a line in any case. `my assistant: a robot` is ordinary English.
- *lines* (`### Response`) of at most three words: refused in any case where they are a line of their own, also in bold or with
  a colon, and anywhere as the template writes them where they are in capitals.

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
# Unicode's letters without a shape, and its categories without one: controls, formats, marks on a letter, what is unassigned.
_SHAPELESS = "\u115f\u1160"
_UNSEEN = ("Cc", "Cf", "Cn", "Mn", "Me")
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
        closed = _closed(plain)

        def marked(text: str) -> bool:
            return bool(_BRACKETED.fullmatch(text)) and _closed(_plain(text)) in closed

        spelled = [token for token in self.tokens if token and (token in prompt or token in plain or marked(token))]
        hidden = [token for token, number in self.tokens.items() if number in ids]
        texts = [text for text in self.texts if marked(text) or _pattern(text).search(plain)]
        return next(iter([*sorted(spelled), *sorted(hidden), *texts]), None)


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


def _plain(text: str) -> str:
    """The text with characters that mean the same made one (full-width ones), and without those that can't be seen."""
    text = re.sub(r"\r\n?|[\u2028\u2029\v\f\x1c-\x1e\x85]", "\n", unicodedata.normalize("NFKC", text))
    return "".join(c for c in text if c in "\n\t" or not (c in _SHAPELESS or unicodedata.category(c) in _UNSEEN))


def _closed(plain: str) -> str:
    """A plain text in lower case without the spaces beside signs: one spelling for all those of a mark."""
    return re.sub(r"\s+(?=[\W_])|(?<=[\W_])\s+", "", plain.lower())


@lru_cache(maxsize=1024)
def _pattern(text: str) -> re.Pattern[str]:
    """What finds one label or line in a plain prompt."""
    text = text.strip()
    if text[-1] in _ENDS and text[:-1].strip():
        return _label_pattern(text[:-1].strip(), text[-1])
    words = [re.escape(word) + (r"[ \t]+" if word[-1].isalnum() else r"[ \t]*") for word in text.split()[:-1]]
    line = "".join(words) + re.escape(text.split()[-1])
    anywhere = rf"(?<!\w){line}(?!\w)|" if text.isupper() and len(text) > 2 else ""
    return re.compile(rf"{anywhere}^[ \t*_>#]*(?i:{line})[ \t*_:#]*$", re.MULTILINE)


def _label_pattern(word: str, end: str) -> re.Pattern[str]:
    """A label in its spellings; only a script with spaces says where a word starts."""
    start = "(?<![A-Za-z0-9])" if word[0].isalnum() and word[0].isascii() else ""
    plain = re.escape(word)
    apart = r"[ \t]+".join(map(re.escape, word))
    capital = rf"(?!{re.escape(word.lower())})(?i:{plain})"
    anywhere = rf"{start}(?:{plain}|{capital}" + (rf"|(?i:{apart})" if len(word) > 2 else "") + ")"
    return re.compile(rf"(?:{anywhere}|^(?:[^\w\n]|[\d_])*(?i:{plain}))(?:[^\w.,;!?]|_)*?{re.escape(end)}", re.MULTILINE)


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
