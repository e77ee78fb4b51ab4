"""`make deploy HOST=user@address`: what a board's smoke test passed on becomes a service of systemd there, on its loopback.

A version is the environment and the bundle as they were tested, as hard links, so that it takes no room and a later smoke test
can't change it. The service runs `current`, a link to one. A new version that doesn't answer is taken back, and the former
one runs again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edgesafe.errors import ConfigError, DeviceError
from edgesafe.progress import step
from edgesafe_boards import facts, wheels
from edgesafe_boards.facts import FOLDER
from edgesafe_boards.install import Cargo, needs, open_bundle
from edgesafe_boards.shell import Done, Shell
from edgesafe_boards.ssh import connected

SERVICE = "edgesafe-service"  # in the home folder of the board's user
UNIT = ".config/systemd/user/edgesafe.service"
PORT, PORTS = 8765, range(1024, 65536)
_TEMPLATE = Path(__file__).with_name("edgesafe.service")
_SYSTEMCTL = 'export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-/run/user/$(id -u)}"\nsystemctl="systemctl --user"\n'
_WAIT_S, _AT_ONCE_S = 120, 10
_CAN = f"""{_SYSTEMCTL}
command -v systemctl >/dev/null || exit 10
$systemctl show-environment >/dev/null || exit 11
"""
# A user's services end with the login unless the user lingers.
_LINGER = f"""{_SYSTEMCTL}
[ "$(loginctl show-user "$(id -un)" --property=Linger --value)" = yes ] || loginctl enable-linger || exit 12
"""
_CANNOT = {
    10: ("the board has no systemd", "a system such as Raspberry Pi OS", "start `edgesafe serve` there by other means"),
    11: (
        "the board's systemd doesn't serve this user",
        "a session by ssh, with pam_systemd",
        "on the board: sudo apt install libpam-systemd",
    ),
    12: (
        "the board ends a user's services with the login",
        "a user that lingers",
        "on the board: sudo loginctl enable-linger $USER",
    ),
}
# The runtime of the tested environment says whether a test passed there with the very bundle and kernels; a file alone doesn't.
_TESTED = f"""cd {FOLDER} && venv/bin/python - <<'EOF'
import json
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import read_certificate
from edgesafe.runtime.kernels import kernels_here
from edgesafe.runtime import OnnxRuntime
from edgesafe.runtime.smoke_record import Ran, read_records
bundle = Bundle.open("bundle")
certificate = read_certificate(bundle)
records = read_records(bundle, Ran(bundle.digest, certificate.digest, kernels_here(OnnxRuntime())))
print(json.dumps({{"ran": len(records), "failed": [reason for r in records if not r.passed for reason in r.reasons]}}))
EOF
"""
_LINK = """
cd && mkdir -p SERVICE && cd SERVICE && rm -rf *.partial && if [ ! -d VERSION ]; then
    mkdir VERSION.partial && cp -al ../FOLDER/venv ../FOLDER/bundle VERSION.partial/ &&
    { [ ! -d ../FOLDER/bundle.smoke ] || cp -al ../FOLDER/bundle.smoke VERSION.partial/; } && mv VERSION.partial VERSION
fi
"""
# `mv -T` replaces a link in one step.
_SWITCH = (
    _SYSTEMCTL
    + """
cd && mkdir -p "$(dirname UNIT)" && cat > UNIT.partial && mv UNIT.partial UNIT &&
ln -sfn VERSION SERVICE/next && mv -T SERVICE/next SERVICE/current &&
$systemctl daemon-reload && $systemctl enable -q edgesafe && $systemctl restart edgesafe
"""
)
_STATE = f"""{_SYSTEMCTL}
echo "version=$(readlink {SERVICE}/current)"
echo "unit=$(sha256sum < {UNIT} 2>/dev/null | cut -c1-64)"
echo "active=$($systemctl is-active edgesafe 2>/dev/null)"
"""
# Whose answer it is, is what tells: another program may hold the port.
_ANSWERS = """FOLDER/venv/bin/python - <<'EOF'
import json, sys, time, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
end, why = time.monotonic() + SECONDS, ""
while time.monotonic() < end:
    try:
        model = json.load(opener.open("http://127.0.0.1:PORT/v1/models", timeout=5))["data"][0]["edgesafe"]
        if model["bundle"] == "DIGEST":
            sys.exit(0 if model["certified"] else "nothing is certified in it")
        why = "another bundle answers there"
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    time.sleep(0.5)
sys.exit(why)
EOF
"""
_REMOVE = f"""{_SYSTEMCTL}
cd && [ -e {UNIT} ] || [ -e {SERVICE} ] || exit 3
if [ -e {UNIT} ]; then
    $systemctl disable -q --now edgesafe || $systemctl stop edgesafe
    rm -f {UNIT} && $systemctl daemon-reload
fi
rm -rf {SERVICE}
"""


@dataclass(frozen=True)
class Version:
    """What is to serve: its name on the board, its unit's text, and the bundle's digest."""

    name: str
    unit: str
    port: int
    digest: str


def run(address: str, ssh: str, bundle_path: Path, work: Path, port: int = PORT) -> int:
    """Serve a bundle that passed its smoke test on a board; nothing is done where it does already.

    Args:
        address: The board, as ssh takes it.
        ssh: The command, with options of your own.
        bundle_path: The bundle.
        work: A folder for the wheels, as `make smoke` has.
        port: A port of the board's loopback.

    Raises:
        ConfigError: The address or the port is none.
        DeviceError: The board can't be reached, doesn't fit, or has not passed the test; or the service doesn't answer, and the
            former one runs again.
        BundleError, IntegrityError: The bundle is none, or not whole.
    """
    if port not in PORTS:
        what = f"{port} is not a port that a user's service can have"
        raise ConfigError(what, where="PORT", expected=f"{PORTS[0]} to {PORTS[-1]}", todo=f"leave it out for {PORT}")
    bundle = open_bundle(bundle_path)
    with connected(address, ssh) as shell:
        told = facts.ask(shell)
        facts.check_system(told, address)
        _check(shell, _CAN)
        with step("the wheel and what it depends on"):
            built = wheels.build(work / "wheel")
            depended = wheels.depended(work, told.machine, told.python_text)
        cargo = Cargo(bundle, {path.name: path for path in (built.wheel, *depended.glob("*.whl"))})
        check_tested(shell, told, cargo)
        facts.check_room(told, needs(cargo, told), address)
        _check(shell, _LINGER)
        text = deploy(shell, version_of(cargo, port))
    print(f"{address}: {text}")
    return 0


def remove(address: str, ssh: str) -> int:
    """Stop the service and remove it with all its versions; what `make smoke` put there stays."""
    with connected(address, ssh) as shell:
        code = shell.run(_REMOVE, "removing the service", may_end=(0, 3)).code
    print(f"{address}: {'no service was there' if code else 'the service was stopped and removed'}")
    return 0


def version_of(cargo: Cargo, port: int) -> Version:
    """The version that a board's tested environment and bundle make."""
    name = hashlib.sha256(f"{wheels.install_key(cargo.wheels)} {cargo.bundle_key}".encode()).hexdigest()[:12]
    unit = _TEMPLATE.read_text(encoding="utf-8").replace("FOLDER", SERVICE).replace("PORT", str(port))
    return Version(name, unit, port, cargo.bundle.digest)


def check_tested(shell: Shell, told: facts.Facts, cargo: Cargo) -> None:
    """Refuse to serve what didn't pass `edgesafe smoke` on this board.

    Raises:
        DeviceError: Another version or nothing is installed there, or the test was not run or failed.
    """

    def refusal(what: str) -> DeviceError:
        todo = f"make smoke DEVICE={cargo.bundle.manifest.device} HOST={shell.name}"
        return DeviceError(what, where=shell.name, expected="a bundle that passed `edgesafe smoke` on this board", todo=todo)

    if told.installed != wheels.install_key(cargo.wheels):
        raise refusal("this checkout of edgesafe is not what was tested on the board")
    if told.bundle != cargo.bundle_key:
        raise refusal("this bundle is not what was tested on the board")
    found: dict[str, Any] = json.loads(shell.run(_TESTED, "looking for the record of `edgesafe smoke`").text)
    if found["failed"]:
        raise refusal(f"`edgesafe smoke` failed on the board: {found['failed'][0]}")
    if not found["ran"]:
        raise refusal("`edgesafe smoke` was not run on the board with this bundle")


def deploy(shell: Shell, version: Version, wait_s: float = _WAIT_S) -> str:
    """Switch the service to a version, and back where it doesn't answer; what was done, in words.

    Raises:
        DeviceError: It doesn't answer. What ran before runs again, or nothing where nothing did.
    """
    before = _state(shell)
    digest = hashlib.sha256(version.unit.encode()).hexdigest()
    same = (before["version"], before["unit"], before["active"]) == (version.name, digest, "active")
    if same and _answer(shell, version, _AT_ONCE_S).code == 0:
        return f"serves this bundle already, on its port {version.port}"
    shell.run(_fill(_LINK, version), "keeping what was tested")
    old_unit = shell.run(f"cat {UNIT} 2>/dev/null || true", "reading the former unit").out
    try:
        with step(f"starting the service on {shell.name}"):
            _switch(shell, version)
            answer = _answer(shell, version, wait_s)
        if answer.code:
            raise DeviceError(f"the service doesn't answer: {answer.errors.strip()}", where=shell.name)
    except DeviceError as error:
        raise _taken_back(shell, version, before, old_unit, error) from error
    shell.run(
        f"cd {SERVICE} && for old in *; do [ $old = {version.name} ] || [ $old = current ] || rm -rf $old; done", "tidying up"
    )
    return f"serves this bundle on http://127.0.0.1:{version.port}/ of the board; it starts with it"


def _switch(shell: Shell, version: Version) -> None:
    def unit(stdin: IO[bytes]) -> None:
        stdin.write(version.unit.encode())

    shell.run(_fill(_SWITCH, version), "starting the service", feed=unit)


def _taken_back(shell: Shell, version: Version, before: dict[str, str], unit: bytes, error: DeviceError) -> DeviceError:
    """Undo a switch; the error that is left to tell."""
    todo = f"on the board: journalctl --user -u edgesafe; a port that is taken needs another one (PORT={version.port + 1})"
    if not before["version"] or not unit:
        shell.run(_REMOVE, "taking the service back", may_end=(0, 3))
        return DeviceError(f"{error.what}; it was removed again", where=shell.name, todo=todo)
    former = Version(before["version"], unit.decode(), version.port, "")
    _switch(shell, former)
    if before["version"] != version.name:
        shell.run(f"rm -rf {SERVICE}/{version.name}", "removing the version that failed")
    return DeviceError(f"{error.what}; the former version was started again", where=shell.name, todo=todo)


def _state(shell: Shell) -> dict[str, str]:
    lines = shell.run(_STATE, "asking what serves there").text.splitlines()
    return {key: value.strip() for key, _, value in (line.partition("=") for line in lines)}


def _answer(shell: Shell, version: Version, seconds: float) -> Done:
    script = _ANSWERS.replace("FOLDER", FOLDER).replace("DIGEST", version.digest).replace("SECONDS", str(seconds))
    return shell.run(script.replace("PORT", str(version.port)), "asking the service", may_end=(0, 1))


def _fill(script: str, version: Version) -> str:
    filled = script.replace("SERVICE", SERVICE).replace("UNIT", UNIT).replace("VERSION", version.name)
    return filled.replace("FOLDER", FOLDER)


def _check(shell: Shell, script: str) -> None:
    code = shell.run(script, "asking for systemd", may_end=(0, *_CANNOT)).code
    if code:
        what, expected, todo = _CANNOT[code]
        raise DeviceError(what, where=shell.name, expected=expected, todo=todo)
