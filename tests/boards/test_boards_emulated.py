"""An emulated board without QEMU: what it is called, what is refused before any work, and how its report counts."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from edgesafe.errors import CertificationFailedError, DeviceError
from edgesafe.processor import processor_name
from edgesafe_boards import __main__ as program
from edgesafe_boards import arm64_root, emulated, emulated_smoke, tasks
from edgesafe_boards.differences import Difference, differences, digest

PI5 = emulated.BOARDS["rpi5"]


def test_no_real_board_has_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(emulated, "_version", lambda: "7.2.22")
    name = emulated.write_machine(PI5, tmp_path, "cortex-a76")
    told = processor_name((tmp_path / "cpuinfo").read_text(), tmp_path / "sys")
    assert told == name == "Raspberry Pi 5 Model B Rev 1.0, emulated by QEMU 7.2.22 as cortex-a76"
    assert told != processor_name(PI5.cpuinfo.read_text(), tmp_path / "sys")
    # Another of QEMU's processors is another machine, whose records don't count for the first.
    assert emulated.write_machine(PI5, tmp_path, "max") != name


def refusal(capsys, *words):
    code = program.main(list(map(str, words)))
    return code, capsys.readouterr().err


def test_what_is_missing_is_named_before_any_work(handmade, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(emulated.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(emulated, "PACKAGES", {"debootstrap": tmp_path / "none", "qemu-user-static": tmp_path / "none"})
    monkeypatch.setattr(emulated.os, "geteuid", lambda: 1000)
    code, said = refusal(capsys, "rpi5", handmade, "--work", tmp_path / "work")
    assert code == DeviceError.exit_code and not (tmp_path / "work").exists()
    assert "debootstrap and qemu-user-static are missing; root's rights are missing" in said
    assert "apt-get install debootstrap qemu-user-static; run it as root" in said
    monkeypatch.setattr(emulated.platform, "machine", lambda: "aarch64")
    assert "Linux of another processor alone" in refusal(capsys, "rpi5", handmade)[1]


def test_devices_that_cannot_be_emulated_say_so(handmade, capsys):
    code, said = refusal(capsys, "pixel9", handmade)
    assert code == DeviceError.exit_code and "pixel9 can't be emulated" in said and "DEVICE=pixel9 HOST=user@address" in said
    assert "did you mean 'pixel9'" in refusal(capsys, "pixel8", handmade)[1]


def test_for_the_host_this_machine_answers_and_is_named(monkeypatch, handmade):
    asked = []
    monkeypatch.setattr(program, "edgesafe", lambda words: asked.append(words) or 42)
    assert program.main(["host", str(handmade)]) == 42 and asked == [["smoke", str(handmade)]]


def whole(root: Path) -> bool:
    return (root / "usr" / "bin" / "sh").is_file()


def test_a_system_is_whole_or_not_there(tmp_path, monkeypatch):
    made = []

    def fetch(new, fetched):
        (new / "usr" / "bin").mkdir(parents=True)
        if len(made) == 1:
            raise KeyboardInterrupt
        (new / "usr" / "bin" / "sh").touch()

    monkeypatch.setattr(arm64_root, "_fetch", lambda *folders: made.append(folders) or fetch(*folders))
    monkeypatch.setattr(arm64_root, "_finish", lambda new: None)
    root = tmp_path / "root"
    with pytest.raises(KeyboardInterrupt):
        arm64_root.arm64_root(root)
    assert not root.exists()
    assert whole(arm64_root.arm64_root(root)) and len(made) == 2
    assert whole(arm64_root.arm64_root(root)) and len(made) == 2  # and then it is there
    monkeypatch.setattr(arm64_root, "_KEY", "another edition")
    assert whole(arm64_root.arm64_root(root)) and len(made) == 3


def test_a_mirror_that_fails_is_named(tmp_path, monkeypatch):
    (tmp_path / "debootstrap").write_text("#!/bin/sh\necho 'E: Failed getting release file'\nexit 1\n")
    (tmp_path / "debootstrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(arm64_root, "mirror", lambda: "http://m.example/debian/")
    with pytest.raises(DeviceError, match=r"Failed getting release file \(http://m.example/debian/\)"):
        arm64_root.arm64_root(tmp_path / "root")
    assert not (tmp_path / "root").exists()


def lines(**tokens: list[int]) -> str:
    return "\n".join(json.dumps({"exit": "6", "id": row, "tokens": ids}) for row, ids in tokens.items())


def test_differences_are_listed():
    host = lines(a=[5, 7, 2], b=[1], c=[1, 2])
    assert differences(host, lines(a=[5, 7, 2], b=[1], c=[1, 2])) == (3, [])
    count, found = differences(host, lines(a=[5, 8, 2], b=[1, 9], c=[1]))
    assert (count, found) == (
        3,
        [Difference("6", "a", 1, 7, 8), Difference("6", "b", 1, None, 9), Difference("6", "c", 1, 2, None)],
    )
    assert digest(found) != digest(found[:1]) != digest([])
    for other in (lines(a=[5], b=[1]), "", lines(a=[5], b=[1], d=[2])):
        with pytest.raises(DeviceError, match="of this machine's 3"):
            differences(host, other)
    with pytest.raises(DeviceError):
        differences("", "")


def report(smoke=0, failed=0, found=()):
    outcome = {"smoke": smoke, "tests": failed, "measure": 0}
    outcomes = {name: tasks.Outcome(code, f"{name} printed this", 1.0) for name, code in outcome.items()}
    return emulated_smoke._report("a Pi, emulated", outcomes, (80, 284), (640, list(found)), 300.0)


def test_a_report_names_the_machine_of_every_table():
    text = report(found=[Difference("6", "a", 1, 7, 8)]).text()
    assert "on the device" not in text
    titles = [line for line in text.splitlines() if line.startswith("==")]
    assert len(titles) == 4 and all("a Pi, emulated" in title for title in titles)
    assert text.index(emulated.MARK) < text.index("measure printed this")
    assert "80 of the suite's 284 rows for devices were asked" in text
    assert "640 answers compared, 1 differ" in text and "639 of 640 have the host's tokens" in text
    json.dumps(asdict(report()))


def test_what_a_run_ends_with():
    assert report().code == 0
    assert report(failed=1).code == DeviceError.exit_code
    assert report(smoke=42, failed=1).code == CertificationFailedError.exit_code == tasks.FAILED
    assert replace(report(smoke=42)).smoke_code == 42
