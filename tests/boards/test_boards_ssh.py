"""The way to a board: addresses, what ssh's errors mean, and that scripts and their codes come through it."""

from __future__ import annotations

import pytest

from edgesafe.errors import ConfigError, DeviceError
from edgesafe_boards import __main__ as program
from edgesafe_boards.ssh import broken, check_address, connected

# What OpenSSH 9.2 printed in each case.
ERRORS = {
    "pi@127.0.0.1: Permission denied (publickey,password).": "refuses the login",
    "Received disconnect from 127.0.0.1 port 22:2: Too many authentication failures": "refuses the login",
    "Host key verification failed.": "key is not known",
    "ssh: Could not resolve hostname nowhere.invalid: Name or service not known": "no such address",
    "ssh: connect to host 127.0.0.1 port 9: Connection refused": "can't be reached, or the connection broke",
    "client_loop: send disconnect: Broken pipe": "can't be reached, or the connection broke",
    "": "no message",
}


@pytest.mark.parametrize(("errors", "shown"), ERRORS.items())
def test_what_errors_mean(errors, shown):
    error = broken("pi@board", f"Warning: something\n{errors}\n" if errors else "")
    assert shown in error.what and error.where == "pi@board" and error.todo


@pytest.mark.parametrize("address", ["", "-oProxyCommand=x", "pi@-x", "pi@a b", "pi@a;b", "pi@a'b", "$(x)", "a@b@c"])
def test_what_is_no_address(address):
    with pytest.raises(ConfigError, match="not a board's address"):
        check_address(address)


def fake_ssh(tmp_path, login="touch {here}/up; exec sleep 60"):
    """An ssh whose other side is this machine: the last word goes to a shell, as sshd gives it to the user's."""
    file = tmp_path / "ssh"
    file.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/log\ncase "$*" in *" -N "*) {login.format(here=tmp_path)} ;; '
        f'*"-O check"*) test -e {tmp_path}/up; exit ;; *"-O exit"*) exit 0 ;; esac\n'
        'for last; do :; done\necho Welcome to this board\nexec sh -c "$last"\n',
        encoding="ascii",
    )
    file.chmod(0o755)
    return str(file)


def test_scripts_and_codes_come_through(tmp_path):
    script = "printf %s \"a 'quoted' $((1 + 1))\"; cat; echo told >&2"
    with connected("pi@board", fake_ssh(tmp_path)) as shell:
        done = shell.run(script, "a script", feed=lambda stdin: stdin.write(b"fed"))
        assert (done.text, done.errors) == ("a 'quoted' 2fed", "told\n")
        assert shell.run("exit 42", "a script", may_end=(0, 42)).code == 42
        with pytest.raises(DeviceError, match="a script ended with code 3: last words"):
            shell.run("echo last words >&2; exit 3", "a script")
        with pytest.raises(DeviceError, match="the connection broke: Broken pipe"):
            shell.run("echo Broken pipe >&2; exit 255", "a script")
    log = (tmp_path / "log").read_text().splitlines()
    assert any("-N pi@board" in line for line in log) and log[-1].endswith("-O exit pi@board")


def test_a_login_that_fails(tmp_path):
    ssh = fake_ssh(tmp_path, "echo 'pi@board: Permission denied (password).' >&2; exit 255")
    with pytest.raises(DeviceError, match="refuses the login.*Permission denied"), connected("pi@board", ssh):
        pass
    with pytest.raises(ConfigError, match="can't be run"), connected("pi@board", str(tmp_path / "none")):
        pass


def test_the_command_says_what_is_wrong_with_an_address(handmade, capsys):
    assert program.main(["rpi5", str(handmade), "--host=a b"]) == ConfigError.exit_code
    assert "make smoke: ConfigError: 'a b' is not a board's address" in capsys.readouterr().err
