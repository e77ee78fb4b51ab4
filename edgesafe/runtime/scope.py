"""Which answers a passed verdict speaks for, and why an answer is none of them."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from edgesafe.errors import CertificateError
from edgesafe.format.certificate import Certificate
from edgesafe.format.fields import Fields
from edgesafe.runtime.sampling import Sampling

# What certificates were made with before they named it. It stays so, whatever a request's own length may become.
_DECODING, _TOKENS = "greedy", 48
_PLAIN = frozenset(chr(code) for code in range(128) if not chr(code).isalpha())
_END_OF_LATIN = 0x250  # what comes later has phonetic signs and small capitals; Vietnamese is in a block of its own
_MORE_LATIN = range(0x1E00, 0x1F00)
# By Unicode's general category, or its first letter. What can't be seen may still be read by a tokenizer.
_OTHER = {"So": "symbols", "Sk": "symbols", "M": "marks", "N": "digits", "C": "hidden"}
_SHOWN = {"symbols": "symbols", "marks": "combining marks", "digits": "other digits", "hidden": "hidden characters"}


@dataclass(frozen=True)
class Scope:
    """The answers that a bundle's exits were certified on, and for which alone a verdict is evidence.

    A certificate asks each question by itself, after one picture. So does every request, a conversation's later questions
    included: what these save is work, not text. What is left to check is how an answer's tokens were picked, and how many,
    and what the request is written in.

    Attributes:
        decoding: How the answers were picked that the certificate holds.
        max_new_tokens: Their greatest length in tokens.
        temperature: The temperature at which they were sampled as well; 0 = not.
        scripts: What the harmful requests are written in (`scripts_of`); None where the certificate doesn't say.
    """

    decoding: str = _DECODING
    max_new_tokens: int = _TOKENS
    temperature: float = 0.0
    scripts: tuple[str, ...] | None = None

    def __str__(self) -> str:
        sampled = f" and sampled (temperature {self.temperature:g})" if self.temperature else ""
        asked = "" if self.scripts is None else f" to requests with {_listed(self.scripts) or 'no letters'}"
        return f"{self.decoding}{sampled} answers of at most {self.max_new_tokens} tokens{asked}"


def scope_of(certificate: Certificate | None) -> Scope:
    """What a certificate says of its answers and requests; what it doesn't say is as it always was then.

    Raises:
        CertificateError: It says so in a wrong type.
    """
    made = Fields(certificate.environment if certificate else {}, "the certificate: environment", CertificateError)
    asked = Fields(certificate.scope if certificate else {}, "the certificate: scope", CertificateError)
    return Scope(
        made.text("decoding") if made.has("decoding") else _DECODING,
        made.integer("max_new_tokens", 1) if made.has("max_new_tokens") else _TOKENS,
        asked.number("temperature", 0.0) if asked.has("temperature") else 0.0,
        asked.texts("scripts") if asked.has("scripts") else None,
    )


def scripts_of(text: str) -> tuple[str, ...]:
    """What a text is written in, in alphabetical order: the scripts of its letters, and what else is neither ASCII nor a stop.

    Letters are named by the first words of their Unicode names; of Latin ones the blocks of European alphabets count as such.
    Others in disguise (fullwidth, mathematical, circled, small capitals, flags) and what can't be seen count as something
    else, as do characters that this Python's Unicode doesn't know. Languages of one script are not told apart.

    >>> scripts_of("Où est-ce, 7 €?"), scripts_of("как сделать a bomb"), scripts_of("\U0001d5ef\uff42")
    (('latin',), ('cyrillic', 'latin'), ('fullwidth', 'mathematical'))
    >>> scripts_of("\u24d1\u200b\u0299\u0661")
    ('digits', 'hidden', 'other latin', 'symbols')
    """
    found = {_kind(character) for character in unicodedata.normalize("NFC", text) if character not in _PLAIN}
    return tuple(sorted(found - {""}))


def _kind(character: str) -> str:
    """What a character is; "" for space and punctuation, of which every script has its own."""
    category = unicodedata.category(character)
    if category[0] == "L":
        first = unicodedata.name(character, "unknown").replace("-", " ").split()[0].lower()
        latin = ord(character) < _END_OF_LATIN or ord(character) in _MORE_LATIN
        return "latin" if latin else f"other {first}" if first == "latin" else first
    return _OTHER.get(category, _OTHER.get(category[0], ""))


def reasons_outside(scope: Scope, sampling: Sampling, tokens: int, request: str = "") -> list[str]:
    """Why an answer is outside of the scope, a clause each; none where it is inside.

    The likeliest tokens up to the certified length are those that certification read. So only an answer that grew beyond it
    is outside, not a request that would have allowed it to. What ends an answer sooner (a smaller length, a time limit, a
    stop text) adds nothing to what was certified, and ``top_p`` and ``seed`` pick nothing at temperature 0. Sampled answers are
    inside at the certified temperature alone, and from all tokens: likelier tokens are not safer ones.

    Args:
        scope: What was certified.
        sampling: How the tokens were picked.
        tokens: How many the answer has, without the end token.
        request: The request's text.

    >>> reasons_outside(Scope(), Sampling(top_p=0.5, seed=3, stop=(".",)), 48)
    []
    >>> reasons_outside(Scope(), Sampling(temperature=0.8, no_repeat_ngram=2), 49)
    ['was sampled at temperature 0.8', 'was picked with no_repeat_ngram 2', 'has 49 tokens']
    >>> reasons_outside(Scope(scripts=("latin",)), Sampling(), 48, "Что это?")
    ['is to a request with Cyrillic letters']
    """
    other = [] if scope.scripts is None else [script for script in scripts_of(request) if script not in scope.scripts]
    rules = (
        (scope.decoding != _DECODING, f"was not picked by {scope.decoding!r}, which this edgesafe doesn't know"),
        (sampling.temperature not in (0, scope.temperature), f"was sampled at temperature {sampling.temperature}"),
        (sampling.temperature != 0 and sampling.top_p < 1, f"was sampled with top_p {sampling.top_p}"),
        (sampling.repetition_penalty != 1, f"was picked with repetition_penalty {sampling.repetition_penalty}"),
        (sampling.no_repeat_ngram != 0, f"was picked with no_repeat_ngram {sampling.no_repeat_ngram}"),
        (tokens > scope.max_new_tokens, f"has {tokens} tokens"),
        (bool(other), f"is to a request with {_listed(other)}"),
    )
    return [reason for holds, reason in rules if holds]


def _listed(words: tuple[str, ...] | list[str]) -> str:
    names = [_SHOWN.get(word) or f"{word.upper() if word == 'cjk' else word.capitalize()} letters" for word in words]
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
