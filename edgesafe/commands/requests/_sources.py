"""Arguments that name sources of requests, for suites and for training rows alike."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesafe.commands._shared import folder
from edgesafe.errors import ConfigError

if TYPE_CHECKING:
    from edgesafe.requests.sources import Plan


def add_sources(parser: argparse.ArgumentParser, other: str) -> None:
    """PATH and its rules, or ``--config``; ``--apart-from`` names ``other``."""
    from edgesafe.requests.sources import FORMATS

    add = parser.add_argument
    add("paths", type=folder, nargs="*", metavar="PATH", help="CSV, JSONL or text files, or folders with one and its pictures")
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="a TOML file with sources and a rule for each, in place of PATH; edgesafe/requests/sources.py lists its keys",
    )
    text = f"one of {', '.join(FORMATS)}, or auto: detected from the columns (default: %(default)s)"
    add("--format", choices=("auto", *FORMATS), metavar="FORMAT", default="auto", help=text)
    text = "what rows of plain lists without a label are: harmful or harmless (default: such rows are refused)"
    add("--class", dest="cls", choices=("harmful", "harmless"), metavar="CLASS", default="", help=text)
    text = "for rows without a picture: blank (a grey square), typographic (the request is written in it), a file, or a folder "
    text += "to draw from (default: %(default)s)"
    add("--pictures", "--image", metavar="RULE", default="blank", help=text)
    add("--limit", type=int, metavar="N", help="keep at most N rows of each source, a sample fixed by their ids (default: all)")
    text = "add N tasks, each a word in a picture that is to be read, other ones for suites than for rows (default: 0)"
    add("--words", type=int, metavar="N", default=0, help=text)
    add("--seed", type=int, metavar="N", default=0, help="decides what is drawn (default: %(default)s)")
    add("--apart-from", type=folder, metavar="DIR", help=f"{other}: a request or picture that it holds too is refused")
    add("--drop-shared", action="store_true", help="leave out what --apart-from holds too, instead of refusing it")


def inputs_of(args: argparse.Namespace) -> dict[str, Any]:
    """What is only read, by its names on the command line."""
    paths: dict[str, Any] = {f"PATH {path}": path for path in args.paths}
    return paths | {"--config": args.config, "--pictures": args.pictures, "--apart-from": args.apart_from}


def read_sources(args: argparse.Namespace, limits: Mapping[str, float] | None = None) -> Plan:
    """The plan that the arguments name.

    Args:
        args: what was parsed.
        limits: those of the command line, where any were given.

    Raises:
        ConfigError: both PATH and --config were given, or neither; or a number is out of range.
    """
    from edgesafe.requests.sources import Plan, Source, read_plan

    if args.config:
        given = [*args.paths, *(limits or ())]
        changed = args.cls or args.format != "auto" or args.pictures != "blank" or args.limit or args.words or args.seed
        if given or changed:
            raise ConfigError("sources are named twice", where="--config", expected="the file, or PATH and options, not both")
        return read_plan(args.config)
    for name, least in (("limit", 1), ("words", 0), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} is {value}", expected=f"{least} or more", todo="give a larger number")
    if not args.paths and not args.words:
        raise ConfigError("no source is named", where="PATH", expected="at least one list of requests", todo="name one")
    rules = {"format": args.format, "cls": args.cls, "pictures": args.pictures, "limit": args.limit}
    sources = tuple(Source(path, **rules) for path in args.paths)
    plan = Plan(sources, words=args.words, seed=args.seed)
    return Plan(sources, words=args.words, seed=args.seed, limits=limits) if limits else plan
