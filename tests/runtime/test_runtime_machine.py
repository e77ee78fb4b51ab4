"""What a machine says about its cores, from files as Linux shows them, and threads that stay where they were put."""

from __future__ import annotations

import pytest

from edgesafe.machine import allowed_cores, core_sets, governor, on_cores, temperature_c, thread_choices


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


def test_conditions(tmp_path):
    texts = ["powersave", "powersave", "ondemand"]
    cpus = {f"devices__system__cpu__cpu{i}__cpufreq__scaling_governor": text for i, text in enumerate(texts)}
    zones = {"class__thermal__thermal_zone0__temp": "47500", "class__thermal__thermal_zone1__temp": "61000"}
    sys = shown(tmp_path, **cpus, **zones, class__thermal__thermal_zone2__temp="off")
    assert governor(sys) == "ondemand, powersave" and temperature_c(sys) == 61.0
    assert governor(tmp_path / "none") is None and temperature_c(tmp_path / "none") is None


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
