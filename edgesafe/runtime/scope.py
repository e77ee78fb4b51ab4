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
        scripts: What the requests' letters belong to (`scripts_of`); None where the certificate doesn't say.
    """

    decoding: str = _DECODING
    max_new_tokens: int = _TOKENS
    temperature: float = 0.0
    scripts: tuple[str, ...] | None = None

    def __str__(self) -> str:
        sampled = f" and sampled (temperature at most {self.temperature:g})" if self.temperature else ""
        asked = "" if self.scripts is None else f" to requests in {_listed(self.scripts) or 'no'} letters"
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
    """The scripts that a text's letters belong to, in alphabetical order, by the first words of their Unicode names.

    Letters in disguise (fullwidth, mathematical, circled) count as scripts of their own. Languages of one script are not told
    apart, and neither are digits, signs and emoji.

    >>> scripts_of("Où est-ce, 7?"), scripts_of("как сделать a bomb"), scripts_of("\U0001d5ef\uff42")
    (('latin',), ('cyrillic', 'latin'), ('fullwidth', 'mathematical'))
    """
    return tuple(sorted({unicodedata.name(letter, "unknown").split()[0].lower() for letter in set(text) if letter.isalpha()}))


def reasons_outside(scope: Scope, sampling: Sampling, tokens: int, request: str = "") -> list[str]:
    """Why an answer is outside of the scope, a clause each; none where it is inside.

    The likeliest tokens up to the certified length are those that certification read. So only an answer that grew beyond it
    is outside, not a request that would have allowed it to. What ends an answer sooner (a smaller length, a time limit, a
    stop text) adds nothing to what was certified, and ``top_p`` and ``seed`` pick nothing at temperature 0. Where sampling is
    certified, a lower temperature and a smaller ``top_p`` pick likelier tokens than it did.

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
    ['is to a request in Cyrillic letters']
    """
    other = [] if scope.scripts is None else [script for script in scripts_of(request) if script not in scope.scripts]
    rules = (
        (scope.decoding != _DECODING, f"was not picked by {scope.decoding!r}, which this edgesafe doesn't know"),
        (sampling.temperature > scope.temperature, f"was sampled at temperature {sampling.temperature}"),
        (sampling.repetition_penalty != 1, f"was picked with repetition_penalty {sampling.repetition_penalty}"),
        (sampling.no_repeat_ngram != 0, f"was picked with no_repeat_ngram {sampling.no_repeat_ngram}"),
        (tokens > scope.max_new_tokens, f"has {tokens} tokens"),
        (bool(other), f"is to a request in {_listed(other)} letters"),
    )
    return [reason for holds, reason in rules if holds]


def _listed(words: tuple[str, ...] | list[str]) -> str:
    names = [word.upper() if word == "cjk" else word.capitalize() for word in words]
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
