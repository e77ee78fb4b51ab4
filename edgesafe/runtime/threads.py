"""How a session runs on this machine (threads, cores) and what it knows about its times: measured here, or else estimated."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgesafe.device import DeviceProfile
from edgesafe.errors import FormatVersionError, InputError, NotMeasuredError
from edgesafe.format.bundle import Bundle
from edgesafe.format.latency import LatencyTable, read_latency
from edgesafe.machine import host_cores, machine_name
from edgesafe.runtime.choose import Budget
from edgesafe.runtime.forecast import NONE, Forecast, from_latency, from_profile


@dataclass(frozen=True)
class Tuning:
    """Threads of each graph, the cores that they stay on (None = any), and this machine's measurement.

    ``latency`` is None where there is none that holds here; ``ignored`` then says why latency.json was not used.
    """

    threads: int
    cores: tuple[int, ...] | None = None
    latency: LatencyTable | None = None
    ignored: str = ""


def tune(bundle: Bundle, profile: DeviceProfile | None, threads: int | None, version: str) -> Tuning:
    """What was asked for, else what the measurement on this machine found best, else what the profile says.

    Args:
        bundle: With or without a latency.json.
        profile: The device that it was exported for.
        threads: Asked for, or None.
        version: The engine's, of which a measurement must be.

    Raises:
        InputError: ``threads`` is no number of threads.
        IntegrityError: latency.json is not what was sealed.
    """
    asked = asked_threads(threads) if threads is not None else Tuning(_guessed_threads(profile))
    table, ignored = _measured_here(bundle, version)
    if table is not None and threads in (None, table.threads):
        return Tuning(table.threads, tuple(table.cores) if table.cores else None, table)
    if table is not None:
        ignored = f"it was measured with {table.threads} threads"
    return replace(asked, ignored=ignored)


def asked_threads(threads: int) -> Tuning:
    """So many threads on any cores.

    Raises:
        InputError: It is no number of threads.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise InputError(f"{threads!r} is no number of threads", expected="at least 1")
    return Tuning(threads)


def forecast(bundle: Bundle, tuning: Tuning, profile: DeviceProfile | None, prompt_tokens: int) -> Forecast:
    """The stages' times for a prompt of that length; an empty forecast, with a note, where nothing predicts them."""
    if tuning.latency is not None:
        return from_latency(bundle.manifest, tuning.latency, prompt_tokens)
    note = f"latency.json was ignored: {tuning.ignored}; " if tuning.ignored else ""
    estimate = from_profile(bundle.manifest, profile, prompt_tokens) if profile else None
    if estimate is None or profile is None:
        return Forecast({}, NONE, note + "nothing predicts the time here: run edgesafe measure")
    estimate.note = f"{note}the time was estimated for {profile.title}, not measured: run edgesafe measure"
    return estimate


def check_measured(expected: Forecast, budget: Budget, bundle: Bundle) -> None:
    """Refuse a budget for which nothing predicts a time, or only an estimate does where a measurement is demanded.

    Raises:
        NotMeasuredError: As said.
    """
    if not expected:
        what = "a budget was given, and nothing predicts how long an exit takes here"
        wanted = "a measurement on this machine, or a device profile with estimates"
    elif budget.require_measured and expected.source != "measured":
        what = "the budget demands a measurement, and there is only an estimate"
        wanted = "a measurement of this bundle on this machine with this onnxruntime and as many threads"
    else:
        return
    ignored = expected.note.partition("; ")[0] if expected.note.startswith("latency.json") else ""
    raise NotMeasuredError(
        what + (f" ({ignored})" if ignored else ""),
        where=str(bundle.root),
        expected=wanted,
        todo=f"measure it: edgesafe measure {bundle.root}",
    )


def _measured_here(bundle: Bundle, version: str) -> tuple[LatencyTable | None, str]:
    """The bundle's latency table if it holds for this bundle, machine and onnxruntime, else why it doesn't."""
    try:
        table = read_latency(bundle)
    except FormatVersionError as error:
        return None, error.what
    why = latency_mismatch(table, bundle, version) if table is not None else ""
    return (None, why) if why else (table, "")


def latency_mismatch(table: LatencyTable, bundle: Bundle, version: str) -> str:
    """Why a latency table says nothing about this bundle here, or an empty text where it does."""
    if table.bundle_digest != bundle.digest:
        return "it was measured on another bundle"
    if table.machine != machine_name():
        return f"it was measured on another machine ({table.machine})"
    if table.onnxruntime_version != version:
        return f"it was measured with onnxruntime {table.onnxruntime_version}"
    graphs = {path for spec in bundle.manifest.exits for path in spec.graphs}
    if not graphs <= table.segments.keys():
        return "it doesn't cover every exit"
    return ""


def _guessed_threads(profile: DeviceProfile | None) -> int:
    cores = host_cores()
    return min(cores, profile.threads) if profile and profile.threads else cores
