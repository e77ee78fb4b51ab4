"""The machine that this runs on: its name, its cores and their kinds, and the conditions that change its speed."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

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
