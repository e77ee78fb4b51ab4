"""Latency tables: what one machine was measured to do with one bundle, in its latency.json or beside it in a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from edgesafe.errors import BundleError, DeviceError, FormatVersionError
from edgesafe.format.bundle import LATENCY, Bundle
from edgesafe.format.exits import read_exit
from edgesafe.format.fields import Fields
from edgesafe.format.files import write_atomically
from edgesafe.format.seal import read_sealed, seal
from edgesafe.format.targets import check_writable, user_folder

MEASURED, ESTIMATED = "measured", "estimated"
# The format of latency.json. The first had no number and no single times. Two are still read: the second knew one engine, the
# third one picture.
LATENCY_VERSION = 4
_ONE_ENGINE, _ONE_PICTURE = 2, 3
_ITS_PIXELS = 864 * 1152


@dataclass(frozen=True)
class LatencyTable:
    """How long each stage takes on one machine for one bundle; times are in ms, memory in MiB.

    The stages were run one after the other, round by round. Each stage's ``{p50_ms, p95_ms, ms}`` holds the
    time of every round in ``ms``, so that a round's stages can be added up and quantiles taken of the sums.
    ``segments`` maps a vision graph's path to it; ``text`` holds lists of it: ``preprocess``, each with a picture's ``pixels``
    and whether it was ``encoded``, a JPEG file; ``prefill``, each with its ``tokens``; and ``decode``, each with its
    ``context``: one token more after so many.
    ``exits`` lists ``{exit, ttft_ms: {p50_ms, p95_ms}}`` at the shortest measured prompt. ``cores`` are the
    cores that the threads were kept on (None = any), ``sweep`` the ``{threads, cores, answer_ms}`` that were
    compared, ``session_open_ms`` one ``Session.open``, ``conditions`` what the machine said about itself. ``path`` is the file
    that it was read from or written to, and no part of it.
    """

    bundle_digest: str
    machine: str
    engine: str
    engine_version: str
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
    path: Path | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {key: value for key, value in asdict(self).items() if key != "path"}

    @staticmethod
    def from_dict(obj: Mapping[str, Any], *, where: str = LATENCY) -> LatencyTable:
        """Read strictly.

        Raises:
            FormatVersionError: It is of an older format, or of one that this edgesafe doesn't know yet.
            BundleError: A key is missing, unknown or of a wrong type, or a stage lacks a round.
        """
        version = _check_version(obj, where)
        old = version == _ONE_ENGINE
        fields = Fields(obj, where, BundleError)
        segments = fields.child("segments")
        table = LatencyTable(
            bundle_digest=fields.text("bundle_digest"),
            machine=fields.text("machine"),
            engine="onnxruntime" if old else fields.text("engine"),
            engine_version=fields.text("onnxruntime_version" if old else "engine_version"),
            threads=fields.integer("threads", 1),
            cores=list(fields.integers("cores")) if fields.has("cores") else None,
            segments={path: _read_times(segments.child(path)) for path in segments.obj},
            text=_read_text(fields.child("text"), one_picture=version != LATENCY_VERSION),
            exits=[_read_exit(child, by_depth=old) for child in fields.children("exits")],
            sweep=fields.items("sweep"),
            session_open_ms=fields.number("session_open_ms", 0),
            peak_rss_mib=fields.number("peak_rss_mib", 0) if fields.has("peak_rss_mib") else None,
            conditions=fields.table("conditions"),
            source=fields.choice("source", (MEASURED,)),
        )
        fields.integer("format_version")
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
    """The latency table in the bundle, of whatever machine, or None where there is none.

    Raises:
        IntegrityError: The file is not what was sealed.
        FormatVersionError: It is of another format; measuring again writes it anew.
    """
    return _read(bundle.root / LATENCY)


def read_cached_latency(bundle: Bundle) -> LatencyTable | None:
    """The latency table that ``measure`` put outside the bundle, which it couldn't write; None where there is none.

    Raises:
        BundleError: As by ``read_latency``.
    """
    path = cached_path(bundle)
    return _read(path) if path is not None else None


def cached_path(bundle: Bundle) -> Path | None:
    """Where this user's table of a bundle lies that can't be written; None where the system knows no home folder.

    It is ``edgesafe/latency/DIGEST.json`` under ``$XDG_CACHE_HOME``, or under ``~/.cache`` where that is not an absolute path.
    """
    folder = user_folder("XDG_CACHE_HOME", ".cache")
    return folder / "latency" / f"{bundle.digest}.json" if folder else None


def latency_place(bundle: Bundle) -> Path:
    """Where a table of this bundle can be written: inside it, else in the user's cache. Called before anything is measured.

    Raises:
        DeviceError: Neither can be written.
    """
    inside, cached = bundle.root / LATENCY, cached_path(bundle)
    try:
        check_writable(inside, error=DeviceError)
        return inside
    except DeviceError as refused:
        if cached is None or inside.is_dir():
            raise
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"neither the bundle nor the cache can be written: {error.strerror}"
            todo = "make one of them writable, or name another cache: XDG_CACHE_HOME=FOLDER edgesafe measure"
            raise DeviceError(what, where=str(cached.parent), expected=refused.expected, todo=todo) from error
        check_writable(cached, error=DeviceError, todo="name another cache: XDG_CACHE_HOME=FOLDER edgesafe measure")
        return cached


def write_latency(bundle: Bundle, table: LatencyTable, path: Path | None = None) -> LatencyTable:
    """Seal the table into the bundle, or into the file that ``latency_place`` named, in one step; the table with its path."""
    path = path or bundle.root / LATENCY
    write_atomically(path, seal(table.to_dict()))
    return replace(table, path=path)


def _read(path: Path) -> LatencyTable | None:
    obj = read_sealed(path)
    if obj is None:
        return None
    obj.pop("digest")
    return replace(LatencyTable.from_dict(obj, where=str(path)), path=path)


def _check_version(obj: Mapping[str, Any], where: str) -> object:
    version = obj.get("format_version")
    if isinstance(version, bool) or version not in (_ONE_ENGINE, _ONE_PICTURE, LATENCY_VERSION):
        written = "an older edgesafe" if version is None else f"another edgesafe (format {version!r})"
        raise FormatVersionError(
            f"the measurement was written by {written}",
            where=where,
            expected=f"format_version {LATENCY_VERSION}",
            todo="measure again: edgesafe measure",
        )
    return version


def _check_rounds(table: LatencyTable, where: str) -> None:
    stages = [*table.segments.values(), *table.text["preprocess"], *table.text["prefill"], *table.text["decode"]]
    counts = {len(stage["ms"]) for stage in stages}
    if len(counts) != 1 or not all(table.text.values()):
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


def _read_text(fields: Fields, *, one_picture: bool) -> dict[str, Any]:
    text = {
        "preprocess": [_read_picture(child) for child in fields.children("preprocess")]
        if not one_picture
        else [{"pixels": _ITS_PIXELS, "encoded": False, **_read_times(fields.child("preprocess"))}],
        "prefill": [_read_times(child, "tokens") for child in fields.children("prefill")],
        "decode": [_read_times(child, "context") for child in fields.children("decode")],
    }
    fields.done()
    return text


def _read_picture(fields: Fields) -> dict[str, Any]:
    encoded = fields.flag("encoded")
    return {"encoded": encoded, **_read_times(fields, "pixels")}


def _read_exit(fields: Fields, *, by_depth: bool) -> dict[str, Any]:
    ttft = fields.child("ttft_ms")
    row = {
        "exit": str(read_exit(fields, by_depth=by_depth)),
        "ttft_ms": {key: ttft.number(key, 0) for key in ("p50_ms", "p95_ms")},
    }
    ttft.done()
    fields.done()
    return row
