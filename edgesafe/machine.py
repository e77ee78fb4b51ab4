"""The machine that this runs on: its name, its cores and their kinds, and the conditions that change its speed."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesafe.processor import SYS, board_name, processor_name


def machine_name() -> str:
    """This machine in words, with the number of cores that this process may use. A measurement holds for it."""
    return f"{machine_kind()}, {host_cores()} cores"


def machine_kind() -> str:
    """Machines like this one in words: board or processor, and architecture. A smoke record holds for them."""
    name = board_name() or processor_name() or platform.processor() or "unknown processor"
    return " ".join(f"{name}, {platform.machine()}".split())


def host_cores(sys: Path = SYS, own: Path = Path("/proc/self/cgroup")) -> int:
    """The number of cores that this process may use: those it may run on, or fewer where a container's quota ends before."""
    cores = len(allowed_cores()) or os.cpu_count() or 1
    quota = cpu_quota(sys, own)
    return cores if quota is None else min(cores, max(1, math.ceil(quota)))


def cpu_quota(sys: Path = SYS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """How many cores' time this process's cgroups leave it, the tightest one; None where there is no limit or no Linux.

    Args:
        sys: Where Linux shows the groups: ``cpu.max`` in version 2, ``cpu.cfs_quota_us`` and its period in version 1.
        own: The file that names this process's groups.
    """
    found = []
    for line in _read(own).splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        root = sys / "fs/cgroup" / ("cpu" if controllers else "")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A group's parents limit it too, and in a container the path may be the host's, of which only the root is seen.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                found.append(_limit(folder))
    return min((limit for limit in found if limit is not None), default=None)


def _limit(folder: Path) -> float | None:
    """One group's limit in cores."""
    both = _read(folder / "cpu.max").split() or [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    try:
        quota, period = map(int, both)
    except ValueError:  # "max", or nothing
        return None
    return quota / period if quota > 0 and period > 0 else None


def allowed_cores() -> tuple[int, ...]:
    """The numbers of the cores that this process may use; empty where the system doesn't tell."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def core_sets(cores: Sequence[int], sys: Path = SYS) -> list[tuple[int, ...]]:
    """The fastest kind of cores, the two fastest kinds, and so on to all of them; one set where they are alike.

    Args:
        cores: The cores to tell apart.
        sys: Where Linux shows them. ``cpu_capacity`` says how much work a core does; where only the largest
            frequency is known, that decides. A core of which neither is known makes all of them alike.
    """
    speeds = {core: _speed(sys / f"devices/system/cpu/cpu{core}") for core in cores}
    known = {speed for speed in speeds.values() if speed is not None}
    if len(known) < 2 or None in speeds.values():
        return [tuple(cores)]
    return [tuple(c for c in cores if (speeds[c] or 0) >= least) for least in sorted(known, reverse=True)]


def thread_choices(sets: Sequence[Sequence[int]]) -> list[tuple[int, tuple[int, ...] | None]]:
    """Thread counts worth trying, each with the cores to stay on (None = all): 1, 2, 4 ... and one per core.

    On a larger set only counts that the smaller one has no room for are new.

    >>> thread_choices([(0, 1, 2, 3)])
    [(1, None), (2, None), (4, None)]
    >>> thread_choices([(7,), (4, 5, 6, 7), (0, 1, 2, 3, 4, 5, 6, 7)])
    [(1, (7,)), (2, (4, 5, 6, 7)), (4, (4, 5, 6, 7)), (8, None)]
    """
    choices: list[tuple[int, tuple[int, ...] | None]] = []
    below = 0
    for cores in sets:
        counts = {2**i for i in range(len(cores).bit_length())} | {len(cores)}
        kept = None if len(cores) == len(sets[-1]) else tuple(cores)
        choices += [(count, kept) for count in sorted(counts) if below < count <= len(cores)]
        below = len(cores)
    return choices


def trim_heap() -> None:
    """Give the system back what lies free between pieces in use: glibc's heap keeps it. Elsewhere nothing happens."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_mib() -> float | None:
    """Memory that a process could still get here, what Linux and its cgroup leave; None where the system doesn't tell."""
    found = []
    try:
        info = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        found.append(int(info["MemAvailable"].split()[0]) / 1024)
    except (OSError, ValueError, KeyError):
        pass  # no Linux
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        found.append((int(limit) - int(used)) / 2**20)
    except (OSError, ValueError):
        pass  # no cgroup, or "max"
    return min(found) if found else None


@contextmanager
def on_cores(cores: Sequence[int] | None) -> Iterator[None]:
    """Keep the calling thread, and every thread that it starts meanwhile, on these cores; None changes nothing.

    Cores that this process may not use any more are left out; where none is left, nothing changes.
    """
    before = set(allowed_cores())
    wanted = before & set(cores or ())
    if not wanted or wanted == before:
        yield
        return
    os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def governor(sys: Path = SYS) -> str | None:
    """The frequency governors in use, joined by a comma, or None where the system doesn't tell."""
    texts = {_read(path) for path in sorted(sys.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor"))}
    return ", ".join(sorted(text for text in texts if text)) or None


def temperature_c(sys: Path = SYS) -> float | None:
    """The hottest thermal zone in degrees Celsius, or None where the system doesn't tell."""
    texts = [_read(path) for path in sys.glob("class/thermal/thermal_zone[0-9]*/temp")]
    degrees = [int(text) / 1000 for text in texts if text.removeprefix("-").isdecimal()]
    return max(degrees, default=None)


# Why a Raspberry Pi runs slower, by the bit of its flags that says so; 16 bits above each stands that it did since the start.
# Source: the documentation of vcgencmd get_throttled.
_PI_FLAGS = ("its supply's voltage is too low", "its frequency is capped", "it is throttled", "it is at its soft heat limit")
_SINCE_START = 16


@dataclass(frozen=True)
class Heat:
    """How hot the machine is at a moment, and what it says of being slowed down for it; None where it doesn't tell.

    ``pi_flags`` are a Raspberry Pi's, ``throttled`` counts since the start how often x86 cores were slowed, ``cooling`` is the
    highest step of what slows the processor to cool it, and ``thermal_status`` Android's: 0 for none to 6.
    """

    temperature_c: float | None = None
    pi_flags: int | None = None
    throttled: int | None = None
    cooling: int | None = None
    thermal_status: int | None = None


def read_heat(sys: Path = SYS, thermal_status: Callable[[], int | None] | None = None) -> Heat:
    """What the machine says now.

    Args:
        sys: Where Linux shows it.
        thermal_status: Asks Android, whose PowerManager an app alone can reach (`getCurrentThermalStatus`).
    """
    flags = [_read(path) for path in sys.glob("devices/platform/soc*/*firmware/get_throttled")]
    counts = [_read(path) for path in sys.glob("devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count")]
    slowing = [path for path in sys.glob("class/thermal/cooling_device[0-9]*") if _slows(_read(path / "type"))]
    steps = [_read(path / "cur_state") for path in slowing]
    return Heat(
        temperature_c=temperature_c(sys),
        pi_flags=next((int(text, 16) for text in flags if set(text) <= set("0123456789abcdefx") and text), None),
        throttled=sum(map(int, counts)) if counts and all(text.isdecimal() for text in counts) else None,
        cooling=max((int(text) for text in steps if text.isdecimal()), default=None),
        thermal_status=thermal_status() if thermal_status is not None else None,
    )


def conditions(before: Heat, after: Heat) -> dict[str, Any]:
    """What a measurement says of the time that it took: the governor, how hot it was, and why it was slow, if it was."""
    told: dict[str, Any] = {"governor": governor(), "temperature_c": [before.temperature_c, after.temperature_c]}
    if after.thermal_status is not None:
        told["thermal_status"] = [before.thermal_status, after.thermal_status]
    return told | {"slowed": list(slowed(before, after))}


def slowed(before: Heat, after: Heat) -> tuple[str, ...]:
    """Why the machine was slowed down between two moments or at one of them, in words; empty where nothing says so.

    >>> slowed(Heat(pi_flags=0x50000), Heat(pi_flags=0x50000)), slowed(Heat(throttled=7), Heat(throttled=9))
    ((), ('the processor was throttled 2 times',))
    """
    first, last = before.pi_flags or 0, after.pi_flags or 0
    # What has happened since the start counts where it had not happened before.
    flags = first | last | (last & ~first) >> _SINCE_START
    found = [text for bit, text in enumerate(_PI_FLAGS) if flags >> bit & 1]
    if before.throttled is not None and after.throttled is not None and after.throttled > before.throttled:
        found.append(f"the processor was throttled {after.throttled - before.throttled} times")
    if step := max(before.cooling or 0, after.cooling or 0):
        found.append(f"the system slows the processor to cool it (step {step})")
    if status := max(before.thermal_status or 0, after.thermal_status or 0):
        found.append(f"Android's thermal status is {status}")
    return tuple(found)


def _slows(kind: str) -> bool:
    return "cpufreq" in kind or kind == "Processor"


def _speed(folder: Path) -> int | None:
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        text = _read(folder / name)
        if text.isdecimal():
            return int(text)
    return None


def _read(path: Path) -> str:
    # A thermal zone that is switched off answers reading with an error.
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
