"""`python -m study`: the study's runs, and the documents' tables and pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from edgesafe.errors import EdgesafeError
from edgesafe.progress import step
from study.plan import FOLDERS, PLANS, SHARES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RAW = HERE / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "RESULTS.md")
OUT = {"objectives": RAW, "maps": RAW / "maps", "rungs": RAW / "rungs"}
BUILD = Path("build") / "study"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m study`."""
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="run what is not done yet (hours), each run in a process of its own")
    _add_places(run)
    run.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these runs alone; l-sft-* = all that begin so")
    run.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    run.add_argument("--list", action="store_true", help="print what would be run and end")
    one = actions.add_parser("one", help="do one run in this process (what `run` starts)")
    one.add_argument("name", help="the run")
    _add_places(one)
    reached = actions.add_parser("reached", help="measure how far the states of the maps' runs reach to the reference's")
    _add_places(reached)
    reached.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these runs alone, as for run")
    tables = actions.add_parser("tables", help="write every table again from the raw answers")
    figures = actions.add_parser("figures", help="make the pictures again that need neither a bundle nor a browser")
    check = actions.add_parser("check", help="fail where a table is not what the raw answers give, or a picture is out of date")
    for sub in (tables, figures, check):
        sub.add_argument("--raw", type=Path, default=RAW, help="folder of the raw answers")
    for sub in (tables, check):
        sub.add_argument("--documents", type=Path, nargs="+", default=list(DOCUMENTS), help="Markdown files with tables")
    shipped = actions.add_parser("import-export", help="keep the answers of a finished `make export` or `make smol`")
    shipped.add_argument("ship", type=Path, help="its OUT folder, e.g. build/rpi5")
    shipped.add_argument("--name", choices=("export", "smol"), default="export", help="which of the two (%(default)s)")
    shipped.add_argument("--raw", type=Path, default=RAW, help="folder of the raw answers")


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", choices=sorted(PLANS), default="objectives", help="what to run (objectives)")
    parser.add_argument("--out", type=Path, help="folder of the raw answers (default: the plan's)")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder for checkpoints, bundles and logs (build/study)")
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: the reference model)")
    parser.add_argument("--data", type=Path, help="training rows (default: drawn)")
    parser.add_argument("--suite", type=Path, help="suite (default: the test split, or the plan's share of it, drawn)")
    text = f"pictures of another world, once for each of {', '.join(FOLDERS)}; a run whose folder is not named is left out"
    parser.add_argument("--folder", type=_folder, action="append", default=[], metavar="NAME=DIR", help=text)
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (1)")
    parser.add_argument("--trial", type=int, default=0, metavar="N", help="try the machinery: N updates instead of the plan's")


def _folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if name not in FOLDERS or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"NAME=DIR, NAME one of {', '.join(FOLDERS)} and DIR a folder, not {text!r}")
    return name, Path(folder)


def run(args: argparse.Namespace) -> int:
    """Run `python -m study`; returns the exit code."""
    if args.action in ("run", "one", "reached"):
        return _run(args)
    if args.action == "import-export":
        from study.shipped import import_export

        print(import_export(args.ship, args.raw, args.name))
        return 0
    from study.documents import check, write
    from study.figures import check_figures, make
    from study.tables import all_tables

    if args.action == "figures":
        print(*make(args.raw), sep="\n")
        return 0
    if args.action == "check":
        check_figures(args.raw)
    tables = all_tables(args.raw)
    for path in args.documents:
        if args.action == "check":
            check(path, tables)
        else:
            print(f"{path}: {', '.join(write(path, tables)) or 'no table'}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from edgesafe.errors import ConfigError
    from study.run import prepare, run_study, select, to_do
    from study.work import do, make_setup

    out = args.out or OUT[args.plan]
    if args.trial and out.resolve() in OUT.values():
        raise ConfigError("a trial's answers are not the study's", where="--trial", expected="an --out of its own")
    places = prepare(args.build, args.model, args.data, args.suite, SHARES.get(args.plan, 1.0))
    numbers = {"threads": args.threads, "trial": args.trial}
    setup = make_setup(out, args.build, *places, **numbers, plan=args.plan, folders=dict(args.folder))
    named = {run.name: run for run in PLANS[args.plan]()}
    if args.action == "one":
        import torch

        from edgesafe.commands._shared import quiet_libraries

        quiet_libraries()
        torch.set_num_threads(args.threads)
        (chosen,) = select(named, [args.name])
        with step(f"run {args.name}"):
            print(*do(setup, chosen, named), sep="\n")
    elif args.action == "reached":
        from study.reached import measure

        print(measure(setup, select(named, args.only)))
    elif args.list:
        print("\n".join(run.name for run in to_do(setup, select(named, args.only), named)))
    else:
        with step("study"):
            run_study(setup, only=args.only, jobs=args.jobs)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; an error of edgesafe's ends it with its message and code."""
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except EdgesafeError as error:
        print(f"study: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
