"""Device profiles (what a device is thought to do) and latency tables (what one was measured to do)."""

from __future__ import annotations

import difflib
import os
import platform
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgesafe.errors import BundleError, ConfigError, FormatVersionError
from edgesafe.format.bundle import LATENCY, Bundle, read_sealed, seal, write_atomically
from edgesafe.format.fields import Fields

KINDS = ("board", "phone", "car", "host")
VISION_SCHEMES = ("fp32", "int8-dynamic", "int8-static")
TEXT_SCHEMES = ("fp32", "int8-dynamic", "int8-block32", "int4-block32", "int4-block64", "int4-block128")
ATTENTIONS = ("tiled", "whole")
ESTIMATES = ("gops_int8", "gops_fp32", "read_gb_s", "overhead_ms_per_graph")
# Every figure that a profile may give a source for.
FIGURES = (*ESTIMATES, "threads", "memory_mib", "ttft_budget_ms", "hard_ttft_ms")
MEASURED, ESTIMATED = "measured", "estimated"
# The format of latency.json. The first had no number and no single times.
LATENCY_VERSION = 2


@dataclass(frozen=True)
class DeviceProfile:
    """One device. ``estimates`` holds only figures with a text under ``sources``; an unknown one is absent.

    ``threads`` and ``memory_mib`` are None for ``host``, where the machine itself says. ``ttft_budget_ms`` is
    the usual budget for the time to the first token, ``hard_ttft_ms`` the time beyond which an answer is
    useless. ``attention`` is how the decoder's attention computes (`edgesafe_export.shared_cache.attend_whole`).
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
    attention: str | None = None

    @property
    def attends_whole(self) -> bool:
        """Whether attention holds all scores of a run; where the profile doesn't say, on x86, where that was measured."""
        if self.attention is None:
            return self.kind == "host" and platform.machine().lower() in ("x86_64", "amd64")
        return self.attention == "whole"


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
        attention=fields.choice("attention", ATTENTIONS) if fields.has("attention") else None,
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
    """How long each stage takes on one machine for one bundle; times are in ms, memory in MiB.

    The stages were run one after the other, round by round. Each stage's ``{p50_ms, p95_ms, ms}`` holds the
    time of every round in ``ms``, so that a round's stages can be added up and quantiles taken of the sums.
    ``segments`` maps a vision graph's path to it; ``text`` holds it as ``preprocess``, as ``prefill`` (a list, each
    with its ``tokens``) and as ``decode`` (a list, each with its ``context``: one token more after so many).
    ``exits`` lists ``{exit_depth, ttft_ms: {p50_ms, p95_ms}}`` at the shortest measured prompt. ``cores`` are the
    cores that the threads were kept on (None = any), ``sweep`` the ``{threads, cores, answer_ms}`` that were
    compared, ``session_open_ms`` one ``Session.open``, ``conditions`` what the machine said about itself.
    """

    bundle_digest: str
    machine: str
    onnxruntime_version: str
    threads: int
    segments: dict[str, dict[str, Any]]
    text: dict[str, Any]
    exits: list[dict[str, Any]]
    peak_rss_mib: float | None
    cores: list[int] | None = None
    sweep: list[dict[str, Any]] = field(default_factory=list)
    session_open_ms: float = 0.0
    conditions: dict[str, Any] = field(default_factory=dict)
    source: str = MEASURED
    format_version: int = LATENCY_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(obj: Mapping[str, Any], *, where: str = LATENCY) -> LatencyTable:
        """Read strictly.

        Raises:
            FormatVersionError: It is of an older format, or of one that this edgesafe doesn't know yet.
            BundleError: A key is missing, unknown or of a wrong type, or a stage lacks a round.
        """
        _check_version(obj, where)
        fields = Fields(obj, where, BundleError)
        segments = fields.child("segments")
        table = LatencyTable(
            format_version=fields.integer("format_version"),
            bundle_digest=fields.text("bundle_digest"),
            machine=fields.text("machine"),
            onnxruntime_version=fields.text("onnxruntime_version"),
            threads=fields.integer("threads", 1),
            cores=list(fields.integers("cores")) if fields.has("cores") else None,
            segments={path: _read_times(segments.child(path)) for path in segments.obj},
            text=_read_text(fields.child("text")),
            exits=[_read_exit(child) for child in fields.children("exits")],
            sweep=fields.items("sweep"),
            session_open_ms=fields.number("session_open_ms", 0),
            peak_rss_mib=fields.number("peak_rss_mib", 0) if fields.has("peak_rss_mib") else None,
            conditions=fields.table("conditions"),
            source=fields.choice("source", (MEASURED,)),
        )
        fields.done()
        _check_rounds(table, where)
        return table


def stage_times(samples_ms: Sequence[float]) -> dict[str, Any]:
    """One stage's times: every round's, their median and their 95th percentile, linear between samples.

    >>> stage_times([1.0, 3.0, 2.0])
    {'p50_ms': 2.0, 'p95_ms': 2.9, 'ms': [1.0, 3.0, 2.0]}
    """
    return {"p50_ms": percentile(samples_ms, 50), "p95_ms": percentile(samples_ms, 95), "ms": [round(t, 4) for t in samples_ms]}


def percentile(samples: Sequence[float], percent: float) -> float:
    """A percentile, linear between the samples, to four places.

    >>> percentile([4.0, 1.0, 2.0, 3.0], 50)
    2.5
    """
    ordered = sorted(samples)
    place = percent / 100 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return round(ordered[low] + (place - low) * (ordered[high] - ordered[low]), 4)


def read_latency(bundle: Bundle) -> LatencyTable | None:
    """The bundle's latency table, of whatever machine, or None where there is none.

    Raises:
        IntegrityError: The file is not what was sealed.
        FormatVersionError: It is of another format; measuring again writes it anew.
    """
    obj = read_sealed(bundle.root / LATENCY)
    if obj is None:
        return None
    obj.pop("digest")
    return LatencyTable.from_dict(obj, where=str(bundle.root / LATENCY))


def write_latency(bundle: Bundle, table: LatencyTable) -> None:
    """Seal the table into the bundle, in one step."""
    write_atomically(bundle.root / LATENCY, seal(table.to_dict()))


def _check_version(obj: Mapping[str, Any], where: str) -> None:
    version = obj.get("format_version")
    if version != LATENCY_VERSION:
        written = "an older edgesafe" if version is None else f"another edgesafe (format {version!r})"
        raise FormatVersionError(
            f"the measurement was written by {written}",
            where=where,
            expected=f"format_version {LATENCY_VERSION}",
            todo="measure again: edgesafe measure",
        )


def _check_rounds(table: LatencyTable, where: str) -> None:
    stages = [*table.segments.values(), table.text["preprocess"], *table.text["prefill"], *table.text["decode"]]
    counts = {len(stage["ms"]) for stage in stages}
    if len(counts) != 1 or not table.text["prefill"] or not table.text["decode"]:
        raise BundleError(
            "the measurement does not hold every stage in every round",
            where=where,
            expected="as many times for each segment, preprocess, prefill and decode",
            todo="measure again: edgesafe measure",
        )


def _read_times(fields: Fields, *more: str) -> dict[str, Any]:
    times: dict[str, Any] = {key: fields.number(key, 0) for key in ("p50_ms", "p95_ms")}
    times |= {"ms": list(fields.numbers("ms"))} | {key: fields.integer(key, 1) for key in more}
    fields.done()
    if not times["ms"] or min(times["ms"]) < 0:
        raise BundleError("a stage has no times, or one below 0", where=fields.where, todo="measure again: edgesafe measure")
    return times


def _read_text(fields: Fields) -> dict[str, Any]:
    text = {
        "preprocess": _read_times(fields.child("preprocess")),
        "prefill": [_read_times(child, "tokens") for child in fields.children("prefill")],
        "decode": [_read_times(child, "context") for child in fields.children("decode")],
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
