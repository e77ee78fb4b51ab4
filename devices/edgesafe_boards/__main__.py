"""The refusal test where the model ships.

Puts the wheel and a bundle on a board and runs `edgesafe measure` and `edgesafe smoke` there. With --host the board is reached
by ssh. Without it, a board that QEMU can be is emulated here, and the wheel's tests and a comparison with this machine's
answers run as well. For the device `host` this machine itself answers. Ends with 42 where the board's answers are not the
certified ones. With --deploy a board that passed the test serves the bundle from then on; with --remove it no longer does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edgesafe.certify.smoke_rows import LEAST_ROWS
from edgesafe.cli import main as edgesafe
from edgesafe.device import load_device
from edgesafe.errors import ConfigError, EdgesafeError
from edgesafe_boards import deploy, emulated, emulated_smoke, remote_smoke

_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run the test and print what it gave."""
    parser = argparse.ArgumentParser(
        prog="edgesafe_boards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("device", metavar="DEVICE", help="profile name (`edgesafe devices`), or a TOML file")
    add("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder, as `make export` wrote it")
    add("--host", metavar="USER@ADDRESS", help="a board to reach by ssh (default: emulate one)")
    add("--ssh", default="ssh", metavar="COMMAND", help="ssh with options of your own, e.g. 'ssh -p 2222 -i key'")
    add("--work", type=Path, default=Path("build/board"), metavar="DIR", help="folder of what is kept (%(default)s)")
    add("--out", type=Path, metavar="DIR", help="folder of the report (default: beside the bundle)")
    text = "about how many rows an emulated board is asked, or `all`, which takes three times as long (%(default)s)"
    add("--rows", type=_rows, default=emulated_smoke.ROWS, metavar="N", help=text)
    add("--check", action="store_true", help="only say whether a board can be emulated on this machine")
    add("--cpu", metavar="NAME", help="emulate another of QEMU's processors; on `max`, QEMU 7.2 computes wrongly")
    text = "of --host: serve the bundle there, as a service of systemd on the board's loopback, once the test has passed"
    add("--deploy", action="store_true", help=text)
    add("--remove", action="store_true", help="of --host: stop that service and remove it")
    add("--port", type=int, default=deploy.PORT, metavar="N", help="of --deploy: the port on the board (%(default)s)")
    args = parser.parse_args(arguments)
    job = "make deploy" if args.deploy or args.remove else "make smoke"
    try:
        return _run(args)
    except EdgesafeError as error:
        print(f"{job}: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{job}: interrupted; the next run continues", file=sys.stderr)
        return _INTERRUPTED


def _rows(text: str) -> int | None:
    """A number of rows; None is all.

    >>> _rows("all"), _rows("20")
    (None, 20)
    """
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < LEAST_ROWS:
        raise argparse.ArgumentTypeError(f"{text} is neither all nor a number of at least {LEAST_ROWS}")
    return int(text)


def _run(args: argparse.Namespace) -> int:
    device = load_device(args.device)
    if args.check:
        emulated.board_of(device.name)
        emulated.check_host()
        return 0
    if args.deploy or args.remove:
        return _deploy(args)
    out = args.out or args.bundle.parent
    if args.host:
        return remote_smoke.run(args.host, args.ssh, args.bundle, args.work, out)
    if device.kind == "host":
        return edgesafe(["smoke", str(args.bundle)])
    report = emulated_smoke.run(device.name, args.bundle, args.work, args.cpu, args.rows)
    emulated_smoke.write_report(report, out / "emulated.json")
    print(report.text())
    return report.code


def _deploy(args: argparse.Namespace) -> int:
    if not args.host:
        raise ConfigError("no board is named", where="HOST", expected="user@address", todo="make deploy HOST=user@address")
    if args.remove:
        return deploy.remove(args.host, args.ssh)
    return deploy.run(args.host, args.ssh, args.bundle, args.work, args.port)


if __name__ == "__main__":
    sys.exit(main())
