"""Device profiles (what a device is thought to do) and latency tables (what one was measured to do)."""

from __future__ import annotations

import difflib
import os
import platform
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgesafe.bundle import LATENCY, Bundle, read_sealed, seal, write_atomically
from edgesafe.errors import BundleError, ConfigError
from edgesafe.records import Fields

KINDS = ("board", "phone", "car", "host")
VISION_SCHEMES = ("fp32", "int8-dynamic", "int8-static")
TEXT_SCHEMES = ("fp32", "int8-dynamic", "int8-block32", "int4-block32", "int4-block64", "int4-block128")
ESTIMATES = ("gops_int8", "gops_fp32", "read_gb_s", "overhead_ms_per_graph")
# Every figure that a profile may give a source for.
FIGURES = (*ESTIMATES, "threads", "memory_mib", "ttft_budget_ms", "hard_ttft_ms")
MEASURED, ESTIMATED = "measured", "estimated"


@dataclass(frozen=True)
class DeviceProfile:
    """One device. ``estimates`` holds only figures with a text under ``sources``; an unknown one is absent.

    ``threads`` and ``memory_mib`` are None for ``host``, where the machine itself says. ``ttft_budget_ms`` is
    the usual budget for the time to the first token, ``hard_ttft_ms`` the time beyond which an answer is
    useless.
    """

    name: str
    title: str
    kind: str
    threads: int | None
    memory_mib: int | None
    provider: str
    vision_scheme: str
    text_scheme: str
    ttft_budget_ms: float
    hard_ttft_ms: float | None
    estimates: dict[str, float]
    sources: dict[str, str]


def devices_folder() -> Path:
    """Where the profiles lie: inside the wheel, or at the root of a checkout."""
    inside = Path(__file__).parent / "_devices"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "devices"


def list_devices() -> list[DeviceProfile]:
    """Every profile that ships with edgesafe, by name."""
    return [_read_profile(path) for path in sorted(devices_folder().glob("*.toml"))]


def load_device(name_or_path: str | os.PathLike[str]) -> DeviceProfile:
    """A profile by its name (``rpi5``) or the path of a TOML file.

    Raises:
        ConfigError: There is no such device, or its file has a wrong, missing or unknown key.
    """
    text = os.fspath(name_or_path)
    if text.endswith(".toml"):
        return _read_profile(Path(text))
    names = sorted(path.stem for path in devices_folder().glob("*.toml"))
    if text in names:
        return _read_profile(devices_folder() / f"{text}.toml")
    near = difflib.get_close_matches(text, names, n=1)
    raise ConfigError(
        f"unknown device {text!r}" + (f", did you mean {near[0]!r}?" if near else ""),
        expected="one of " + ", ".join(names) + ", or the path of a .toml file",
        todo="list them: edgesafe devices",
    )


def _read_profile(path: Path) -> DeviceProfile:
    try:
        with path.open("rb") as file:
            obj = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"can't read the device file: {error.strerror}", where=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file is not TOML: {error}", where=str(path)) from error
    return profile_from_dict(obj, name=path.stem, where=str(path))


def profile_from_dict(obj: Mapping[str, Any], *, name: str, where: str) -> DeviceProfile:
    """Read a profile strictly: every key known, every estimate with a source.

    Raises:
        ConfigError: A key is wrong, missing, unknown, or an estimate has no source.
    """
    fields = Fields(obj, where, ConfigError)
    estimates = fields.child("estimates") if fields.has("estimates") else Fields({}, where, ConfigError)
    sources = fields.child("sources") if fields.has("sources") else Fields({}, where, ConfigError)
    profile = DeviceProfile(
        name=name,
        title=fields.text("title"),
        kind=fields.choice("kind", KINDS),
        threads=fields.integer("threads", 1) if fields.has("threads") else None,
        memory_mib=fields.integer("memory_mib", 1) if fields.has("memory_mib") else None,
        provider=fields.choice("provider", ("CPUExecutionProvider",)),
        vision_scheme=fields.choice("vision_scheme", VISION_SCHEMES),
        text_scheme=fields.choice("text_scheme", TEXT_SCHEMES),
        ttft_budget_ms=fields.number("ttft_budget_ms", 1),
        hard_ttft_ms=fields.number("hard_ttft_ms", 1) if fields.has("hard_ttft_ms") else None,
        estimates={key: estimates.number(key, 0) for key in ESTIMATES if estimates.has(key)},
        sources={key: sources.text(key) for key in FIGURES if sources.has(key)},
    )
    estimates.done()
    sources.done()
    fields.done()
    for key in profile.estimates:
        if key not in profile.sources:
            raise ConfigError(
                f"the estimate {key} has no source",
                where=where,
                expected=f"[sources] {key} = where the figure comes from",
                todo="name the source, or leave the estimate out",
            )
    return profile


def profile_of(bundle: Bundle) -> DeviceProfile | None:
    """The profile that a bundle was exported for: the copy in its config, or the one that ships under its name."""
    inside = bundle.manifest.config.get("device_profile")
    try:
        if isinstance(inside, dict):
            return profile_from_dict(inside, name=bundle.manifest.device, where="manifest.json: device_profile")
        return load_device(bundle.manifest.device)
    except ConfigError:
        return None


@dataclass(frozen=True)
class LatencyTable:
    """How long each graph takes on one machine for one bundle; times are in ms, memory in MiB.

    ``segments`` maps a vision graph's path to ``{p50_ms, p95_ms, n}``; ``text`` holds ``prefill`` (a list of
    ``{tokens, p50_ms, p95_ms, n}``), ``decode`` and ``preprocess`` (``{p50_ms, p95_ms, n}``); ``exits`` lists
    ``{exit_depth, ttft_ms: {p50_ms, p95_ms}}``, cumulative sums of the figures above.
    """

    bundle_digest: str
    machine: str
    onnxruntime_version: str
    threads: int
    segments: dict[str, dict[str, float]]
    text: dict[str, Any]
    exits: list[dict[str, Any]]
    peak_rss_mib: float | None
    source: str = MEASURED

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(obj: Mapping[str, Any], *, where: str = LATENCY) -> LatencyTable:
        """Read strictly.

        Raises:
            BundleError: A key is missing, unknown or of a wrong type.
        """
        fields = Fields(obj, where, BundleError)
        table = LatencyTable(
            bundle_digest=fields.text("bundle_digest"),
            machine=fields.text("machine"),
            onnxruntime_version=fields.text("onnxruntime_version"),
            threads=fields.integer("threads", 1),
            segments={path: _read_times(fields.child("segments").child(path)) for path in fields.table("segments")},
            text=_read_text(fields.child("text")),
            exits=[_read_exit(child) for child in fields.children("exits")],
            peak_rss_mib=fields.number("peak_rss_mib", 0) if fields.has("peak_rss_mib") else None,
            source=fields.choice("source", (MEASURED, ESTIMATED)),
        )
        fields.done()
        return table


def read_latency(bundle: Bundle) -> LatencyTable | None:
    """The bundle's latency table, of whatever machine, or None where there is none.

    Raises:
        IntegrityError: The file is not what was sealed.
    """
    obj = read_sealed(bundle.root / LATENCY)
    if obj is None:
        return None
    obj.pop("digest")
    return LatencyTable.from_dict(obj, where=str(bundle.root / LATENCY))


def write_latency(bundle: Bundle, table: LatencyTable) -> None:
    """Seal the table into the bundle, in one step."""
    write_atomically(bundle.root / LATENCY, seal(table.to_dict()))


def machine_name() -> str:
    """This machine in words: board or processor model, architecture, cores. A measurement holds for it."""
    model = ""
    try:
        model = Path("/proc/device-tree/model").read_text(encoding="utf-8").strip("\0 \n")
    except OSError:
        model = _cpu_model()
    name = f"{model or platform.processor() or 'unknown processor'}, {platform.machine()}, {host_cores()} cores"
    return " ".join(name.split())


def host_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _read_times(fields: Fields, *more: str) -> dict[str, float]:
    times = {key: fields.number(key, 0) for key in ("p50_ms", "p95_ms")}
    times |= {key: fields.integer(key, 1) for key in ("n", *more)}
    fields.done()
    return times


def _read_text(fields: Fields) -> dict[str, Any]:
    text = {
        "preprocess": _read_times(fields.child("preprocess")),
        "prefill": [_read_times(child, "tokens") for child in fields.children("prefill")],
        "decode": _read_times(fields.child("decode")),
    }
    fields.done()
    return text


def _read_exit(fields: Fields) -> dict[str, Any]:
    ttft = fields.child("ttft_ms")
    row = {
        "exit_depth": fields.integer("exit_depth", 1),
        "ttft_ms": {key: ttft.number(key, 0) for key in ("p50_ms", "p95_ms")},
    }
    ttft.done()
    fields.done()
    return row
