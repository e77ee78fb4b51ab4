"""Which exits an ask may use: those with a passed verdict, unless the caller takes others upon himself."""

from __future__ import annotations

from edgesafe.errors import InputError, UncertifiedExitError
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import Certificate, certified_depths
from edgesafe.format.manifest import ExitSpec
from edgesafe.runtime.choose import Budget, within_reference


def allowed_exits(
    bundle: Bundle, certificate: Certificate | None, budget: Budget | None, exit_depth: int | None, allow: bool
) -> tuple[list[ExitSpec], str]:
    """The exits that may be taken, ascending, and why these: one, or with a budget all usable ones.

    Args:
        bundle: Their manifest.
        certificate: Their verdicts, or None.
        budget: What the answer may cost; without one it is the deepest.
        exit_depth: This exit and no other.
        allow: Use an exit without a passed verdict.

    Raises:
        InputError: There is no such exit, or a budget was given as well.
        UncertifiedExitError: No passed verdict allows it.
    """
    manifest, certified = bundle.manifest, certified_depths(certificate)
    if exit_depth is not None:
        _check_depth(bundle, budget, exit_depth)
        if exit_depth not in certified and not allow:
            raise _uncertified(bundle, certificate, f"the exit at depth {exit_depth} has no passed verdict")
        return [manifest.exit(exit_depth)], "asked for"
    usable = certified or (manifest.depths if allow else ())
    if not usable:
        raise _uncertified(bundle, certificate, "no exit of this bundle has a passed verdict")
    exits = [manifest.exit(depth) for depth in within_reference(usable, manifest.reference_depth)]
    if budget is None:
        return exits[-1:], "the deepest certified" if certified else "the deepest"
    return exits, ""


def _check_depth(bundle: Bundle, budget: Budget | None, exit_depth: int) -> None:
    if budget is not None:
        raise InputError("a budget and an exit depth were given", expected="one of the two")
    depths = bundle.manifest.depths
    if isinstance(exit_depth, bool) or exit_depth not in depths:
        raise InputError(
            f"the bundle has no exit at depth {exit_depth}",
            where="exit_depth",
            expected=f"one of {', '.join(map(str, depths))}",
        )


def _uncertified(bundle: Bundle, certificate: Certificate | None, what: str) -> UncertifiedExitError:
    if certificate is None:
        what += ", because the bundle has no certificate"
        todo = f"certify it: edgesafe certify {bundle.root}"
    else:
        todo = "use a certified exit, or align and export the model again"
    shown = ", ".join(map(str, certified_depths(certificate))) or "none yet"
    return UncertifiedExitError(what, where=str(bundle.root), expected=f"a certified exit ({shown})", todo=todo)
