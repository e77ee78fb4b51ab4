"""Which answers a passed verdict speaks for, and why an answer is none of them."""

from __future__ import annotations

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
    included: what these save is work, not text. What is left to check is how an answer's tokens were picked, and how many.
    """

    decoding: str = _DECODING
    max_new_tokens: int = _TOKENS

    def __str__(self) -> str:
        return f"{self.decoding} answers of at most {self.max_new_tokens} tokens"


def scope_of(certificate: Certificate | None) -> Scope:
    """What a certificate's ``environment`` says of its answers; what it doesn't say is as it always was then.

    Raises:
        CertificateError: It says so in a wrong type.
    """
    fields = Fields(certificate.environment if certificate else {}, "the certificate: environment", CertificateError)
    return Scope(
        fields.text("decoding") if fields.has("decoding") else _DECODING,
        fields.integer("max_new_tokens", 1) if fields.has("max_new_tokens") else _TOKENS,
    )


def reasons_outside(scope: Scope, sampling: Sampling, tokens: int) -> list[str]:
    """Why an answer is outside of the scope, a clause each; none where it is inside.

    The likeliest tokens up to the certified length are those that certification read. So only an answer that grew beyond it
    is outside, not a request that would have allowed it to. What ends an answer sooner (a smaller length, a time limit, a
    stop text) adds nothing to what was certified, and ``top_p`` and ``seed`` pick nothing at temperature 0.

    Args:
        scope: What was certified.
        sampling: How the tokens were picked.
        tokens: How many the answer has, without the end token.

    >>> reasons_outside(Scope(), Sampling(top_p=0.5, seed=3, stop=(".",)), 48)
    []
    >>> reasons_outside(Scope(), Sampling(temperature=0.8, no_repeat_ngram=2), 49)
    ['was sampled at temperature 0.8', 'was picked with no_repeat_ngram 2', 'has 49 tokens']
    """
    rules = (
        (scope.decoding != _DECODING, f"was not picked by {scope.decoding!r}, which this edgesafe doesn't know"),
        (sampling.temperature != 0, f"was sampled at temperature {sampling.temperature}"),
        (sampling.repetition_penalty != 1, f"was picked with repetition_penalty {sampling.repetition_penalty}"),
        (sampling.no_repeat_ngram != 0, f"was picked with no_repeat_ngram {sampling.no_repeat_ngram}"),
        (tokens > scope.max_new_tokens, f"has {tokens} tokens"),
    )
    return [reason for holds, reason in rules if holds]
