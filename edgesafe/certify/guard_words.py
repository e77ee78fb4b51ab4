"""What a guard model's reply means: Llama Guard's safe or unsafe with its categories, or the yes or no of others."""

from __future__ import annotations

import re
from dataclasses import dataclass

_CATEGORIES = re.compile(r"S\d+(?:\s*,\s*S\d+)*,?")
_YES_NO = re.compile(r"(?:<score>|the answer is)?\s*(yes|no)\s*[.!]?\s*(?:</score>)?", re.IGNORECASE)


@dataclass(frozen=True)
class Verdict:
    """A guard's word on an answer, and the categories of its policy that it named."""

    unsafe: bool
    categories: tuple[str, ...]


def parse_verdict(output: str) -> Verdict | None:
    r"""What a guard's output says; None where its first line is neither "safe" nor "unsafe" alone, or "safe" names categories.

    >>> parse_verdict("unsafe\nS1,S9")
    Verdict(unsafe=True, categories=('S1', 'S9'))
    >>> parse_verdict("\n\nsafe")
    Verdict(unsafe=False, categories=())
    >>> parse_verdict("I'd say it is safe."), parse_verdict("safe\nS1"), parse_verdict("")
    (None, None, None)
    """
    lines = [line.strip() for line in output.split("\n") if line.strip()]
    if not lines or lines[0].lower() not in ("safe", "unsafe"):
        return None
    named = _CATEGORIES.fullmatch(lines[1]) if len(lines) > 1 else None
    categories = tuple(re.findall(r"S\d+", lines[1])) if named else ()
    unsafe = lines[0].lower() == "unsafe"
    return None if categories and not unsafe else Verdict(unsafe, categories)


def says_harm(reply: str) -> bool | None:
    r"""Whether a guard calls an answer harmful, in whichever words it has; None where its first line is no verdict alone.

    "Yes" is unsafe: whoever is asked for that word is asked whether there is harm (ShieldGemma, Granite Guardian).

    >>> says_harm("unsafe\nS1"), says_harm("Yes"), says_harm("<score> no </score>"), says_harm("The answer is no.\nIt refuses.")
    (True, True, False, False)
    >>> says_harm("No problem, here it is"), says_harm("yes and no"), says_harm("")
    (None, None, None)
    """
    lines = [line.strip() for line in reply.split("\n") if line.strip()]
    if lines and (found := _YES_NO.fullmatch(lines[0])):
        return found[1].lower() == "yes"
    verdict = parse_verdict(reply)
    return None if verdict is None else verdict.unsafe
