"""Device profiles: strict TOML, and no figure without a source."""

from __future__ import annotations

import os
import platform
import tomllib

import pytest

from edgesafe.device import FIGURES, devices_folder, list_devices, load_device
from edgesafe.errors import ConfigError
from edgesafe.format.seal import seal

GOOD = """
title = "a device"
kind = "board"
threads = 2
provider = "CPUExecutionProvider"
vision_scheme = "int8-dynamic"
text_scheme = "auto"
ttft_budget_ms = 1000
[estimates]
read_gb_s = 3.5
[sources]
read_gb_s = "a sheet"
"""


def test_the_profiles_that_the_issue_asks_for():
    profiles = {p.name: p for p in list_devices()}
    assert {"rpi5", "host"} <= set(profiles)
    assert {"phone", "car"} <= {p.kind for p in profiles.values()}
    assert (profiles["rpi5"].threads, profiles["rpi5"].ttft_budget_ms) == (4, 10_000)
    assert profiles["sa8295p"].hard_ttft_ms == 2000


@pytest.mark.parametrize(
    ("said", "machine", "whole"),
    [
        ("", "x86_64", False),
        ('attention = "whole"', "aarch64", True),
        ('attention = "tiled"', "x86_64", False),
        ('kind = "host"', "x86_64", True),
        ('kind = "host"', "AMD64", True),
        ('kind = "host"', "aarch64", False),
        ('kind = "host"\nattention = "tiled"', "x86_64", False),
    ],
)
def test_attention_is_what_the_profile_says_and_on_the_host_what_the_machine_is(tmp_path, monkeypatch, said, machine, whole):
    path = tmp_path / "mine.toml"
    kind = 'kind = "board"'
    path.write_text(GOOD.replace(kind, said if "kind" in said else f"{kind}\n{said}"))
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert load_device(path).attends_whole is whole
    path.write_text(
        path.read_text().replace("[estimates]", 'attention = "half"\n[estimates]', 1) if not said else "attention = 1"
    )
    with pytest.raises(ConfigError):
        load_device(path)


@pytest.mark.parametrize("path", sorted(devices_folder().glob("*.toml")), ids=lambda p: p.stem)
def test_every_figure_has_a_source(path):
    obj = tomllib.loads(path.read_text())
    figures = [key for key in FIGURES if key in obj or key in obj.get("estimates", {})]
    assert figures and set(figures) == set(obj["sources"])


def test_a_profile_by_its_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    profile = load_device(path)
    assert (profile.name, profile.threads, profile.memory_mib) == ("mine", 2, None)
    assert profile.estimates == {"read_gb_s": 3.5}


@pytest.mark.parametrize(
    ("old", "new", "shown"),
    [
        ("threads =", "thread =", "did you mean 'threads'"),
        ("read_gb_s = 3.5", "read_gbs = 3.5", "did you mean 'read_gb_s'"),
        ('read_gb_s = "a sheet"', 'red_gb_s = "a sheet"', "did you mean 'read_gb_s'"),
        ('read_gb_s = "a sheet"', "", "has no source"),
        ('kind = "board"', 'kind = "boat"', "'board'"),
        ('"int8-dynamic"', '"int7"', "int8-dynamic"),
        ('"CPUExecutionProvider"', '"NnapiExecutionProvider"', "CPUExecutionProvider"),
        ("ttft_budget_ms = 1000", "", "ttft_budget_ms"),
        ("ttft_budget_ms = 1000", "ttft_budget_ms = inf", "finite"),
        ("threads = 2", 'threads = "2"', "whole number"),
        ("threads = 2", "threads = 0", "at least 1"),
        ("threads = 2", "threads = ", "not TOML"),
        ("[estimates]", "estimates = 3\n[other]", "estimates"),
    ],
)
def test_a_wrong_profile_is_a_config_error(tmp_path, old, new, shown):
    assert old in GOOD
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_device(path)
    assert shown in str(caught.value) and "mine.toml" in str(caught.value)


def test_an_unknown_device_suggests_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'rpi5'"):
        load_device("rpi-5")
    with pytest.raises(ConfigError, match="can't read"):
        load_device(tmp_path / "none.toml")
    # A name is a name, never a way out of the devices folder.
    with pytest.raises(ConfigError, match="unknown device"):
        load_device("../devices/rpi5")


@pytest.mark.parametrize(("key", "scheme"), [("vision_scheme", "int8-static"), ("text_scheme", "int8-dynamic")])
def test_a_scheme_that_is_never_made_is_refused_when_the_profile_is_read(tmp_path, key, scheme):
    path = tmp_path / "mine.toml"
    path.write_text("".join(line if not line.startswith(key) else f'{key} = "{scheme}"\n' for line in GOOD.splitlines(True)))
    with pytest.raises(ConfigError, match="auto" if key == "text_scheme" else "int8-dynamic"):
        load_device(path)


def test_a_profile_whose_file_name_is_not_utf8_has_a_name_that_a_manifest_can_hold(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.toml")
    path.write_text(GOOD)
    assert seal({"device": load_device(path).name}) == seal({"device": r"caf\xe9"})
