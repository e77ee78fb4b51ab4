"""What a machine says about its cores, from files as Linux shows them, and threads that stay where they were put."""

from __future__ import annotations

import sys

import pytest

from edgesafe.cli import main
from edgesafe.format.bundle import Bundle
from edgesafe.format.latency import read_latency
from edgesafe.machine import (
    Heat,
    allowed_cores,
    conditions,
    core_sets,
    cpu_quota,
    governor,
    host_cores,
    on_cores,
    read_heat,
    slowed,
    temperature_c,
    thread_choices,
)
from edgesafe.runtime import measure


def shown(root, **files: str):
    """A /sys with these files; "__" stands for a folder."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_kinds_of_cores_by_capacity_and_by_frequency(tmp_path):
    # As in a Snapdragon 8 Gen 3: one X4, five A720 (two of them slower, which makes a kind of their own), two A520.
    capacities = [300, 300, 800, 800, 800, 900, 900, 1024]
    sys = shown(tmp_path, **{f"devices__system__cpu__cpu{i}__cpu_capacity": str(c) for i, c in enumerate(capacities)})
    assert core_sets(range(8), sys) == [(7,), (5, 6, 7), (2, 3, 4, 5, 6, 7), (0, 1, 2, 3, 4, 5, 6, 7)]
    assert thread_choices(core_sets(range(8), sys)) == [
        (1, (7,)), (2, (5, 6, 7)), (3, (5, 6, 7)), (4, (2, 3, 4, 5, 6, 7)), (6, (2, 3, 4, 5, 6, 7)), (8, None)
    ]  # fmt: skip
    # Cores that this process may not use play no part.
    assert core_sets((0, 1, 2), sys) == [(2,), (0, 1, 2)]
    sys = shown(tmp_path / "f", **{f"devices__system__cpu__cpu{i}__cpufreq__cpuinfo_max_freq": f"{2 - i}000" for i in (0, 1)})
    assert core_sets((0, 1), sys) == [(0,), (0, 1)]


@pytest.mark.parametrize("texts", [("1024", "1024"), ("1024", "?"), ("1024",), ()])
def test_cores_that_are_alike_or_unknown_are_one_set(tmp_path, texts):
    sys = shown(tmp_path, **{f"devices__system__cpu__cpu{i}__cpu_capacity": text for i, text in enumerate(texts)})
    assert core_sets((0, 1), sys) == [(0, 1)]


# The groups as docker, podman, systemd and Android's kernels show them: two versions, the process's own path or the host's.
@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/docker/ab12", {"cpu.max": "50000 100000"}, 0.5),  # the host's path; here its group is the root
        ("0::/a.slice/b.service", {"a.slice/cpu.max": "200000 100000", "a.slice/b.service/cpu.max": "max 100000"}, 2.0),
        ("0::/a.slice/b.service", {"a.slice/cpu.max": "800000 100000", "a.slice/b.service/cpu.max": "100000 100000"}, 1.0),
        ("4:memory:/x\n3:cpu,cpuacct:/x", {"cpu/x/cpu.cfs_quota_us": "300000", "cpu/x/cpu.cfs_period_us": "100000"}, 3.0),
        ("3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("3:cpuacct:/", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("0::/", {"cpu.max": "many"}, None),
        ("", {"cpu.max": "100000 100000"}, None),
        ("nonsense", {}, None),
    ],
)
def test_a_container_s_quota_counts_as_cores(tmp_path, own, files, quota):
    sys = shown(tmp_path, **{f"fs__cgroup__{name.replace('/', '__')}": text for name, text in files.items()})
    (tmp_path / "own").write_text(own)
    assert cpu_quota(sys, tmp_path / "own") == quota
    allowed = len(allowed_cores())
    assert host_cores(sys, tmp_path / "own") == (allowed if quota is None else min(allowed, max(1, -int(-quota // 1))))


def test_conditions(tmp_path):
    texts = ["powersave", "powersave", "ondemand"]
    cpus = {f"devices__system__cpu__cpu{i}__cpufreq__scaling_governor": text for i, text in enumerate(texts)}
    zones = {"class__thermal__thermal_zone0__temp": "47500", "class__thermal__thermal_zone1__temp": "61000"}
    sys = shown(tmp_path, **cpus, **zones, class__thermal__thermal_zone2__temp="off")
    assert governor(sys) == "ondemand, powersave" and temperature_c(sys) == 61.0
    assert governor(tmp_path / "none") is None and temperature_c(tmp_path / "none") is None


# As a Pi 5, an x86 laptop and a phone show it; the Pi's flags in hexadecimal, without and with the prefix.
PI, FAN = "devices__platform__soc@107c000000__soc@107c000000:firmware__get_throttled", "class__thermal__cooling_device0"
CORE, ZONE = "devices__system__cpu__cpu{}__thermal_throttle__core_throttle_count", "class__thermal__thermal_zone0__temp"


@pytest.mark.parametrize(
    ("files", "heat", "why"),
    [
        ({PI: "0", ZONE: "61000"}, Heat(61.0, pi_flags=0), ""),
        ({PI: "50000"}, Heat(pi_flags=0x50000), ""),  # it was, before
        ({PI: "0x50005"}, Heat(pi_flags=0x50005), "voltage is too low; it is throttled"),
        ({PI: "80008"}, Heat(pi_flags=0x80008), "soft heat limit"),
        ({PI: "denied"}, Heat(), ""),
        ({CORE.format(0): "3", CORE.format(1): "4"}, Heat(throttled=7), ""),
        ({f"{FAN}__type": "pwm-fan", f"{FAN}__cur_state": "4"}, Heat(), ""),
        (
            {f"{FAN}__type": "cpufreq-cpu0", f"{FAN}__cur_state": "2"},
            Heat(cooling=2),
            "slows the processor to cool it (step 2)",
        ),
    ],
)
def test_what_a_machine_says_of_heat(tmp_path, files, heat, why):
    sys = shown(tmp_path, **files)
    assert read_heat(sys) == heat
    found = slowed(heat, heat)
    assert bool(found) == bool(why) and all(text in "; ".join(found) for text in why.split("; "))


def test_what_happened_meanwhile_counts():
    assert slowed(Heat(pi_flags=0x10000), Heat(pi_flags=0x50000)) == ("it is throttled",)
    assert slowed(Heat(throttled=7), Heat(throttled=8)) == ("the processor was throttled 1 times",)
    assert slowed(Heat(throttled=7), Heat()) == slowed(Heat(), Heat(throttled=7)) == ()


def test_an_app_asks_android_itself(tmp_path):
    states = iter((0, 3))
    before, after = (read_heat(tmp_path, lambda: next(states)) for _ in range(2))
    told = conditions(before, after)
    assert told["thermal_status"] == [0, 3] and told["slowed"] == ["Android's thermal status is 3"]
    assert "thermal_status" not in conditions(Heat(), Heat())


def test_threads_stay_on_their_cores_and_the_caller_is_put_back():
    before = allowed_cores()
    with on_cores(before[:1]):
        assert allowed_cores() == before[:1]
    assert allowed_cores() == before
    for cores in (None, (), before, (10_000,)):
        with on_cores(cores):
            assert allowed_cores() == before
    with pytest.raises(KeyError), on_cores(before[:1]):
        raise KeyError
    assert allowed_cores() == before


def test_measure_warns_where_the_machine_was_slowed_down(handmade, copy_of, monkeypatch, capsys):
    heats = iter([Heat(40.0, throttled=1), Heat(80.0, throttled=3)])
    monkeypatch.setattr(sys.modules[measure.__module__], "read_heat", lambda **_: next(heats))
    root = copy_of(handmade)
    assert main(["measure", str(root), "--seconds", "0.1", "--threads", "1"]) == 0
    shown = capsys.readouterr()
    assert "40 to 80 °C" in shown.out and "slowed down: the processor was throttled 2 times" in shown.err
    assert read_latency(Bundle.open(root)).conditions["temperature_c"] == [40.0, 80.0]
