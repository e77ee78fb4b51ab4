"""Device profiles: what a device is thought to do, and how a bundle for it is made."""

from __future__ import annotations

import difflib
import json
import os
import platform
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgesafe.errors import ConfigError
from edgesafe.format.bundle import Bundle
from edgesafe.format.fields import Fields
from edgesafe.format.targets import shown_path

KINDS = ("board", "phone", "car", "host")
# The weight schemes that `edgesafe_export.quantize` makes; "auto" is the smallest one that keeps what the checkpoint says.
VISION_SCHEMES = ("int8-dynamic", "fp32")
TEXT_SCHEMES = ("int4-gptq", "mixed-gptq", "int4-block32", "int4-block64", "int4-block128", "int8-block32", "fp32", "auto")
ATTENTIONS = ("tiled", "whole")
# Operations a second by int8 weights, by weights in blocks of four bits, in float32, and of attention's own products; bytes a
# second of weights that no cache holds; and what a graph, and a decoder's layer, cost before they compute anything.
ESTIMATES = (
    *("gops_int8", "gops_int4", "gops_fp32", "gops_attention", "read_gb_s"),
    *("overhead_ms_per_graph", "overhead_ms_per_layer"),
)
# Every figure that a profile may give a source for.
FIGURES = (*ESTIMATES, "threads", "memory_mib", "ttft_budget_ms", "hard_ttft_ms")


@dataclass(frozen=True)
class DeviceProfile:
    """One device. ``estimates`` holds only figures with a text under ``sources``; an unknown one is absent.

    ``threads`` and ``memory_mib`` are None for ``host``, where the machine itself says. ``ttft_budget_ms`` is
    the usual budget for the time to the first token, ``hard_ttft_ms`` the time beyond which an answer is
    useless. ``attention`` is how the decoder's attention computes (`edgesafe_export.shared_cache.attend_whole`).
    ``measured_on`` is the machine that all its estimates were measured on (`edgesafe devices measure`); None where they are
    others'.
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
    measured_on: str | None = None

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
    return profile_from_dict(obj, name=shown_path(path.stem), where=str(path))


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
        measured_on=fields.text("measured_on") if fields.has("measured_on") else None,
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


def profile_text(profile: DeviceProfile) -> str:
    """A profile as the TOML that `load_device` reads; its name is the file's."""
    own = {key: value for key, value in asdict(profile).items() if key != "name" and value is not None}
    tables = {key: own.pop(key) for key in ("estimates", "sources")}
    # A JSON string of ASCII and a JSON number are TOML's too.
    lines = [f"{key} = {json.dumps(value)}" for key, value in own.items()]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def profile_of(bundle: Bundle) -> DeviceProfile | None:
    """The profile that a bundle was exported for: the copy in its config, or the one that ships under its name."""
    inside = bundle.manifest.config.get("device_profile")
    try:
        if isinstance(inside, dict):
            return profile_from_dict(inside, name=bundle.manifest.device, where="manifest.json: device_profile")
        return load_device(bundle.manifest.device)
    except ConfigError:
        return None
