"""Which exit to run: those that may be used at all, and pure arithmetic over their predictions and the time that is left."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgesafe.errors import InputError, NoExitFitsError, UncertifiedExitError
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import Certificate, certified_exits
from edgesafe.format.exits import Exit
from edgesafe.format.manifest import Manifest
from edgesafe.format.specs import ExitSpec
from edgesafe.format.tiles import Cut, prompt_runs
from edgesafe.runtime.standing import Standing

ERROR, SHALLOWEST = "error", "shallowest"
# The chance with which a prediction must hold where nobody says otherwise.
QUANTILE = 0.95
_NOT_CUT: Mapping[int | None, Cut] = {}


@dataclass(frozen=True)
class Budget:
    """What an answer may cost, in milliseconds from the call; at least one of the two times is given.

    Args:
        ttft_ms: Time to the first token.
        total_ms: Time to the answer's end. Decoding stops before it, and the answer then says so
            (``finish_reason`` ``deadline``).
        max_new_tokens: The answer's longest length. With ``total_ms``, an exit fits only where so many tokens
            fit as well; without it, only the first token must, and a longer answer may be cut.
        quantile: The chance, above 0 and below 1, with which a prediction must hold.
        on_miss: Where no certified exit is predicted to fit: ``error`` raises before anything is run,
            ``shallowest`` runs the shallowest one and says afterwards whether it was in time.
        require_measured: Refuse to choose by an estimate; only this machine's own measurement will do.
    """

    ttft_ms: float | None = None
    total_ms: float | None = None
    max_new_tokens: int | None = None
    quantile: float = QUANTILE
    on_miss: str = ERROR
    require_measured: bool = False

    def __post_init__(self) -> None:
        for name, value in (("ttft_ms", self.ttft_ms), ("total_ms", self.total_ms)):
            if value is not None and not _is_between(value, 0, math.inf):
                raise InputError(f"{value!r} is not a budget", where=name, expected="milliseconds above 0")
        if self.ttft_ms is None and self.total_ms is None:
            raise InputError("the budget names no time", expected="ttft_ms, total_ms or both")
        if not _is_between(self.quantile, 0, 1):
            raise InputError(f"{self.quantile!r} is not a quantile", where="quantile", expected="a number between 0 and 1")
        if self.on_miss not in (ERROR, SHALLOWEST):
            raise InputError(f"on_miss is {self.on_miss!r}", where="on_miss", expected=f"{ERROR!r} or {SHALLOWEST!r}")
        if self.max_new_tokens is not None:
            check_max_new_tokens(self.max_new_tokens)
        if not isinstance(self.require_measured, bool):
            raise InputError(f"require_measured is {self.require_measured!r}", expected="True or False")


def allowed_exits(
    bundle: Bundle,
    certificate: Certificate | None,
    standing: Standing,
    budget: Budget | None,
    exit: Exit | None,
    allow: bool,
    max_image_tokens: int | None = None,
    cuts: Mapping[int | None, Cut] = _NOT_CUT,
) -> tuple[list[ExitSpec], str]:
    """The exits that may be used, those preferred last, and why these: one, or with a budget all that are worth their time.

    Args:
        bundle: Their manifest.
        certificate: Their verdicts, or None.
        standing: What these are worth on this machine.
        budget: What the answer may cost; without one it is the deepest.
        exit: This exit and no other.
        allow: Use an exit without a passed verdict.
        max_image_tokens: Use none that makes more image tokens of a picture.
        cuts: How the picture is cut, by the exits' tiles; where they are not known, an exit's image tokens are those of a tile.

    Raises:
        InputError: There is no such exit, none with so few image tokens, or a budget was given beside an exit.
        UncertifiedExitError: No passed verdict allows it, or none that counts here.
    """
    manifest, certified = bundle.manifest, standing.exits
    if exit is not None:
        _check_exit(bundle, budget, exit)
        if exit not in certified and not allow:
            raise _uncertified(bundle, certificate, standing, exit)
        return [manifest.exit(one) for one in _within_cap(manifest, (exit,), max_image_tokens, cuts)], "asked for"
    usable = certified or ((certified_exits(certificate) or manifest.ladder) if allow else ())
    if not usable:
        raise _uncertified(bundle, certificate, standing)
    within = _within_cap(manifest, within_reference(usable, manifest.reference), max_image_tokens, cuts)
    if budget is None:
        kind = "deepest" if all(exit.whole for exit in within) else "largest"
        passed = " certified" if certified else " with a passed verdict" if standing.why else ""
        return [manifest.exit(within[-1])], f"the {kind}{passed}"
    return [manifest.exit(exit) for exit in worthwhile(within, certificate)], ""


def worthwhile(exits: Sequence[Exit], certificate: Certificate | None) -> tuple[Exit, ...]:
    """The exits without those that cost more than one that sees less and surely answer worse by the certificate.

    Args:
        exits: Ascending by what they compute.
        certificate: Has each exit's accuracy; without one none is left out.
    """
    if certificate is None or all(exit.whole for exit in exits):
        return tuple(exits)
    accuracy = {verdict.exit: verdict.accuracy for verdict in certificate.exits}
    kept, best = [], 0.0
    for exit in exits:
        if exit not in accuracy or accuracy[exit].upper_95 >= best:
            kept.append(exit)
        best = max(best, accuracy[exit].rate if exit in accuracy else 0.0)
    return tuple(kept)


def choose_exit(
    predicted: Mapping[Exit, float], certified: Collection[Exit], budget_ms: float, preferred: Sequence[Exit] = ()
) -> Exit:
    """The most preferred certified exit whose predicted time to the first token fits the budget.

    Args:
        predicted: ms by exit, at the quantile that the budget asks for.
        certified: Exits with a passed verdict.
        budget_ms: The time that is left, ms; a prediction equal to it fits.
        preferred: All of them, the most preferred last; by default the deepest.

    Raises:
        NoExitFitsError: No certified exit fits.

    >>> predicted = {Exit(2): 10.0, Exit(4): 20.0, Exit(6): 30.0}
    >>> str(choose_exit(predicted, {Exit(2), Exit(4), Exit(6)}, 25.0)), str(choose_exit(predicted, {Exit(2), Exit(6)}, 25.0))
    ('4', '2')
    """
    ascending = preferred or sorted(certified)
    fitting = [exit for exit in ascending if exit in certified and exit in predicted and predicted[exit] <= budget_ms]
    if fitting:
        return fitting[-1]
    times = {exit: predicted[exit] for exit in certified if exit in predicted}
    fastest = f"{min(times.values()):.1f} ms" if times else "unknown"
    raise NoExitFitsError(
        f"no certified exit fits the {budget_ms:.1f} ms that the budget leaves",
        expected=f"at least {fastest}, the fastest certified exit's prediction",
        todo="raise the budget, or export with shallower exits and certify them",
    )


def within_reference(exits: Iterable[Exit], reference: Exit) -> tuple[Exit, ...]:
    """The exits up to the reference, ascending, or all where every one lies beyond it.

    An exit beyond the reference was never trained for: it is not taken only for being deeper.

    >>> [" ".join(map(str, within_reference(map(Exit, depths), Exit(11)))) for depths in ((12, 11, 2), (12,))]
    ['2 11', '12']
    """
    ascending = sorted(exits)
    return tuple(exit for exit in ascending if exit <= reference) or tuple(ascending)


def _within_cap(
    manifest: Manifest, exits: Iterable[Exit], most: int | None, cuts: Mapping[int | None, Cut]
) -> tuple[Exit, ...]:
    """Those with at most so many image tokens, ascending by what they compute.

    Raises:
        InputError: There is none.
    """
    known = set(exits)
    ascending = tuple(exit for exit in manifest.by_cost if exit in known)
    if most is None:
        return ascending
    tokens = {exit: _image_tokens(manifest, exit, cuts) for exit in ascending}
    within = tuple(exit for exit, count in tokens.items() if count <= most)
    if not within and manifest.tiles is not None and cuts:
        raise InputError(
            f"the picture takes {min(tokens.values())} image tokens, more than {most}",
            where="max_image_tokens",
            expected=f"at least {min(tokens.values())} for this picture",
            todo="raise it, or use a smaller picture",
        )
    if not within:
        raise InputError(
            f"no exit that may be used has at most {most} image tokens",
            where="max_image_tokens",
            expected=f"at least {min(tokens.values())}",
            todo="raise it, or export exits "
            + ("with fewer visual tokens" if manifest.tiles is None else "of one tile, such as 6x1"),
        )
    return within


def _image_tokens(manifest: Manifest, exit: Exit, cuts: Mapping[int | None, Cut]) -> int:
    """A picture's image tokens at an exit."""
    if manifest.tiles is None or exit.tiles not in cuts:
        return manifest.tokens_of(exit)  # of a tile alone
    return sum(prompt_runs(manifest.tiles, cuts[exit.tiles], manifest.image_token, manifest.image_tokens)[1])


def first_token_ms(budget: Budget, later_tokens_ms: float = 0.0) -> float:
    """The time by which the first token is due.

    Args:
        budget: With one or both times.
        later_tokens_ms: What the tokens after the first are predicted to take; ``total_ms`` keeps it free.

    >>> first_token_ms(Budget(700)), first_token_ms(Budget(700, 1000), 400), first_token_ms(Budget(total_ms=1000), 50)
    (700, 600, 950)
    """
    first = math.inf if budget.ttft_ms is None else budget.ttft_ms
    return first if budget.total_ms is None else min(first, budget.total_ms - later_tokens_ms)


def check_max_new_tokens(value: object, name: str = "max_new_tokens") -> None:
    """Refuse what is not a whole number of at least 1.

    Raises:
        InputError: It is refused.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} is {value!r}", expected="a whole number of at least 1")


def _is_between(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low < value < high


def _check_exit(bundle: Bundle, budget: Budget | None, exit: Exit) -> None:
    if budget is not None:
        raise InputError("a budget and an exit were given", expected="one of the two")
    ladder = bundle.manifest.ladder
    if exit not in ladder:
        expected = f"one of {', '.join(map(str, ladder))}"
        raise InputError(f"the bundle has no exit {exit}", where="exit", expected=expected)


def _uncertified(
    bundle: Bundle, certificate: Certificate | None, standing: Standing, exit: Exit | None = None
) -> UncertifiedExitError:
    passed, root = certified_exits(certificate), bundle.root
    which = f"exit {exit}" if exit is not None else "no exit of this bundle"
    if standing.why and (exit is None or exit in passed):
        what = f"{which} is {'not ' if exit is not None else ''}certified on this machine: {standing.why}"
        expected, todo = "a passed `edgesafe smoke` on this machine", f"run it: edgesafe smoke {root}"
        return UncertifiedExitError(what, where=str(root), expected=expected, todo=todo)
    what = f"{which} has {'no' if exit is not None else 'a'} passed verdict"
    todo = "use a certified exit, or align and export the model again"
    if certificate is None:
        what += ", because the bundle has no certificate"
        todo = f"certify it: edgesafe certify {root}"
    shown = ", ".join(map(str, standing.exits)) or "none yet"
    return UncertifiedExitError(what, where=str(root), expected=f"a certified exit ({shown})", todo=todo)
