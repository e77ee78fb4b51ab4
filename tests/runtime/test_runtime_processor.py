"""What tells machines apart (real texts of /proc/cpuinfo of four devices) and by which instruction sets kernels are picked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgesafe import machine, processor
from edgesafe.processor import instruction_sets, processor_name
from mutants import wrong

TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted((Path(__file__).parent / "cpuinfo").iterdir())}
NOWHERE = Path("/nowhere")
# HWCAP and HWCAP2 of a Cortex-A76, and of QEMU 7.2's `-cpu max`, whose cpuinfo is whatever the emulated system holds.
# asm/hwcap.h: ASIMDHP 10, ASIMDDP 20, SVE 22; SVEI8MM 9, I8MM 13, BF16 14, SME 23.
A76, MAX = (1 << 10 | 1 << 20 | 0b11, 0), (1 << 10 | 1 << 20 | 1 << 22 | 0b11, 1 << 9 | 1 << 13 | 1 << 14 | 1 << 23)


def nameless(text: str) -> str:
    """What a phone's kernel would write of it: no name of a board."""
    return "\n".join(line for line in text.splitlines() if not line.startswith(("Model", "Hardware")))


def without_core(text: str, number: int) -> str:
    """The text while one core is offline."""
    return "\n\n".join(block for block in text.split("\n\n") if not re.match(rf"processor\s*: {number}\n", block + "\n"))


def four_are_told_apart(name=processor_name) -> None:
    assert len(TEXTS) == 4
    assert (
        len({name(text, NOWHERE) for text in TEXTS.values()}) == len({name(nameless(t), NOWHERE) for t in TEXTS.values()}) == 4
    )


def test_four_devices_are_told_apart_with_and_without_their_names():
    four_are_told_apart()
    assert processor_name(TEXTS["pi5"], NOWHERE) == "Raspberry Pi 5 Model B Rev 1.0"
    assert processor_name(TEXTS["s24"], NOWHERE) == (
        "processor 0x41:0xd80 + 0x41:0xd81 + 0x41:0xd82, 8 cores, timer 38.40, features 10d00704"
    )


@pytest.mark.parametrize(
    "edit",
    [
        ('told.append(f"timer', 'str(f"timer'),  # two phones have the same parts, features and number of cores
        ("named or _described(lines, sys)", "named"),
    ],
)
def test_a_name_that_leaves_something_out_is_seen(monkeypatch, edit):
    if "told" in edit[0]:
        monkeypatch.setattr(processor, "_described", wrong(processor._described, edit))
        name = processor_name
    else:
        name = wrong(processor_name, edit)
    with pytest.raises(AssertionError):
        four_are_told_apart(name)


@pytest.mark.parametrize("device", TEXTS)
def test_a_name_stays_while_cores_come_and_go_and_frequencies_change(device, tmp_path):
    cpus = tmp_path / "devices" / "system" / "cpu"
    cpus.mkdir(parents=True)
    cores = TEXTS[device].count("processor\t")
    (cpus / "possible").write_text(f"0-{cores - 1}\n")
    text = nameless(TEXTS[device])
    whole = processor_name(text, tmp_path)
    assert f"{cores} cores" in whole
    for number in range(cores - 1):  # the phones' last core is the only one of its kind
        left = without_core(text, number)
        assert left.count("processor\t") == cores - 1 and processor_name(left, tmp_path) == whole
    assert processor_name(text.replace("CPU revision", "cpu MHz\t: 1799.2\nCPU revision"), tmp_path) == whole
    (cpus / "possible").write_text("0-3,8-11\n")
    assert ("8 cores" in processor_name(text, tmp_path)) and processor_name("", tmp_path) == ""


def test_a_name_that_all_machines_have_is_none():
    lines = (
        "processor\t: 0\nmodel name\t: {}\nCPU implementer\t: 0x41\nCPU architecture: 7\nCPU part\t: 0xd08\nBogoMIPS\t: {}\n"
    )
    names = {
        processor_name(lines.format(name, mips), NOWHERE)
        for name in ("ARMv7 Processor rev 3 (v7l)", "")
        for mips in (38.4, 41.2)
    }
    assert names == {"processor 0x41:0xd08, 1 cores, features e3b0c442"}  # of a 32-bit kernel the timer is measured anew
    assert processor_name("model name\t: AMD EPYC\ncpu MHz : 2596.1\nflags : avx2", NOWHERE) == "AMD EPYC"


def test_the_machine_s_name_is_the_processor_s(monkeypatch):
    monkeypatch.setattr(machine, "board_name", lambda: "")
    kinds = set()
    for text in TEXTS.values():
        monkeypatch.setattr(machine, "processor_name", lambda text=text: processor_name(text, NOWHERE))
        kinds.add(machine.machine_kind())
        assert machine.machine_name() == f"{machine.machine_kind()}, {machine.host_cores()} cores"
    assert len(kinds) == 4


def test_instruction_sets_are_those_that_kernels_are_picked_by():
    flags = "flags : fpu sse4_1 avx f16c avx2 fma avx512f avx512_vnni sha_ni\n"
    assert (
        instruction_sets("x86_64", flags + "flags : fpu sse4_1 avx f16c avx2 fma sha_ni\n") == "x86-64 sse4_1 avx f16c fma avx2"
    )
    assert instruction_sets("AMD64", flags) == "x86-64 sse4_1 avx f16c fma avx2 avx512f avx512_vnni"
    found = {device: instruction_sets("aarch64", text, (0, 0)) for device, text in TEXTS.items()}
    assert found["pi4"] == "aarch64" and found["pi5"] == "aarch64 asimdhp asimddp"
    assert found["pixel9"] == found["s24"] == "aarch64 asimdhp asimddp i8mm bf16"


def test_on_arm_the_auxiliary_vector_counts_and_not_a_text():
    """An emulator shows a Pi 5's text beside whatever `-cpu` names: only the vector changes with it."""
    assert instruction_sets("aarch64", TEXTS["pi5"], A76) == instruction_sets("aarch64", "", A76) == "aarch64 asimdhp asimddp"
    assert instruction_sets("aarch64", TEXTS["pi5"], MAX) == "aarch64 asimdhp asimddp sve svei8mm i8mm bf16 sme"


def test_an_unknown_processor_is_a_class_of_its_own(monkeypatch):
    monkeypatch.setattr(processor.platform, "processor", lambda: "arm")
    assert instruction_sets("arm64", "", (0, 0)) == "arm64, instruction sets of arm"
    assert instruction_sets("riscv64", "", (0, 0)) != instruction_sets("arm64", "", (0, 0))


def test_here_it_tells_something():
    assert instruction_sets().startswith(("x86-64", "aarch64")) or "instruction sets of" in instruction_sets()
    assert processor._possible_cores(processor.SYS) >= 1
