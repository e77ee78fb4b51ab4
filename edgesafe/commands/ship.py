"""Align, export, quantize and certify in one go.

What `make export` runs. Rows, suite, alignment and evaluation do not depend on the device: they lie under --work, and a step
whose inputs have not changed is not run again.

With --plan nothing is done or written: each step's time on this machine, its memory and its disk are counted from the
checkpoint's headers and the numbers of rows. Counted are the products of tower and decoder with their tokens, at a rate that is
measured in a second, what is written between them, and the optimizer; answers are as long as the rows want them. The times are
floors.

Example:
  edgesafe ship --device rpi5 --out build/rpi5
  edgesafe ship MODEL --device rpi5 --preset public --out build/mine --plan
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from edgesafe.commands._shared import (
    add_accept_damage,
    add_json,
    add_model,
    folder,
    keep_apart,
    model_folder,
    print_json,
    quiet_libraries,
    utf8,
)
from edgesafe.errors import CertificationFailedError, ConfigError

if TYPE_CHECKING:
    from edgesafe.device import DeviceProfile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe ship`."""
    from edgesafe.steps import REFERENCE

    add_model(parser, default=REFERENCE)
    add = parser.add_argument
    add("--device", type=utf8, required=True, help="profile name (`edgesafe devices`), or a TOML file")
    add("--out", type=folder, metavar="DIR", required=True, help="folder of the report and of DIR/bundle")
    text = "folder of the steps that all devices share (default: `shared` beside --out)"
    add("--work", type=folder, metavar="DIR", help=text)
    text = "alignment settings, TOML (default: the reference model's own, or the shipped l-sft.toml)"
    add("--config", type=Path, metavar="FILE", help=text)
    add("--data", type=folder, metavar="DIR", help="training rows (default: drawn from the reference world)")
    add("--suite", type=folder, metavar="DIR", help="certification suite (default: drawn from the reference world)")
    text = "exits to evaluate and export, e.g. '6,8-11,6@9'; the reference is added (default: the settings' ladder; else the "
    text += "trained ones if some have fewer visual tokens, or every depth, or eight of a large tower)"
    add("--exits", metavar="EXITS", help=text)
    text = "make rows and suite of public sets, in place of --data and --suite; `public`: AdvBench, HarmBench, XSTest and "
    text += "self-instruct"
    add("--preset", choices=("public",), metavar="NAME", help=text)
    text = "folder with copies of the preset's sets (default: fetched from GitHub at fixed commits)"
    add("--preset-data", type=folder, metavar="DIR", help=text)
    text = "evaluate and align the reference model here, though the clone carries the results (about half an hour)"
    add("--retrain", action="store_true", help=text)
    text = "print what each step takes, do nothing; fails where this machine lacks memory or disk"
    add("--plan", action="store_true", help=text)
    add_accept_damage(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Ship and print the closing report; fails where no exit is certified."""
    from edgesafe.device import load_device
    from edgesafe.format.files import write_atomically
    from edgesafe.ship import REPORT, TABLE, closing_table, ship

    keep_apart(args.out, MODEL=args.model, **{"--data": args.data, "--suite": args.suite, "--preset-data": args.preset_data})
    _check_preset(args)
    device = load_device(args.device)
    if args.plan:
        return _plan(args, device)
    options = {"work": args.work, "config": args.config, "data": args.data, "suite": args.suite}
    choices = {"retrain": args.retrain, "accept_damage": args.accept_damage, "exits": args.exits}
    model = model_folder(args.model)
    if args.preset:
        options["data"], options["suite"] = _preset(args, model, device)
    report = ship(model, device, args.out, **options, **choices)
    closing = closing_table(report)
    write_atomically(args.out / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(args.out / TABLE, (closing + "\n").encode())
    if args.json:
        print_json(report)
    else:
        print(closing)
    if not report["certified"]:
        raise CertificationFailedError(
            "no exit keeps the suite's limits",
            where=report["bundle"],
            expected="at least one passed exit",
            todo="read the table's last column",
        )
    return 0


def _plan(args: argparse.Namespace, device: DeviceProfile) -> int:
    """Print what `ship` would take, and fail where this machine has too little for it."""
    from edgesafe.ship_plan.plan import check_room, describe, plan_ship

    quiet_libraries()
    sources = {"config": args.config, "data": args.data, "suite": args.suite, "preset_data": args.preset_data}
    choices = {"preset": bool(args.preset), "retrain": args.retrain, "exits": args.exits}
    plan = plan_ship(args.model, device, args.out, **choices, **sources)
    if args.json:
        print_json(plan.to_dict())
    else:
        print(describe(plan))
    check_room(plan, args.out)
    return 0


def _preset(args: argparse.Namespace, model: Path, device: DeviceProfile) -> tuple[Path, Path]:
    """The rows and the suite of the preset; what would fail after hours of work is refused first."""
    from edgesafe.align.config import read_config
    from edgesafe.preset import public_steps
    from edgesafe.ship import check_before, default_work
    from edgesafe.steps import settings_for

    quiet_libraries()
    work = args.work or default_work(args.out)
    check_before(model, device, args.out, work, accept_damage=args.accept_damage)
    read_config(args.config or settings_for(model))
    return public_steps(model, work, args.preset_data)


def _check_preset(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other.

    Raises:
        ConfigError: they do.
    """
    if args.preset and (args.data or args.suite):
        what, todo = "--preset makes rows and suite, and others are named", "leave out --preset, or --data and --suite"
        raise ConfigError(what, where="--preset", expected="a preset, or rows and suite of your own", todo=todo)
    if args.preset_data and not args.preset:
        raise ConfigError("--preset-data without a preset", where="--preset-data", expected="--preset public", todo="add it")
