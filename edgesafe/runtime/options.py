"""An ask's options, and what is none."""

from __future__ import annotations

from edgesafe.errors import InputError
from edgesafe.format import suite
from edgesafe.runtime.choose import Budget
from edgesafe.runtime.sampling import Sampling

# An answer's longest length in tokens where the caller names none.
MAX_NEW_TOKENS = suite.MAX_NEW_TOKENS


def check_max_new_tokens(value: int) -> None:
    """Refuse what is no whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"max_new_tokens is {value!r}", expected="a whole number of at least 1")


def check_options(budget: Budget | None, sampling: Sampling) -> None:
    """Refuse what is no budget or no sampling."""
    if budget is not None and not isinstance(budget, Budget):
        raise InputError(f"{budget!r} is no budget", expected="Budget(ttft_ms=...)")
    if not isinstance(sampling, Sampling):
        raise InputError(f"{sampling!r} says nothing of sampling", expected="Sampling(temperature=...)")
