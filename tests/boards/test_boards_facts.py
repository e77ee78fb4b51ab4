"""What a board is asked before anything is copied, by the script that boards run, and which boards are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgesafe.errors import DeviceError
from edgesafe_boards import facts

# What a Raspberry Pi 5 with Raspberry Pi OS (bookworm, 64-bit) answers.
PI = facts.Facts("Linux", "aarch64", 64, (3, 11), True, "glibc 2.36", 20 * 10**9, 7 * 10**9, True)
NEEDS = facts.Needs(disk=300_000_000, memory=200_000_000)


def test_a_board_answers(board, program):
    program("uname", '[ "$1" = -m ] && echo aarch64 || echo Linux')
    told = facts.ask(board)
    assert (told.system, told.machine, told.bits, told.writable, told.lacks) == ("Linux", "aarch64", 64, True, ())
    assert told.python >= (3, 11) and told.libc.startswith("glibc") and told.disk and told.memory
    facts.check_system(replace(told, venv=True), "here")


def test_a_board_without_python(board, program):
    program("python3", "exit 127")
    told = facts.ask(board)
    assert told.python == () and told.libc == ""
    with pytest.raises(DeviceError, match="has no Python.*sudo apt install python3 python3-venv"):
        facts.check_system(told, "here")


def test_a_board_of_32_bits_on_a_64_bit_kernel(board, program):
    program("uname", '[ "$1" = -m ] && echo aarch64 || echo Linux')
    program("python3", "exit 127")
    program("getconf", "echo 32")
    with pytest.raises(DeviceError, match="32-bit programs.*64-bit Linux.*Raspberry Pi OS"):
        facts.check_system(facts.ask(board), "here")


def test_a_full_disk_is_told(board, program):
    program("df", "echo Filesystem blocks used available; echo /dev/root 100 100 2048 100% /")
    assert facts.ask(board).disk == 2048 * 1024


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        ({"machine": "armv7l", "bits": 32}, "armv7l with 32-bit programs"),
        ({"bits": 32}, "aarch64 with 32-bit programs"),
        ({"system": "Darwin"}, "Darwin"),
        ({"system": "", "machine": ""}, "unknown system"),
        ({"python": (3, 9)}, "Python is 3.9"),
        ({"python": ()}, "no Python"),
        ({"venv": False}, "can't make environments"),
        ({"libc": "glibc 2.27"}, "glibc 2.27"),
        ({"libc": ""}, "unknown"),
        ({"lacks": ("tar",)}, "no tar"),
    ],
)
def test_boards_that_do_not_fit(wrong, shown):
    facts.check_system(PI, "pi@board")
    with pytest.raises(DeviceError, match=shown) as refused:
        facts.check_system(replace(PI, **wrong), "pi@board")
    assert refused.value.where == "pi@board" and refused.value.todo and refused.value.expected


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        ({"disk": 200_000_000}, "200 MB free"),
        ({"memory": 10**8}, "100 MB of free"),
        ({"writable": False}, "home"),
    ],
)
def test_boards_without_room(wrong, shown):
    facts.check_room(PI, NEEDS, "pi@board")
    facts.check_room(replace(PI, disk=None, memory=None), NEEDS, "pi@board")  # what a board doesn't tell isn't held against it
    with pytest.raises(DeviceError, match=shown):
        facts.check_room(replace(PI, **wrong), NEEDS, "pi@board")
