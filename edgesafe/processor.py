"""The processor: a name that tells machines apart, and the instruction sets by which an engine picks its kernels."""

from __future__ import annotations

import ctypes
import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path

SYS, CPUINFO = Path("/sys"), Path("/proc/cpuinfo")
# By these onnxruntime's CPU provider picks its kernels, and other kernels round otherwise. Source: onnxruntime's
# core/mlas/lib/platform.cpp and core/common/cpuid_info.cc, which KleidiAI follows. The names are Linux's. AVX-VNNI-INT8 is
# missing, because Linux doesn't list it.
X86 = (
    *("sse4_1", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
)
# On Arm each is a bit of AT_HWCAP or AT_HWCAP2 in the auxiliary vector. Source: Linux's asm/hwcap.h.
_HWCAP = {"asimdhp": 10, "asimddp": 20, "sve": 22}
_HWCAP2 = {"svei8mm": 9, "i8mm": 13, "bf16": 14, "sme": 23, "sme2": 37}
ARM = (*_HWCAP, *_HWCAP2)
_AT_HWCAP, _AT_HWCAP2 = 16, 26
# What 32-bit kernels and virtual machines write as a name, whatever the processor is.
_NAMELESS = ("ARMv", "linux,dummy-virt")


def board_name() -> str:
    """The board's name from the device tree, or an empty text."""
    name = _read(Path("/proc/device-tree/model")).strip("\0 \n")
    return "" if name.startswith(_NAMELESS) else name


def processor_name(text: str | None = None, sys: Path = SYS) -> str:
    """The processor's or board's name in /proc/cpuinfo, else what tells it apart; empty where Linux doesn't tell.

    Cores that are offline and frequencies change neither, but for a kind of core whose last one is offline.

    Args:
        text: The text of /proc/cpuinfo; by default this machine's.
        sys: Where Linux shows how many cores there may be.
    """
    lines = _lines(text)
    names = (name for key in ("model name", "Model") for name in lines.get(key, ()))
    named = next((name for name in names if name and not name.startswith(_NAMELESS)), "")
    return named or _described(lines, sys)


def instruction_sets(
    machine: str | None = None, text: str | None = None, hwcaps: tuple[int, int] | None = None, sys: Path = SYS
) -> str:
    """The class of processors on which an engine picks the same kernels, such as ``aarch64 asimdhp asimddp``.

    Where nothing tells its instruction sets, a processor is a class of its own.

    Args:
        machine: The architecture; by default this machine's.
        text: As for ``processor_name``.
        hwcaps: AT_HWCAP and AT_HWCAP2. On Arm an engine goes by them, and /proc/cpuinfo may be the text of another processor
            than the one that is emulated.
        sys: As for ``processor_name``.
    """
    machine, lines = (machine or platform.machine()).lower(), _lines(text)
    if machine in ("aarch64", "arm64"):
        told = _of_bits(*(hwcaps or (_auxiliary(_AT_HWCAP), _auxiliary(_AT_HWCAP2)))) or _of_all_cores(
            lines.get("Features", ())
        )
        name, known = "aarch64", ARM
    else:
        told = _of_all_cores(lines.get("flags", ())) if machine in ("x86_64", "amd64") else set()
        name, known = "x86-64", X86
    if not told:
        return f"{machine}, instruction sets of {processor_name(text, sys) or platform.processor() or 'an unknown processor'}"
    return " ".join([name, *(one for one in known if one in told)])


def _described(lines: dict[str, list[str]], sys: Path) -> str:
    """What Arm kernels tell of a processor without a name."""
    parts = sorted({f"{i}:{p}" for i, p in zip(lines.get("CPU implementer", ()), lines.get("CPU part", ()), strict=False)})
    if not parts:
        return ""
    features = " ".join(sorted(_of_all_cores(lines.get("Features", ()))))
    told = [
        *lines.get("Hardware", ()),
        f"processor {' + '.join(parts)}",
        f"{_possible_cores(sys) or len(lines['CPU part'])} cores",
    ]
    # On 64-bit Arm this is the rate of the timer, which the chip's maker chose; elsewhere it is measured anew at each start.
    if set(lines.get("CPU architecture", ())) == {"8"} and "BogoMIPS" in lines:
        told.append(f"timer {lines['BogoMIPS'][0]}")
    return ", ".join([*told, f"features {hashlib.sha256(features.encode()).hexdigest()[:8]}"])


def _lines(text: str | None) -> dict[str, list[str]]:
    """The values of each key in /proc/cpuinfo, core by core."""
    found: dict[str, list[str]] = {}
    for line in (_read(CPUINFO) if text is None else text).splitlines():
        key, mark, value = line.partition(":")
        if mark:
            found.setdefault(key.strip(), []).append(" ".join(value.split()))
    return found


def _of_all_cores(values: Sequence[str]) -> set[str]:
    return set.intersection(*(set(value.split()) for value in values)) if values else set()


def _of_bits(first: int, second: int) -> set[str]:
    """The names of the bits that are set, and ``asimd`` for its own sake: every 64-bit Arm processor has that."""
    pairs = [(first, _HWCAP), (second, _HWCAP2)]
    return {name for bits, names in pairs for name, bit in names.items() if bits >> bit & 1} | ({"asimd"} if first else set())


def _auxiliary(number: int) -> int:
    try:
        getauxval = ctypes.CDLL(None).getauxval
    except (AttributeError, OSError, TypeError):  # no Linux
        return 0
    getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
    return int(getauxval(number))


def _possible_cores(sys: Path) -> int:
    """How many cores there may be, those that are offline included; 0 where the system doesn't tell."""
    try:
        ranges = [part.split("-") for part in _read(sys / "devices/system/cpu/possible").strip().split(",")]
        return sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)
    except ValueError:
        return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
