"""How a session runs on this machine (threads, cores) and what it knows about its times: measured here, or else estimated."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgesafe.device import DeviceProfile
from edgesafe.errors import BundleError, FormatVersionError, InputError, NotMeasuredError
from edgesafe.format.bundle import Bundle
from edgesafe.format.latency import MEASURED, LatencyTable, read_cached_latency, read_latency
from edgesafe.machine import host_cores, machine_name
from edgesafe.runtime.choose import Budget
from edgesafe.runtime.engine import Engine
from edgesafe.runtime.forecast import MEASURE, NONE, Forecast, from_latency, from_profile


@dataclass(frozen=True)
class Tuning:
    """Threads of each graph, the cores that they stay on (None = any), and this machine's measurement.

    ``latency`` is None where there is none that holds here; ``ignored`` then says why the one that is there was not used.
    """

    threads: int
    cores: tuple[int, ...] | None = None
    latency: LatencyTable | None = None
    ignored: str = ""


def tune(bundle: Bundle, profile: DeviceProfile | None, threads: int | None, engine: Engine) -> Tuning:
    """What was asked for, else what the measurement on this machine found best, else what the profile says.

    Args:
        bundle: With or without a measurement.
        profile: The device that it was exported for.
        threads: Asked for, or None.
        engine: A measurement must have been made with it.

    Raises:
        InputError: ``threads`` is not a number of threads.
        IntegrityError: latency.json is not what was sealed.
    """
    asked = asked_threads(threads) if threads is not None else Tuning(_guessed_threads(profile))
    table, ignored = _measured_here(bundle, engine)
    if table is not None and threads in (None, table.threads):
        return Tuning(table.threads, tuple(table.cores) if table.cores else None, table)
    if table is not None:
        ignored = f"it was measured with {table.threads} threads"
    return replace(asked, ignored=ignored)


def asked_threads(threads: int) -> Tuning:
    """So many threads on any cores.

    Raises:
        InputError: It is not a number of threads.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise InputError(f"{threads!r} is not a number of threads", expected="at least 1")
    return Tuning(threads)


def forecast(bundle: Bundle, tuning: Tuning, profile: DeviceProfile | None, prompt_tokens: int) -> Forecast:
    """The stages' times for a prompt of that length; an empty forecast, with a note, where nothing predicts them."""
    if tuning.latency is not None:
        return from_latency(bundle.manifest, tuning.latency, prompt_tokens)
    note = f"latency.json was ignored: {tuning.ignored}; " if tuning.ignored else ""
    estimate = from_profile(bundle.manifest, profile, prompt_tokens) if profile else None
    if estimate is None or profile is None:
        return Forecast({}, NONE, f"{note}nothing predicts the time here: {MEASURE}")
    estimate.note = note + estimate.note
    return estimate


def check_measured(expected: Forecast, budget: Budget, bundle: Bundle) -> None:
    """Refuse a budget for which nothing predicts a time, or only an estimate does where a measurement is demanded.

    Raises:
        NotMeasuredError: It is refused.
    """
    if not expected:
        what = "a budget was given, and nothing predicts how long an exit takes here"
        wanted = "a measurement on this machine, or a device profile with estimates"
    elif budget.require_measured and expected.source != MEASURED:
        what = "the budget demands a measurement, and there is only an estimate"
        wanted = "a measurement of this bundle on this machine with this engine and as many threads"
    else:
        return
    ignored = expected.note.partition("; ")[0] if expected.note.startswith("latency.json") else ""
    raise NotMeasuredError(
        what + (f" ({ignored})" if ignored else ""),
        where=str(bundle.root),
        expected=wanted,
        todo=f"measure it: edgesafe measure {bundle.root}",
    )


def _measured_here(bundle: Bundle, engine: Engine) -> tuple[LatencyTable | None, str]:
    """The latency table that holds for this bundle, machine and engine, else why none does.

    Of the bundle's own and the one in the cache the later counts where both hold, and the bundle's own where that isn't known.
    """
    found = [_own(bundle), _cached(bundle)]
    reasons, held = [], []
    for table, why in found:
        why = why or (latency_mismatch(table, bundle, engine) if table is not None else "")
        if why:
            reasons.append(why)
        elif table is not None:
            held.append(table)
    if held:
        return max(held, key=lambda table: str(table.conditions.get("measured_at") or "")), ""
    return None, reasons[0] if reasons else ""


def _own(bundle: Bundle) -> tuple[LatencyTable | None, str]:
    try:
        return read_latency(bundle), ""
    except FormatVersionError as error:
        return None, error.what


def _cached(bundle: Bundle) -> tuple[LatencyTable | None, str]:
    # A cache is nobody's evidence: what can't be read there is measured again, and no reason to stop.
    try:
        return read_cached_latency(bundle), ""
    except (BundleError, OSError) as error:
        return None, f"the copy in the cache can't be read ({error.what if isinstance(error, BundleError) else error.strerror})"


def latency_mismatch(table: LatencyTable, bundle: Bundle, engine: Engine) -> str:
    """Why a latency table says nothing about this bundle here, or an empty text where it does."""
    if table.bundle_digest != bundle.digest:
        return "it was measured on another bundle"
    if table.machine != machine_name():
        return f"it was measured on another machine ({table.machine})"
    if (table.engine, table.engine_version) != (engine.name, engine.version):
        return f"it was measured with {table.engine} {table.engine_version}"
    graphs = {path for spec in bundle.manifest.exits for path in spec.graphs}
    if not graphs <= table.segments.keys():
        return "it doesn't cover every exit"
    return ""


def _guessed_threads(profile: DeviceProfile | None) -> int:
    cores = host_cores()
    return min(cores, profile.threads) if profile and profile.threads else cores
